"""Nearest rounding: each entry, or each tile, by itself."""

from __future__ import annotations

from jaxtyping import Float, Integer
from torch import Tensor

from roundel.grids.base import Grid, ScalarGrid, Scales, TileGrid

__all__ = ["nearest"]


def nearest(W: Float[Tensor, "d_out d_in"], grid: Grid, scales: Scales) -> Integer[Tensor, "..."]:
    """Codes of the representable values nearest to `W`."""
    shape = W.shape[0], W.shape[1]
    if isinstance(grid, TileGrid):
        steps = grid.steps(scales, shape, W.dtype)
        codes: Tensor = grid.encode_tiles(grid.to_tiles(W) / steps.reshape(-1, 1)).unflatten(0, (len(steps), -1))
        return codes
    assert isinstance(grid, ScalarGrid)
    return grid.encode(W, *grid.affine(scales, shape, W.dtype))
