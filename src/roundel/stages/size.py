"""From the size that a written model may have to the bits of its linears: `--target-size`.

What is not a linear of the decoder layers takes what it takes (embedding and head as the recipe says); the rest of the size, over the
linears' weights, is the average that `--bits` allocates.
"""

from __future__ import annotations

import dataclasses

from roundel.artifacts.source import Source
from roundel.errors import SchemeError
from roundel.recipes import MOST_BITS, Recipe, size_in_bytes
from roundel.stages.ends import schemes_of_ends
from roundel.stages.writing import size_without

__all__ = ["with_bits_for_size"]

LEAST_BITS = 1.0
TURNS = 4
"""What stands for embedding and head may depend on the bits of the linears, and they on its size."""


def with_bits_for_size(recipe: Recipe, source: Source) -> Recipe:
    """The recipe, with the bits that its target size leaves, if it has one.

    Raises:
        SchemeError: it is smaller than all that is not quantized.
    """
    if recipe.target_size is None:
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
    return found
