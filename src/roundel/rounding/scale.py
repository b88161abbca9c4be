"""Scales refitted to the codes: the exact quadratic in all scales of a weight at once.

Problem: after rounding, the codes are fixed and `W_hat = sum_name spread(scale_name) * part_name` is linear in the scales (`Grid.parts`:
one kind for integers, two for blocks with minima). The proxy loss is a positive quadratic in them, coupled over rows by `H_out` and over
columns by `H_in`: `sum_ii' sum_jj' H_out,ii' Q_ij H_in,jj' Q_i'j'` for two blocks with parts `Q`. Conjugate gradients go down it, in few
steps, since codes change and a refit follows after each sweep:

- The *systems of rows* precondition them: what couples up to 1024 columns' scales of one row, of all kinds together, formed and factorised
  once for a weight. With scales and minima it is what makes few steps enough: six with the diagonal alone lose more than two.
- A product is two of the weight's size with its factors, as much as a sweep's. The length of the last step is that of the refit before
  (at first, what some rows say), so that the scales can be *stored* before the product: one product then tells what the stored scales
  lose, rounding included, and how long the next last step should be. They are taken only if the loss falls, else with the length that
  would have been right once more, else not at all.
- The first direction of a refit is conjugate to the last of the refit before (Polak-Ribiere).

One step before each of four sweeps, four products in all, loses as much as two steps with the diagonal and exact lengths, in twelve
(`docs/log.md`, 22). Cost of the systems: `d_out d_in` times half of the columns of one, and a square for each; memory at most the weight's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from roundel.grids.base import Grid, Scales, gather, spread
from roundel.rounding.state import State, in_16_bits, roughly_curved
from roundel.types import RoundingProblem

__all__ = ["Refits", "refit_scales"]

STEPS, STEPS_OF_TWO = 1, 2
"""Of one kind of scales, and of scales with minima."""

SAMPLED = 16
"""Rows at least that the first length is found from."""

SYSTEM = 1024
"""Columns whose scales make one system."""

JITTER = 1e-4
"""Added to a system's diagonal, relative to it."""


def refit_scales(problem: RoundingProblem, grid: Grid, scales: Scales, codes: Tensor, *, steps: int | None = None) -> dict[str, Tensor]:
    """New scales, of the same form, whose proxy loss with `codes` is not higher than that of `scales`."""
    refits = Refits(problem, grid, roughly_curved(problem, in_16_bits(problem)), steps=steps)
    return dict(refits.refit(State.of(problem, grid, scales, codes)).scales)


@dataclass
class _Step:
    """The last one that was taken: gradient, what it was worth, direction, and the length that would have been right."""

    residual: list[Tensor]
    energy: Tensor
    direction: list[Tensor]
    length: float


