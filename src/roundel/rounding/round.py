"""The whole rounding of one weight: scales, feedback, sweeps."""

from __future__ import annotations

import torch

from roundel.grids.base import Grid
from roundel.rounding.descent import sweep
from roundel.rounding.feedback import feedback
from roundel.rounding.scale import refit_scales
from roundel.types import RoundedWeight, RoundingProblem

__all__ = ["dequantized", "round_weight", "stacked"]


def round_weight(problem: RoundingProblem, grid: Grid, *, sweeps: int, scale_dtype: torch.dtype) -> RoundedWeight:
    """Rounds `problem.W` to `grid`.

    Scales are searched with the diagonal of `H_in` as weights, then two-sided feedback gives the first codes, then each of `sweeps`
    rounds refits the scales and revisits every code. The loss after each is recorded in `trace` and never rises.
    """
    scales = grid.fit_scales(problem.W, problem.H_in.diagonal(), scale_dtype)
    codes = feedback(problem, grid, scales)
    rounded = RoundedWeight(codes=codes, scales=scales)
    trace = [_loss(problem, grid, rounded)]
    for _ in range(sweeps):
        scales = refit_scales(problem, grid, rounded.scales, rounded.codes)
        candidate = RoundedWeight(codes=sweep(problem, grid, scales, rounded.codes), scales=scales)
        loss = _loss(problem, grid, candidate)
        if loss >= trace[-1]:  # converged, to the precision of the sums
            break
        rounded = candidate
        trace.append(loss)
    return RoundedWeight(codes=rounded.codes, scales=rounded.scales, trace=tuple(trace))


def stacked(parts: list[RoundedWeight]) -> RoundedWeight:
    """Groups of consecutive rows, rounded by themselves, as one weight; `trace` is the sum of theirs."""
    if len(parts) == 1:
        return parts[0]
    longest = max(len(part.trace) for part in parts)
    traces = [part.trace + part.trace[-1:] * (longest - len(part.trace)) for part in parts]
    return RoundedWeight(
        codes=torch.cat([part.codes for part in parts]),
        scales=torch.cat([part.scales for part in parts]),
        trace=tuple(map(sum, zip(*traces, strict=True))),
    )


def dequantized(grid: Grid, rounded: RoundedWeight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """`W_hat`, `(d_out, d_in)`, in `dtype`."""
    return grid.decode(rounded.codes, grid.expand(rounded.scales.to(dtype), rounded.codes.shape[1]))


def _loss(problem: RoundingProblem, grid: Grid, rounded: RoundedWeight) -> float:
    return problem.loss(problem.W - dequantized(grid, rounded, problem.W.dtype))
