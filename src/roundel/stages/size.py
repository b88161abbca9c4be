"""From the size that a written model may have to the bits of its linears: `--target-size`.

What is not a linear of the decoder layers takes what it takes (embedding and head as the recipe says); the rest of the size, over the
linears' weights, is the average that `--bits` allocates.
"""

from __future__ import annotations

import dataclasses
from collections import Counter

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
TURNS = 4
"""What stands for embedding and head may depend on the bits of the linears, and they on its size."""


def with_bits_for_size(recipe: Recipe, source: Source) -> Recipe:
    """The recipe, with the bits that its target size leaves, if it has one; checked before the work.

    Raises:
        SchemeError: that, or the bits that are asked for, are fewer than the smallest schemes take.
    """
    if recipe.bits is None:
        return recipe
    if recipe.target_size is None:
        _check(recipe, source)
        return recipe
    target = size_in_bytes(recipe.target_size)
    weights = sum(linear.weight.numel() for linear in source.linears.values())
    found, known = recipe, None
    for _ in range(TURNS):
        ends = {name: scheme for name, (_, scheme) in schemes_of_ends(found, source).items()}
        if ends == known:
            break
        rest, known = size_without(found, source, ends), ends
        bits = 8 * (target - rest) / weights
        if bits < LEAST_BITS:
            raise SchemeError(
                f"--target-size {recipe.target_size}: all but the decoder layers' linears takes {rest / 1e6:.1f} MB already; ask for more, "
                "or for fewer bits of embedding and head (--embedding, --head)"
            )
        found = dataclasses.replace(recipe, bits=min(bits, MOST_BITS))
    _check(found, source)
    return found


def _check(recipe: Recipe, source: Source) -> None:
    """Refuses fewer bits than the smallest schemes take, before the work."""
    assert recipe.bits is not None
    shapes = Counter(linear.weight.shape for linear in source.linears.values())
    least = 0
    for shape, count in shapes.items():
        W = torch.empty(shape, dtype=torch.float16, device="meta")
        schemes = {recipe.fitting(scheme, shape[1]) for scheme in recipe.candidate_schemes()}
        least += count * min(stored_bits(recipe, parse_scheme(scheme), W) for scheme in schemes)
    weights = sum(shape.numel() * count for shape, count in shapes.items())
    if least > recipe.bits * weights + 1:
        wanted = f"{recipe.bits:.3f} bits a weight" + (f", which --target-size {recipe.target_size} leaves," if recipe.target_size else "")
        raise SchemeError(
            f"{wanted} are fewer than the smallest schemes take, {least / weights:.3f}: ask for more bits or smaller schemes (--schemes)"
        )