class Refits:
    """One weight's refits, each of which goes on from the one before."""

    def __init__(self, problem: RoundingProblem, grid: Grid, curved_of: Callable[[Tensor], Tensor], *, steps: int | None = None) -> None:
        """`curved_of` multiplies with the factors, perhaps roughly; `steps` are those of a refit."""
        self._problem, self._grid, self._curved_of, self._steps = problem, grid, curved_of, steps
        self._solve: Callable[[list[Tensor]], list[Tensor]] | None = None
        self._before: _Step | None = None

    def refit(self, state: State) -> State:
        """The same codes with scales that lose no more."""
        W, scales, grid = self._problem.W, state.scales, self._grid
        parts = grid.parts(state.codes, scales, self._problem.shape, W.dtype)
        if not parts:
            return state
        start = [scales[name].to(W.dtype) for name in parts]
        found = self._correction(state, parts, start)
        if found is None:
            return state
        correction, self._before = found
        for _ in range(2):
            wanted = [torch.where(torch.isfinite(s + c), s + c, s) for s, c in zip(start, correction, strict=True)]
            fitted = {**scales, **{name: grid.stored(name, value, scales[name]) for name, value in zip(parts, wanted, strict=True)}}
            E = W - grid.dequantize(state.codes, fitted, self._problem.shape, W.dtype)
            change = E - state.E
            curved = self._curved_of(change)
            slope, bend = (torch.linalg.vecdot(matrix, change).double().sum().item() for matrix in (state.curved, curved))
            best = -slope / bend if bend > 0 else 0.0
            self._before.length *= min(max(best, 0.3), 2.0)
            if slope + 0.5 * bend < 0:
                return State(codes=state.codes, scales=fitted, E=E, curved=curved.add_(state.curved))
            if not 0 < best < 1:
                break
            correction = [best * each for each in correction]
        return state

    def _sampled(self, state: State, change: Tensor) -> float:
        """How far to go along a change of `W_hat`, as some of its rows say."""
        some = slice(None, None, max(1, len(change) // SAMPLED))
        curved = self._problem.H_out[some] @ change @ self._problem.H_in
        slope, bend = (torch.linalg.vecdot(matrix, change[some]).sum() for matrix in (state.curved[some], curved))
        return float(slope / bend)

    def _correction(self, state: State, parts: dict[str, Tensor], start: list[Tensor]) -> tuple[list[Tensor], _Step] | None:
        """What the scales should change by, and the last step of it; None: nothing."""
        shapes = [each.shape for each in start]
        of_rows = shapes[0][0] == self._problem.shape[0]  # else they are few, and worth an exact length

        def gathered(matrix: Tensor) -> list[Tensor]:
            return [gather(matrix * part, *shape) for part, shape in zip(parts.values(), shapes, strict=True)]

        def values(of: list[Tensor]) -> Tensor:
            first, *others = (_times(part, each) for each, part in zip(of, parts.values(), strict=True))
            return sum(others, first)

        if self._solve is None:
            self._solve = _systems(self._problem, list(parts.values()), shapes)
        solve, before = self._solve, self._before
        steps = self._steps or (STEPS if len(parts) == 1 else STEPS_OF_TWO)
        residual = gathered(state.curved)
        scaled = solve(residual)
        energy, direction = _inner(residual, scaled), scaled
        if before is not None:
            share = ((energy - _inner(before.residual, scaled)) / before.energy).clamp(0, 1)
            direction = [s + share * d for s, d in zip(scaled, before.direction, strict=True)]
        correction, last = [torch.zeros_like(each) for each in start], None
        for left in range(steps - 1, -1, -1):
            along = _inner(residual, direction)
            if not (energy > 0 and along > 0):
                break
            curved: list[Tensor] = []
            if left == 0 and of_rows and before is not None:
                length = before.length
            elif of_rows and steps == 1:
                length = self._sampled(state, values(direction))
            else:
                curved = gathered(self._curved_of(values(direction)))
                length = (along / _inner(direction, curved)).item()
            if not math.isfinite(length):
                break
            correction = [c + length * d for c, d in zip(correction, direction, strict=True)]
            last = _Step(residual=residual, energy=energy, direction=direction, length=length)
            if left:
                residual = [r - length * c for r, c in zip(residual, curved, strict=True)]
                scaled, worth = solve(residual), energy
                energy = _inner(residual, scaled)
                direction = [s + (energy / worth) * d for s, d in zip(scaled, direction, strict=True)]
        return None if last is None else (correction, last)


def _inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return sum(((x * y).sum() for x, y in zip(a, b, strict=True)), torch.zeros((), dtype=a[0].dtype, device=a[0].device))


def _times(part: Float[Tensor, "d_out d_in"], scale: Float[Tensor, "rows columns"]) -> Float[Tensor, "d_out d_in"]:
    """`part` times a scale for each of its blocks."""
    if len(scale) != len(part):
        return spread(scale, (part.shape[0], part.shape[1])) * part
    product: Tensor = part.unflatten(1, (scale.shape[1], -1)) * scale[:, :, None]
    return product.flatten(1)


def _systems(problem: RoundingProblem, parts: list[Tensor], shapes: list[torch.Size]) -> Callable[[list[Tensor]], list[Tensor]]:
    """Solves, for the scales of each row, a block of the quadratic's second derivatives after the other.

    A block is left with its diagonal where it is not positive definite. Scales of several rows are solved for with what is on the diagonal
    of `H_out` alone, as if each row had its own.
    """
    (d_out, d_in), (rows, columns) = problem.shape, shapes[0]
    size, kinds = d_in // columns, len(parts)
    together = 1 if rows != d_out else max(1, min(SYSTEM // size, size))
    weights = problem.H_out.diagonal()
    lowers = []
    for first in range(0, columns, together):
        own, count = slice(first * size, (first + together) * size), min(together, columns - first)
        H, mine = problem.H_in[own, own], [part[:, own] for part in parts]
        system = torch.empty((rows, kinds, count, kinds, count), dtype=problem.W.dtype, device=problem.W.device)
        for k in range(count):
            here, rest = slice(k * size, (k + 1) * size), slice(k * size, None)
            for a, part in enumerate(mine):
                product = part[:, here] @ H[here, rest]
                for b, other in enumerate(mine):
                    coupled = gather(product * other[:, rest] * weights[:, None], rows, count - k)
                    system[:, a, k, b, k:] = coupled
                    system[:, b, k:, a, k] = coupled
        system = system.flatten(3).flatten(1, 2)
        diagonal = system.diagonal(dim1=1, dim2=2)
        diagonal.mul_(1 + JITTER).masked_fill_(diagonal <= 0, 1)  # a block of zeros, which has no gradient either
        lower, failed = torch.linalg.cholesky_ex(system)
        lowers.append(torch.where(failed[:, None, None] != 0, diagonal.sqrt().diag_embed(), lower))
    return lambda of: _solved(of, lowers, together)


def _solved(of: list[Tensor], lowers: list[Tensor], together: int) -> list[Tensor]:
    results = [torch.empty_like(each) for each in of]
    for index, lower in enumerate(lowers):
        own = slice(index * together, (index + 1) * together)
        found = torch.cholesky_solve(torch.cat([each[:, own] for each in of], dim=1)[:, :, None], lower)[:, :, 0]
        for result, value in zip(results, found.chunk(len(of), dim=1), strict=True):
            result[:, own] = value
    return results
