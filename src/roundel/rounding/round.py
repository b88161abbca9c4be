"""The whole rounding of weights: scales, feedback, sweeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from roundel.errors import SchemeError
from roundel.grids import parse_scheme
from roundel.grids.base import Grid, ScalarGrid, Scales, TileGrid
from roundel.rounding.descent import descend
from roundel.rounding.feedback import feedback
from roundel.rounding.scale import Refits
from roundel.rounding.state import State, roughly_curved
from roundel.rounding.tiles import Coding, feedback_tiles, in_step, sweep_tiles
from roundel.types import RoundedWeight, RoundingProblem

__all__ = ["Start", "dequantized", "round_weight", "round_weights", "stacked"]

LEAST_GAIN = 1e-3
"""Sweeps end when one lowers the loss by less than this part of it."""


def round_weight(problem: RoundingProblem, grid: Grid, *, sweeps: int, scale_dtype: torch.dtype) -> RoundedWeight:
    """Rounds `problem.W` to `grid`; see `round_weights`."""
    return round_weights([problem], grid, sweeps=sweeps, scale_dtypes=[scale_dtype])[0]


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a weight is rounded to already."""

    codes: Tensor
    scales: Scales
    searches: bool = True
    """Whether scales may be searched anew."""
    refits: bool = True
    """Whether they may change at all."""


def round_weights(
    problems: Sequence[RoundingProblem],
    grid: Grid,
    *,
    sweeps: int,
    scale_dtypes: Sequence[torch.dtype],
    starts: Sequence[Start | None] = (),
) -> list[RoundedWeight]:
    """Rounds several weights, each as if alone; grids of tiles code one wave of all of them at once.

    Scales are searched with `D_in` as weights, then two-sided feedback gives the first codes, then each of at most
    `sweeps` rounds refits the scales and revisits every code. The loss after each is recorded in `trace` and never rises.
    Where there are `starts` the same is also tried from these, and what loses less is taken.
    """
    starts = starts or [None] * len(problems)
    loops = [_rounding(problem, grid, sweeps, dtype, start) for problem, dtype, start in zip(problems, scale_dtypes, starts, strict=True)]
    again = [index for index, start in enumerate(starts) if start is not None]
    loops += [_going_on(problems[index], grid, sweeps, start) for index in again if (start := starts[index]) is not None]
    found = in_step(loops, grid) if isinstance(grid, TileGrid) else [_ended(loop) for loop in loops]
    results = found[: len(problems)]
    for index, other in zip(again, found[len(problems) :], strict=True):
        if other.trace[-1] <= results[index].trace[-1]:
            results[index] = other
    return results


def _rounding(problem: RoundingProblem, grid: Grid, sweeps: int, scale_dtype: torch.dtype, start: Start | None) -> Coding[RoundedWeight]:
    kept = None if start is None or start.searches else start.scales
    scales: Scales = grid.fit_scales(problem.W, problem.D_in, scale_dtype) if kept is None else kept
    codes = yield from _feedback(problem, grid, scales)
    return (yield from _swept(problem, grid, sweeps, State.of(problem, grid, scales, codes), refits=start is None or start.refits))


def _going_on(problem: RoundingProblem, grid: Grid, sweeps: int, start: Start) -> Coding[RoundedWeight]:
    """From codes and scales that are there."""
    state = State.of(problem, grid, start.scales, start.codes)
    return (yield from _swept(problem, grid, sweeps, state, refits=start.refits))


def _swept(problem: RoundingProblem, grid: Grid, sweeps: int, state: State, *, refits: bool) -> Coding[RoundedWeight]:
    """Sweeps from a state on."""
    fit = Refits(problem, grid, roughly_curved(problem)).refit if refits else _unchanged
    trace = [state.loss]
    for _ in range(sweeps):
        swept = yield from _sweep(problem, grid, fit(state))
        loss = swept.loss
        if loss >= trace[-1]:  # converged, to the precision of the sums
            break
        state = swept
        trace.append(loss)
        if loss > (1 - LEAST_GAIN) * trace[-2]:
            break
    return RoundedWeight(scheme=grid.name, codes=state.codes, scales=dict(state.scales), shape=problem.shape, trace=tuple(trace))


def _unchanged(state: State) -> State:
    return state


def _ended(loop: Coding[RoundedWeight]) -> RoundedWeight:
    """The result of a loop that has no tiles to code."""
    try:
        next(loop)
    except StopIteration as stop:
        result: RoundedWeight = stop.value
        return result
    raise AssertionError("grids of scalars code nothing together")


def _feedback(problem: RoundingProblem, grid: Grid, scales: Scales) -> Coding[Tensor]:
    if isinstance(grid, TileGrid):
        return (yield from feedback_tiles(problem, grid, scales))
    assert isinstance(grid, ScalarGrid)
    return feedback(problem, grid, scales)


def _sweep(problem: RoundingProblem, grid: Grid, state: State) -> Coding[State]:
    if isinstance(grid, TileGrid):
        return State.of(problem, grid, state.scales, (yield from sweep_tiles(problem, grid, state.scales, state.codes)))
    assert isinstance(grid, ScalarGrid)
    return descend(problem, grid, state)


def stacked(parts: list[RoundedWeight]) -> RoundedWeight:
    """Groups of consecutive rows, rounded by themselves, as one weight; `trace` is the sum of theirs.

    Raises:
        SchemeError: the grid stores something for the whole weight, or it was rotated: groups would not agree on it.
    """
    if len(parts) == 1:
        return parts[0]
    if any(part.rotation or any(len(scale) != part.shape[0] for scale in part.scales.values()) for part in parts):
        raise SchemeError("groups of rows with curvature of their own need scales for each row and no rotation; take another curvature")
    longest = max(len(part.trace) for part in parts)
    traces = [part.trace + part.trace[-1:] * (longest - len(part.trace)) for part in parts]
    return RoundedWeight(
        scheme=parts[0].scheme,
        codes=torch.cat([part.codes for part in parts]),
        scales={name: torch.cat([part.scales[name] for part in parts]) for name in parts[0].scales},
        shape=(sum(part.shape[0] for part in parts), parts[0].shape[1]),
        trace=tuple(map(sum, zip(*traces, strict=True))),
    )


def dequantized(rounded: RoundedWeight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """`W_hat`, `(d_out, d_in)`, in `dtype`."""
    W_hat = parse_scheme(rounded.scheme).dequantize(rounded.codes, rounded.scales, rounded.shape, dtype)
    return W_hat if rounded.rotation is None else rounded.rotation.restore_weight(W_hat)
