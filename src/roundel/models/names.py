"""Which stored tensor becomes which parameter, as Transformers itself finds it out when it loads a model.

Checkpoints are stored under names that are older than the code that reads them, or shared with other engines: prefixes differ between a
base model, a causal one and a wrapper with a vision tower, and blocks were renamed. Transformers keeps a list of such changes for each
architecture, and of others that change values too (experts that are stacked, halves that are joined). Only the former are names.

Experts that were split (`experts`) are found in either form: stored one by one, or as parts of one tensor of all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from roundel.models.experts import PROJECTIONS, Part, SplitExperts, parts_of, split_modules
from roundel.models.plain import is_turned

__all__ = ["StoredNames", "split_conversions", "stored_names"]


@dataclass
class StoredNames:
    """Of a model's parameters and buffers."""

    same: dict[str, str] = field(default_factory=dict)
    """By parameter the stored tensor that has its values, or the name of the `part` of one that has."""
    made: dict[str, list[str]] = field(default_factory=dict)
    """By parameter that is made of several tensors, or of parts of one, their names."""
    parts: dict[str, tuple[str, Part]] = field(default_factory=dict)
    """What are parts of stored tensors, under the names that they would have by themselves."""
    turned: set[str] = field(default_factory=set)
    """Stored tensors of weights that are transposed."""


def stored_names(
    model: nn.Module, stored: Iterable[str], shape_of: Callable[[str], tuple[int, ...] | None] = lambda _name: None
) -> StoredNames:
    """How a model's parameters are stored in a checkpoint that has these tensors; `shape_of` one, if that is known."""
    if not isinstance(model, PreTrainedModel):
        return StoredNames(same={name: name for name in stored})
    split = split_modules(model)
    conversions = split_conversions(model, get_model_conversion_mapping(model))
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    transposing = {entry.source_patterns[0] for entry in converters if _transposes(entry)}
    known = {**model.state_dict(), **dict.fromkeys(_stacks(split), True)}
    found, transposed = StoredNames(), dict[str, str]()

    def target_of(name: str) -> tuple[str, str | None]:
        return rename_source_key(name, renamings, converters, model.base_model_prefix, known)

    for name in sorted(stored):
        target, pattern = target_of(name)
        if pattern is None:
            found.same[target] = name
        elif pattern in transposing:
            transposed[target] = name
        else:
            found.made.setdefault(target, []).append(name)
    for name, module in model.named_modules():
        if is_turned(module) and f"{name}.weight" in found.same:
            found.turned.add(found.same[f"{name}.weight"])
    for name, module in split.items():
        parts = parts_of(module)
        turned = {
            stack
            for stack in module.stacks
            if (whole := transposed.get(f"{name}.{stack}")) is not None and shape_of(whole) not in (None, _shape_of(module, stack, parts))
        }
        for own, part in parts.items():
            stack = f"{name}.{part.stack}"
            if (whole := found.same.get(stack, transposed.get(stack))) is not None:
                parameter = f"{name}.{own}.weight"
                owners = (whole.removesuffix(f".{part.stack}"), whole.removesuffix(".weight").rpartition(".")[0], name)
                found.same[parameter] = next(
                    (stored_as for owner in owners if target_of(stored_as := f"{owner}.{own}.weight")[0] == parameter), parameter
                )
                found.parts[found.same[parameter]] = (whole, replace(part, transposed=part.transposed != (part.stack in turned)))
    return found


def _transposes(entry: Any) -> bool:
    """Whether a change turns the matrices of one tensor of all experts, if they are not as the model has them."""
    return (
        len(entry.source_patterns) == len(entry.target_patterns) == len(entry.operations) == 1
        and type(entry.operations[0]).__name__ == "Transpose"
        and getattr(entry.operations[0], "check_dims", False)
    )


def _shape_of(module: SplitExperts, stack: str, parts: Mapping[str, Part]) -> tuple[int, ...]:
    """Of the parameter that has been split."""
    own: Any = module
    weights = [own.get_submodule(name).weight for name, part in parts.items() if part.stack == stack and part.expert == 0]
    d_out, d_in = sum(len(weight) for weight in weights), weights[0].shape[1]
    return (own.stacks[stack], d_in, d_out) if own.is_transposed else (own.stacks[stack], d_out, d_in)


def split_conversions(model: nn.Module, conversions: Sequence[Any]) -> list[Any]:
    """Transformers' changes for a model whose experts were split: what would join experts' matrices gives them their modules' names."""
    stacks = _stacks(split_modules(model))
    kept, added = [], []
    for entry in conversions:
        joins = isinstance(entry, WeightConverter) and len(entry.target_patterns) == 1
        target = entry.target_patterns[0] if joins else ""
        if not (
            joins and all("*." in source for source in entry.source_patterns) and any(re.search(f"{target}$", stack) for stack in stacks)
        ):
            kept.append(entry)
            continue
        parent, _, stack = target.rpartition(".")
        for source, projection in zip(entry.source_patterns, PROJECTIONS[stack], strict=True):
            own = source.removesuffix("weight").replace("*.", r"(\d+)\.")
            renaming = WeightRenaming(own, rf"{parent}.\1.{projection}.")
            for name in ("scope_prefix", "base_model_prefix"):
                if hasattr(entry, name):  # not in the oldest versions
                    setattr(renaming, name, getattr(entry, name))
            added.append(renaming)
    return [*kept, *added]


def _stacks(split: Mapping[str, SplitExperts]) -> list[str]:
    return [f"{name}.{stack}" for name, module in split.items() for stack in module.stacks]
