"""How many steps feedback really takes: the depth of its dependencies.

With `H = L D L^T`, the target of entry `i` waits for every later entry `j` with `L[j, i] != 0`. The longest chain of such waits is the
*structural nilpotence degree*

    snd(L) = min {k: N^k = 0},    N the 0/1 matrix with the support of L - I:

1 for `L = I`, `d` for a dense `L`. The fixed-point form of feedback, `W_hat <- Q(W + (L^T - I)(W - W_hat))`, has settled after `snd(L)`
steps from anywhere. For both sides of a weight, `snd(kron(A, B)) = snd(A) + snd(B) - 1`: the number of waves, each of entries that do
not wait for each other (`rounding.feedback`).

Cost: `d^2 / 2` comparisons, in `d` vectorised steps on the CPU. Reference: YAQA (Tseng, Sun, De Sa), arXiv 2505.22988.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["structural_nilpotence", "waves"]

TOLERANCE = 1e-9
"""Entries of a unit lower triangular factor up to this size are rounding errors of a factorisation in float64, not dependencies."""


def structural_nilpotence(L: Float[Tensor, "d d"], *, tile: int = 1, tolerance: float = TOLERANCE) -> int:
    """The number of nodes on the longest chain of entries that wait for each other, from 1 to `ceil(d / tile)`.

    Args:
        L: Unit lower triangular; only what is strictly below the diagonal is read.
        tile: So many consecutive entries are one node.
        tolerance: Entries up to this size are zeros.
    """
    support = _tiled((L.detach().abs() > tolerance).cpu(), tile).numpy()
    depth = np.ones(len(support), dtype=np.int64)
    for i in range(1, len(support)):
        depth[i] += np.max(depth[:i], where=support[i, :i], initial=0)
    return int(depth.max())


def waves(L_out: Float[Tensor, "d_out d_out"], L_in: Float[Tensor, "d_in d_in"], *, tile: int = 1, tolerance: float = TOLERANCE) -> int:
    """Steps of two-sided feedback, all tiles of `tile x tile` entries that wait for no other in one step."""
    return sum(structural_nilpotence(L, tile=tile, tolerance=tolerance) for L in (L_out, L_in)) - 1


def _tiled(support: Bool[Tensor, "d d"], tile: int) -> Bool[Tensor, "tiles tiles"]:
    """Which tiles have an entry."""
    tiles = -(-len(support) // tile)
    padded = torch.nn.functional.pad(support, (0, tiles * tile - len(support)) * 2)
    return padded.reshape(tiles, tile, tiles, tile).any(3).any(1)
