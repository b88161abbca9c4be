"""Scales refitted to the codes: the exact quadratic in all scales of a weight at once.

Problem: after rounding, the codes are fixed and `W_hat = sum_name spread(scale_name) * part_name` is linear in the scales (`Grid.parts`:
one kind for integers, two for blocks with minima). The proxy loss is a positive quadratic in them, coupled over rows by `H_out` and over
columns by `H_in`. Solved by conjugate gradients preconditioned with the diagonal, for a block with parts `Q` that is
`sum_ii' sum_jj' H_out,ii' Q_ij H_in,jj' Q_i'j'`: each step costs two products like one sweep, formed in bfloat16 where the CPU has it
(`linalg.fast`), and a handful is enough because the step is a correction. The result is put into its stored form and *accepted only if the
loss falls*.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from roundel.grids.base import Grid, Scales, gather, spread
from roundel.linalg.fast import fast_products
from roundel.types import RoundingProblem

__all__ = ["refit_scales"]


def refit_scales(problem: RoundingProblem, grid: Grid, scales: Scales, codes: Tensor, *, steps: int = 6) -> dict[str, Tensor]:
    """New scales, of the same form, whose proxy loss with `codes` is not higher than that of `scales`."""
    W, H_out, H_in = problem.W, problem.H_out, problem.H_in
    parts = grid.parts(codes, scales, problem.shape, W.dtype)
    if not parts:
        return dict(scales)
    start = [scales[name].to(W.dtype) for name in parts]

    def values(of: list[Tensor]) -> Tensor:
        return sum((spread(each, problem.shape) * part for each, part in zip(of, parts.values(), strict=True)), torch.zeros_like(W))

    def gathered(matrix: Tensor) -> list[Tensor]:
        return [gather(matrix * part, *scales[name].shape) for name, part in parts.items()]

    def inner(a: list[Tensor], b: list[Tensor]) -> Tensor:
        return sum(((x * y).sum() for x, y in zip(a, b, strict=True)), torch.zeros((), dtype=W.dtype, device=W.device))

    E = W - grid.dequantize(codes, scales, problem.shape, W.dtype)
    curved_error = H_out @ E @ H_in
    before = problem.loss(E, curved_error)
    residual = gathered(curved_error)
    inverse = [torch.where(d > 0, 1 / d, 0.0) for d in (_diagonal(problem, part, scales[name].shape) for name, part in parts.items())]
    correction = [torch.zeros_like(each) for each in start]
    direction = [i * r for i, r in zip(inverse, residual, strict=True)]
    energy = inner(residual, direction)
    for _ in range(steps):
        if not energy > 0:
            break
        with fast_products(W.device):
            curved = gathered(H_out @ values(direction) @ H_in)
        length = energy / inner(direction, curved)
        correction = [c + length * d for c, d in zip(correction, direction, strict=True)]
        residual = [r - length * c for r, c in zip(residual, curved, strict=True)]
        scaled = [i * r for i, r in zip(inverse, residual, strict=True)]
        following = inner(residual, scaled)
        direction = [s + (following / energy) * d for s, d in zip(scaled, direction, strict=True)]
        energy = following
    wanted = [torch.where(torch.isfinite(s + c), s + c, s) for s, c in zip(start, correction, strict=True)]
    fitted = {**scales, **{name: grid.stored(name, value, scales[name]) for name, value in zip(parts, wanted, strict=True)}}
    after = problem.loss(W - grid.dequantize(codes, fitted, problem.shape, W.dtype))
    return fitted if after < before else dict(scales)


def _diagonal(problem: RoundingProblem, part: Float[Tensor, "d_out d_in"], scale_shape: torch.Size) -> Float[Tensor, "rows columns"]:
    """The quadratic's second derivative by each scale; for scales of several rows without what couples those."""
    H_out, H_in = problem.H_out, problem.H_in
    rows, columns = scale_shape
    d_in = part.shape[1]
    if columns == 1:
        by_row = ((part @ H_in) * part).sum(1, keepdim=True)
    else:
        size = d_in // columns
        blocks = torch.stack([H_in[k : k + size, k : k + size] for k in range(0, d_in, size)])
        grouped = part.unflatten(1, (-1, size))
        by_row = torch.einsum("igk,gkl,igl->ig", grouped, blocks, grouped)
    return gather(by_row * H_out.diagonal()[:, None], rows, columns)
