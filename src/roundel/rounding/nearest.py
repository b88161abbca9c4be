"""Nearest rounding: each entry by itself."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from roundel.grids.base import Grid

__all__ = ["nearest"]


def nearest(W: Float[Tensor, "d_out d_in"], grid: Grid, scales: Float[Tensor, "d_out groups"]) -> Int[Tensor, "d_out d_in"]:
    """Codes of the representable values nearest to `W`."""
    return grid.encode(W, grid.expand(scales, W.shape[1]).to(W.dtype))
