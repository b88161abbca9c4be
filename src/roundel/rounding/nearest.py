"""Nearest rounding: each entry by itself."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from roundel.grids.base import ScalarGrid, Scales

__all__ = ["nearest"]


def nearest(W: Float[Tensor, "d_out d_in"], grid: ScalarGrid, scales: Scales) -> Int[Tensor, "d_out d_in"]:
    """Codes of the representable values nearest to `W`."""
    return grid.encode(W, *grid.affine(scales, (W.shape[0], W.shape[1]), W.dtype))
