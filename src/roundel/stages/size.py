"""From the size that a written model may have to the bits of its weights: `--target-size`.

Linears, and embedding and head where nothing was said of them, share what the rest leaves of the size: over their weights an average, which
`stages.rounding.allocation` keeps.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from roundel.artifacts.source import Source
from roundel.errors import SchemeError
from roundel.grids import parse_scheme
from roundel.recipes import MOST_BITS, Recipe, size_in_bytes
from roundel.stages.ends import schemes_of_ends
from roundel.stages.linears import stored_bits
from roundel.stages.writing import size_without

__all__ = ["with_bits_for_size"]

LEAST_BITS = 1.0


def with_bits_for_size(recipe: Recipe, source: Source) -> Recipe:
    """The recipe, with the bits that its target size leaves, if it has one; checked before the work.

    Raises:
        SchemeError: that, or the bits that are asked for, are fewer than the smallest schemes take.
    """
    if recipe.bits is None:
        return recipe
    if recipe.target_size is None:
        _check(recipe, source, {})
        return recipe
    ends = {name: schemes for name, (_, schemes) in schemes_of_ends(recipe, source).items()}
    free = {name: ends.pop(name) for name, schemes in [*ends.items()] if len(schemes) > 1}
    names = [*source.linears, *free]
    rest = size_without(recipe, source, names, {name: scheme for name, (scheme,) in ends.items()})
    weights = sum(source.model.get_parameter(f"{name}.weight").numel() for name in names)
    bits = 8 * (size_in_bytes(recipe.target_size) - rest) / weights
    if bits < LEAST_BITS:
        raise SchemeError(
            f"--target-size {recipe.target_size}: all that has no bits to choose takes {rest / 1e6:.1f} MB already; ask for more, "
            "or for fewer bits of embedding and head (--embedding, --head)"
        )
    found = dataclasses.replace(recipe, bits=min(bits, MOST_BITS))
    _check(found, source, free)
    return found


def _check(recipe: Recipe, source: Source, ends: Mapping[str, Sequence[str]]) -> None:
    """Refuses fewer bits than the smallest schemes take, before the work."""
    assert recipe.bits is not None
    kinds = Counter((linear.weight.shape, recipe.candidate_schemes()) for linear in source.linears.values())
    kinds += Counter((source.model.get_parameter(f"{name}.weight").shape, tuple(schemes)) for name, schemes in ends.items())
    least = 0
    for (shape, schemes), count in kinds.items():
        W = torch.empty(shape, dtype=torch.float16, device="meta")
        fitting = {recipe.fitting(scheme, shape[1]) for scheme in schemes}
        least += count * min(stored_bits(recipe, parse_scheme(scheme), W) for scheme in fitting)
    weights = sum(shape.numel() * count for (shape, _), count in kinds.items())
    if least > recipe.bits * weights + 1:
        wanted = f"{recipe.bits:.3f} bits a weight" + (f", which --target-size {recipe.target_size} leaves," if recipe.target_size else "")
        raise SchemeError(
            f"{wanted} are fewer than the smallest schemes take, {least / weights:.3f}: ask for more bits or smaller schemes (--schemes)"
        )
