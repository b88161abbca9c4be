"""Which linears are quantized: found by type, chosen by pattern, refused with a reason."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from roundel.errors import SchemeError
from roundel.models.experts import SplitExperts
from roundel.sweeps.layers import text_lists

__all__ = ["EXCLUDED", "Selection", "matrix_modules", "select_linears"]

EXCLUDED = "excluded by pattern"
"""The reason of linears that a user has left out."""

ROUTERS = ("gate", "router", "shared_expert_gate")
"""Names beside experts; each decides over whole experts with few weights, and stays in its precision unless it is asked for."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The linears to quantize, and what stays in its precision, with the reason."""

    linears: dict[str, nn.Linear]
    skipped: dict[str, str]


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(re.search(p[3:], name) is not None if p.startswith("re:") else fnmatchcase(name, p) for p in patterns)


def select_linears(
    model: nn.Module, check: Callable[[int, int], None], *, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> Selection:
    """Chooses among the model's `nn.Linear`s.

    Args:
        model: The model.
        check: Raises a `SchemeError` for a shape that cannot be stored.
        include: Patterns of module names (`*.mlp.*`, or a regular expression after `re:`). By default all linears
            inside the language model's decoder layers: neither embeddings nor the output head, nor towers for images and sounds.
        exclude: Patterns of names to leave out.

    Raises:
        SchemeError: a pattern is not a regular expression, or nothing is left to quantize.
    """
    for pattern in (*include, *exclude):
        if pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except re.error as error:
                raise SchemeError(f"pattern {pattern!r} is not a regular expression: {error}") from error
    every = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    in_layers = tuple(f"{name}." for name in text_lists(model))
    tied, routers = _tied_to_embedding(model), _routers(model)
    linears: dict[str, nn.Linear] = {}
    skipped: dict[str, str] = {}
    refused: Counter[str] = Counter()
    for name, module in model.named_modules():
        if type(module) is not nn.Linear:
            stacked = not isinstance(module, nn.Conv1d) and any(p.ndim == 3 for p in module.parameters(recurse=False))
            if stacked and name.startswith(in_layers):
                skipped[name] = f"fused experts: the weights of {type(module).__name__} are tensors of three dimensions"
            continue
        wanted = _matches(name, include) if include else name.startswith(in_layers)
        if not wanted:
            if not include and name.startswith(every):
                skipped[name] = "not part of the language model's decoder layers"
            continue
        if _matches(name, exclude):
            skipped[name] = EXCLUDED
        elif not include and f"{name}.".startswith(routers):
            skipped[name] = "chooses or weights experts"
        elif module.weight in tied:
            skipped[name] = "shares its weight with the embedding"
        else:
            try:
                check(module.out_features, module.in_features)
            except SchemeError as error:
                refused[str(error)] += 1
                skipped[name] = str(error).split(";")[0]
                continue
            linears[name] = module
    if not linears:
        if refused:
            raise SchemeError(refused.most_common(1)[0][0])  # what would help most of them
        raise SchemeError("no linear is left to quantize" + (f": --include {' '.join(include)} matches none" if include else ""))
    return Selection(linears=linears, skipped=skipped)


def matrix_modules(model: nn.Module) -> frozenset[str]:
    """Names of all modules that have a matrix as their weight, embeddings aside: those that some engine runs as a linear (routers, too)."""
    return frozenset(
        name
        for name, module in model.named_modules()
        if not isinstance(module, nn.Embedding) and isinstance(weight := getattr(module, "weight", None), nn.Parameter) and weight.ndim == 2
    )


def _routers(model: nn.Module) -> tuple[str, ...]:
    """Beginnings of names of what chooses experts, or weights a shared one: what stands beside them and is called so."""
    homes = {name.rpartition(".")[0] for name, module in model.named_modules() if _has_experts(name, module)}
    return tuple(f"{home}.{own}." for home in homes for own in ROUTERS)


def _has_experts(name: str, module: nn.Module) -> bool:
    return isinstance(module, SplitExperts) or (isinstance(module, nn.ModuleList) and name.endswith(".experts"))


def _tied_to_embedding(model: nn.Module) -> set[nn.Parameter]:
    return {p for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
