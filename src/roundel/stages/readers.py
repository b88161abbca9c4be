"""Whether what is written will be read: the format, given the model, before any work.

A recipe's format is chosen by its schemes alone. Some architectures are not read in it: Transformers knows no names for experts that it
stores together, decodes experts of some schemes wrongly, keeps linears transposed, or fails while it loads packed ones. Where nobody has
asked for a format, Roundel's own is taken instead, which is read for every architecture.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from roundel.artifacts.checkpoints import check_apart
from roundel.artifacts.source import Source
from roundel.errors import SchemeError
from roundel.formats import FORMATS
from roundel.grids import parse_scheme
from roundel.grids.minifloat import Fp8
from roundel.grids.uniform import Uniform
from roundel.models.experts import SplitExperts, experts_of, parts_of
from roundel.models.linears import EXCLUDED, matrix_modules
from roundel.models.plain import is_turned
from roundel.models.readable import loading_fault
from roundel.recipes import Recipe
from roundel.rounding.allocate import fused_units
from roundel.stages.notes import Notes
from roundel.types import RoundedWeight

__all__ = ["with_readable_format"]


def with_readable_format(recipe: Recipe, source: Source, notes: Notes) -> Recipe:
    """The recipe, with the native format where it says `auto` and Transformers would not read the usual one; says so.

    Raises:
        SchemeError: nothing reads the format that is asked for.
    """
    form, kind = recipe.written_format(), source.config.get("model_type")
    if form in FORMATS and FORMATS[form].fuses:
        _check_joined(source, form, notes)
    if form != "dense" and source.config.get("rescale_every"):
        raise SchemeError(
            f"{kind} divides its weights in place when it runs (rescale_every), which packed ones cannot be; use --format dense"
        )
    if form not in ("native", "dense") and any(is_turned(linear) for linear in source.linears.values()):
        reason = f"the linears of {kind} are stored transposed (Conv1D), which readers of {form} do not know"
        if recipe.format != "auto":
            raise SchemeError(f"{reason}; use --format native")
    else:
        experts = {name: own for name in source.linears if (own := experts_of(source.model, name)) is not None}
        together = [name for name in experts if source.checkpoint.part_of(source.checkpoint.weight_of(name) or "")]
        if together:
            check_apart(form)
        if form != "compressed-tensors":
            return recipe
        if experts and any(isinstance(parse_scheme(scheme), Fp8) for scheme in recipe.used_schemes):
            notes.warn("vLLM refuses experts in fp8 with weights only (as of 0.32), and this model has experts; Transformers reads them")
        if (found := _unread_experts(recipe, experts, together, kind) or _fault(recipe, source)) is None:
            return recipe
        reason = f"Transformers {found}"
        if recipe.format != "auto":
            notes.warn(f"{reason}: it will not load this directory; --format native is read after import roundel")
            return recipe
    notes.warn(f"{reason}: written in the native format, which is read after import roundel")
    return dataclasses.replace(recipe, format="native")


def _check_joined(source: Source, form: str, notes: Notes) -> None:
    """vLLM runs some linears as one product (q, k, v; gate, up) and does not load a part of them quantized.

    Raises:
        SchemeError: a pattern has left a part of them out; where their shapes have, it is a warning.
    """
    for unit in fused_units(sorted(matrix_modules(source.model))).values():
        left = [name for name in unit if name not in source.linears]
        if not 0 < len(left) < len(unit):
            continue
        what = f"vLLM runs {', '.join(unit)} as one product, and in {form} reads all of them quantized or none; {left[0]} is left"
        reason = source.skipped.get(left[0], EXCLUDED)
        if reason == EXCLUDED:
            raise SchemeError(f"{what}: --include and --exclude all of them alike, or take --format native or dense")
        notes.warn(f"{what} ({reason})")


def _fault(recipe: Recipe, source: Source) -> str | None:
    """What happens when Transformers loads a compressed-tensors directory of this architecture (`models.readable`)."""
    nothing = torch.empty(0, dtype=torch.int8)
    packed = {
        name: RoundedWeight(scheme=recipe.used_schemes[0], codes=nothing, scales={}, shape=(linear.out_features, linear.in_features))
        for name, linear in source.linears.items()
    }
    others = sorted(matrix_modules(source.model) - packed.keys())
    fault = loading_fault(source.path, FORMATS["compressed-tensors"].config(packed, others))
    return None if fault is None else f"fails to load packed linears of {source.config.get('model_type')} ({fault})"


def _unread_experts(recipe: Recipe, experts: Mapping[str, SplitExperts], together: Sequence[str], kind: str | None) -> str | None:
    """What Transformers does not do with experts of a compressed-tensors directory, some of which are stored in one tensor `together`."""
    if not all(experts[name].sequential for name in together):
        return f"finds no experts of {kind} that are stored one by one"
    if experts and len(recipe.used_schemes) > 1:
        return "decodes all experts in one scheme"
    if any(0 < len([name for name in experts if experts[name] is own]) < len(parts_of(own)) for own in experts.values()):
        return "reads either all matrices of a layer's experts packed or none of them"
    unread = [scheme for scheme in recipe.used_schemes if not isinstance(parse_scheme(scheme), Uniform | Fp8)]
    return f"does not decode experts in {unread[0]}" if experts and unread else None
