"""Grids: representable values and their coder. A grid sees no more of the curvature than one weight per column.

A new family is one file with a `Grid` and a `parse` function, and one entry in `_FAMILIES`.
"""

import functools

from roundel.errors import SchemeError
from roundel.grids import affine, asymmetric, blocks, codebooks, lattice, minifloat, trellis, uniform
from roundel.grids.base import Grid, ScalarGrid, Scales, TileGrid
from roundel.grids.uniform import Uniform

__all__ = ["Grid", "ScalarGrid", "Scales", "TileGrid", "Uniform", "parse_scheme"]

_FAMILIES = (uniform.parse, asymmetric.parse, affine.parse, minifloat.parse, blocks.parse, codebooks.parse, lattice.parse, trellis.parse)


@functools.cache
def parse_scheme(name: str) -> Grid:
    """The grid of a scheme's name, such as `int4-g128` or `int3-channel`.

    Raises:
        SchemeError: no family of grids knows the name.
    """
    for parse in _FAMILIES:
        grid = parse(name)
        if grid is not None:
            return grid
    raise SchemeError(f"unknown scheme {name!r}: expected intB-gN or intB-channel with B from 2 to 8 and a group size N, such as int4-g128")
