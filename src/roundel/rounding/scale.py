"""Scales refitted to the codes: the exact quadratic in all scales of a weight at once.

Problem: after rounding, the codes are fixed and `W_hat = sum_name spread(scale_name) * part_name` is linear in the scales (`Grid.parts`:
one kind for integers, two for blocks with minima). The proxy loss is a positive quadratic in them, coupled over rows by `H_out` and over
columns by `H_in`. Two steps of conjugate gradients preconditioned with the diagonal, for a block with parts `Q` that is
`sum_ii' sum_jj' H_out,ii' Q_ij H_in,jj' Q_i'j'`: each step costs two products like one sweep. Four refits of two steps, with sweeps between
them, lose .1 % more of the proxy loss than four of six, and six sweeps with two lose 1 % less than four with six; scales and minima of
k-quants lose 3.5 % more with two, so they take six (`docs/log.md`, 22).
The result is put into its stored form and *accepted only if the loss falls*. Products are rough (`state`), the error that is left after
them is exact.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from roundel.grids.base import Grid, Scales, gather, spread
from roundel.rounding.state import State, roughly_curved
from roundel.types import RoundingProblem

__all__ = ["refit", "refit_scales"]

STEPS, STEPS_OF_TWO = 2, 6
"""Of one kind of scales, and of scales with minima, which are badly conditioned together."""


def refit_scales(problem: RoundingProblem, grid: Grid, scales: Scales, codes: Tensor, *, steps: int | None = None) -> dict[str, Tensor]:
    """New scales, of the same form, whose proxy loss with `codes` is not higher than that of `scales`."""
    return dict(refit(problem, grid, State.of(problem, grid, scales, codes), roughly_curved(problem), steps=steps).scales)


def refit(problem: RoundingProblem, grid: Grid, state: State, curved_of: Callable[[Tensor], Tensor], *, steps: int | None = None) -> State:
    """The same codes with scales that lose no more; `curved_of` multiplies with the factors, perhaps roughly."""
    W, scales = problem.W, state.scales
    parts = grid.parts(state.codes, scales, problem.shape, W.dtype)
    if not parts:
        return state
    steps = steps or (STEPS if len(parts) == 1 else STEPS_OF_TWO)
    start = [scales[name].to(W.dtype) for name in parts]

    def values(of: list[Tensor]) -> Tensor:
        first, *others = (_times(part, each) for each, part in zip(of, parts.values(), strict=True))
        return sum(others, first)

    def gathered(matrix: Tensor) -> list[Tensor]:
        return [gather(matrix * part, *scales[name].shape) for name, part in parts.items()]

    def inner(a: list[Tensor], b: list[Tensor]) -> Tensor:
        return sum(((x * y).sum() for x, y in zip(a, b, strict=True)), torch.zeros((), dtype=W.dtype, device=W.device))

    residual = gathered(state.curved)
    inverse = [torch.where(d > 0, 1 / d, 0.0) for d in (_diagonal(problem, part, scales[name].shape) for name, part in parts.items())]
    correction = [torch.zeros_like(each) for each in start]
    direction = [i * r for i, r in zip(inverse, residual, strict=True)]
    energy = inner(residual, direction)
    for step in range(steps):
        if not energy > 0:
            break
        curved = gathered(curved_of(values(direction)))
        length = energy / inner(direction, curved)
        correction = [c + length * d for c, d in zip(correction, direction, strict=True)]
        if step == steps - 1:
            break
        residual = [r - length * c for r, c in zip(residual, curved, strict=True)]
        scaled = [i * r for i, r in zip(inverse, residual, strict=True)]
        following = inner(residual, scaled)
        direction = [s + (following / energy) * d for s, d in zip(scaled, direction, strict=True)]
        energy = following
    wanted = [torch.where(torch.isfinite(s + c), s + c, s) for s, c in zip(start, correction, strict=True)]
    fitted = {**scales, **{name: grid.stored(name, value, scales[name]) for name, value in zip(parts, wanted, strict=True)}}
    E = W - grid.dequantize(state.codes, fitted, problem.shape, W.dtype)
    refitted = State(codes=state.codes, scales=fitted, E=E, curved=state.curved + curved_of(E - state.E))
    return refitted if refitted.loss < state.loss else state


def _times(part: Float[Tensor, "d_out d_in"], scale: Float[Tensor, "rows columns"]) -> Float[Tensor, "d_out d_in"]:
    """`part` times a scale for each of its blocks."""
    if len(scale) != len(part):
        return spread(scale, (part.shape[0], part.shape[1])) * part
    product: Tensor = part.unflatten(1, (scale.shape[1], -1)) * scale[:, :, None]
    return product.flatten(1)


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
