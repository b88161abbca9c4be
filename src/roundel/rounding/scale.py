"""Scales refitted to the codes: the exact quadratic in all scales of a weight at once.

Problem: after rounding, the codes are fixed and `W_hat = S * Q` is linear in the scales `(d_out, groups)`. The proxy loss is a positive
quadratic in them, coupled over rows by `H_out` and over groups by `H_in`. Solved by conjugate gradients preconditioned with the diagonal
`H_out,ii q_g^T H_in,gg q_g`: each step costs two products like one sweep, and a handful is enough because the step is a correction. The
result is rounded to the stored type and *accepted only if the loss falls*.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from roundel.grids.base import Grid
from roundel.grids.uniform import storable
from roundel.types import RoundingProblem

__all__ = ["refit_scales"]


def refit_scales(
    problem: RoundingProblem,
    grid: Grid,
    scales: Float[Tensor, "d_out groups"],
    codes: Int[Tensor, "d_out d_in"],
    *,
    steps: int = 6,
) -> Float[Tensor, "d_out groups"]:
    """New scales, of the same type, whose proxy loss with `codes` is not higher than that of `scales`.

    Only for grids in which a value is proportional to its scale (all of today's).
    """
    W, H_out, H_in = problem.W, problem.H_out, problem.H_in
    d_in = W.shape[1]
    unit = grid.decode(codes, torch.ones_like(W))

    def values(of: Tensor) -> Tensor:
        return grid.expand(of, d_in) * unit

    def gathered(matrix: Tensor) -> Tensor:
        summed: Tensor = (matrix * unit).unflatten(1, (scales.shape[1], -1)).sum(-1)
        return summed

    start = scales.to(W.dtype)
    E = W - values(start)
    residual = gathered(H_out @ E @ H_in)
    size = grid.group_size(d_in)
    blocks = torch.stack([H_in[k : k + size, k : k + size] for k in range(0, d_in, size)])
    grouped = unit.unflatten(1, (-1, size))
    diagonal = torch.einsum("igk,gkl,igl->ig", grouped, blocks, grouped) * H_out.diagonal()[:, None]
    inverse = torch.where(diagonal > 0, 1 / diagonal, 0.0)
    correction = torch.zeros_like(start)
    direction = inverse * residual
    energy = (residual * direction).sum()
    for _ in range(steps):
        if not energy > 0:
            break
        curved = gathered(H_out @ values(direction) @ H_in)
        length = energy / (direction * curved).sum()
        correction += length * direction
        residual = residual - length * curved
        scaled = inverse * residual
        following = (residual * scaled).sum()
        direction = scaled + (following / energy) * direction
        energy = following
    wanted = start + correction
    fitted = storable(torch.where(torch.isfinite(wanted), wanted, start), scales.dtype)
    before, after = problem.loss(E), problem.loss(W - values(fitted.to(W.dtype)))
    return fitted if after < before else scales
