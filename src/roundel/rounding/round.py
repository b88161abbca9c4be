"""The whole rounding of weights: scales, feedback, sweeps, first for some rows at a time, then for all.

Feedback decides an entry and never comes back; what it leaves is what all rows after it have to make up for. So rows are taken in blocks,
in the order of feedback, and each block is finished before the next one hears of it. With `H_out = L D L^T` a block `B` costs

    tr(E_B^T S E_B H_in) / 2,      S = L_BB D_B L_BB^T,      E_B = W_B + L_BB^-T (L_out[later, B]^T E_later) - W_hat_B

once the rows that are left take back what they can: the Schur complement of these. That is a rounding problem of its own, with the scales
searched for what is really rounded, feedback, refits and sweeps. On SmolLM2's linears this is 3 to 4 % of the proxy loss after
four sweeps over all (`docs/log.md`, 24). Cost: feedback; for `curved` and a refit of each block together two products with `H_in`, as in
one sweep; the block's sweeps read a row of `H_in` for each change.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from roundel.errors import SchemeError
from roundel.grids import parse_scheme
from roundel.grids.base import Grid, ScalarGrid, Scales, TileGrid
from roundel.rounding.descent import descend
from roundel.rounding.feedback import feedback
from roundel.rounding.scale import Refits
from roundel.rounding.state import State, in_16_bits, roughly_curved
from roundel.rounding.tiles import Coding, feedback_tiles, in_step, sweep_tiles
from roundel.types import RoundedWeight, RoundingProblem

__all__ = ["Start", "dequantized", "round_weight", "round_weights", "stacked"]

Result = TypeVar("Result")

ROWS = {"cpu": 128, "cuda": 1024}
"""Of a block. On a GPU blocks wait for each other, so there are few."""

SWEEPS, REFITTED = 4, (1,)
"""Of a block of rows, and before which of them scales are refitted, which costs more than they do."""

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

    For each block of rows scales are searched with `D_in` as weights, two-sided feedback gives the first codes, and sweeps refit the scales
    and revisit every code; then at most `sweeps` of these go over the whole weight. The loss before them and after each is recorded in
    `trace` and never rises. Without sweeps it is feedback alone, with scales searched for the weight as it is.
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
    refits = start is None or start.refits
    H_in = in_16_bits(problem)
    if sweeps and isinstance(grid, ScalarGrid):
        state = yield from _by_rows(problem, grid, scale_dtype, kept, refits=refits, H_in=H_in)
    else:
        scales = grid.fit_scales(problem.W, problem.D_in, scale_dtype) if kept is None else kept
        state = State.of(problem, grid, scales, (yield from _feedback(problem, grid, scales)))
    return (yield from _swept(problem, grid, sweeps, state, refitted=range(sweeps if refits else 0), H_in=H_in))


def _by_rows(
    problem: RoundingProblem, grid: Grid, scale_dtype: torch.dtype, kept: Scales | None, *, refits: bool, H_in: Tensor | None
) -> Coding[State]:
    """The first codes, one block of rows after the other, the last in the order of decisions first.

    Scales that are not of a row by itself are those of the whole weight, and stay as they are.
    """
    W, (d_out, d_in) = problem.W, problem.shape
    rows, columns = problem.order or (torch.arange(d_out, device=W.device), None)
    few = W[:2]
    found = grid.fit_scales(few, problem.D_in, scale_dtype)
    own = {name for name, scale in found.items() if len(scale) == len(few)}  # scales of a row by itself
    whole = grid.fit_scales(W, problem.D_in, scale_dtype) if kept is None and len(own) < len(found) else kept or {}
    shared = {name: scale for name, scale in whole.items() if name not in own}
    parts = grid.parts(torch.zeros(few.shape, dtype=torch.int8, device=W.device), found, (len(few), d_in), W.dtype)
    refitted = REFITTED if refits and own.issuperset(parts) else ()
    W_ordered, D_out = W[rows], problem.D_out[rows]
    fed = torch.zeros_like(W)  # L_out[later]^T E_later, in the order of decisions
    size = ROWS.get(W.device.type, d_out)
    done: list[RoundedWeight] = []
    for stop in range(d_out, 0, -size):
        first = max(0, stop - size)
        block = slice(first, stop)
        L = problem.L_out[block, block].contiguous()
        part = dataclasses.replace(
            problem,
            W=W_ordered[block] + torch.linalg.solve_triangular(L.T, fed[block], upper=True, unitriangular=True),
            H_out=(L * D_out[block]) @ L.T,
            L_out=L,
            D_out=D_out[block],
            order=None if columns is None else (torch.arange(stop - first, device=W.device), columns),
        )
        if kept is not None:
            scales: Scales = {name: scale[rows[block]] if name in own else scale for name, scale in kept.items()}
        else:
            scales = grid.fit_rows(part.W, part.D_in, scale_dtype, shared) if own else shared
        codes = yield from _feedback(part, grid, scales)
        rounded = yield from _swept(part, grid, SWEEPS, State.of(part, grid, scales, codes, H_in), refitted=refitted, H_in=H_in)
        fed[:first] += problem.L_out[block, :first].T @ (W_ordered[block] - dequantized(rounded, W.dtype))
        done.insert(0, rounded)
    codes = torch.cat([each.codes for each in done])
    found = {name: torch.cat([each.scales[name] for each in done]) if name in own else scale for name, scale in done[0].scales.items()}
    if problem.order is not None:
        place = rows.argsort()
        codes, found = codes[place], {name: scale[place] if name in own else scale for name, scale in found.items()}
    return State.of(problem, grid, found, codes)


def _going_on(problem: RoundingProblem, grid: Grid, sweeps: int, start: Start) -> Coding[RoundedWeight]:
    """From codes and scales that are there."""
    state = State.of(problem, grid, start.scales, start.codes)
    return (yield from _swept(problem, grid, sweeps, state, refitted=range(sweeps if start.refits else 0), H_in=in_16_bits(problem)))


def _swept(
    problem: RoundingProblem, grid: Grid, sweeps: int, state: State, *, refitted: Container[int], H_in: Tensor | None
) -> Coding[RoundedWeight]:
    """Sweeps from a state on, with scales refitted before those of these numbers; `H_in` as `state.in_16_bits` has it."""
    refits = Refits(problem, grid, roughly_curved(problem, H_in))
    trace = [state.loss]
    for done in range(sweeps):
        swept = yield from _sweep(problem, grid, refits.refit(state) if done in refitted else state)
        loss = swept.loss
        if loss >= trace[-1]:  # converged, to the precision of the sums
            break
        state = swept
        trace.append(loss)
        if loss > (1 - LEAST_GAIN) * trace[-2]:
            break
    return RoundedWeight(scheme=grid.name, codes=state.codes, scales=dict(state.scales), shape=problem.shape, trace=tuple(trace))


def _ended(loop: Coding[Result]) -> Result:
    """The result of a loop that has no tiles to code."""
    try:
        next(loop)
    except StopIteration as stop:
        result: Result = stop.value
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
    W_hat = parse_scheme(rounded.scheme).dequantize(rounded.codes, rounded.scales, rounded.rotated_shape, dtype)
    return W_hat if rounded.rotation is None else rounded.rotation.restore_weight(W_hat)
