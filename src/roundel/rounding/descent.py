"""Coordinate descent on the codes after feedback.

Problem: feedback decides each entry once, before the entries it is fed to. Revisiting every entry with all others fixed can only lower
`loss = 1/2 tr(E^T H_out E H_in)`. Along entry `(i, j)` the loss is a parabola in `W_hat_ij` with its minimum at
`W_hat_ij + P_ij / (H_out,ii H_in,jj)`, `P = H_out E H_in`; the nearest representable value to it is the best there
is, and it is taken if the loss falls.

Keeping `R = E H_in` makes a row cost one product `H_out[i] R`, and an accepted change one row of `H_in`: a sweep is
O(d_out d_in (d_out + d_in)) at most, like the feedback, and less where few entries change and `P` is known before. The torch specification
below jumps from change to change; its twins in `kernels` visit the same entries in the same order: tile by tile, so that a row of `H_in` is
read once for all changes of a tile; on CPUs one tile after the other, on GPUs in waves of tiles that do not know of each other
(`kernels.waves`). No order is better than another (`docs/log.md`, 22).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from importlib.util import find_spec

import torch
from jaxtyping import Int
from torch import Tensor

from roundel.grids.base import ScalarGrid, Scales
from roundel.kernels import rounding as kernels
from roundel.kernels.waves import Waves
from roundel.rounding.state import State
from roundel.types import RoundingProblem

__all__ = ["descend", "sweep", "sweep_rows", "sweep_waves"]


def sweep(problem: RoundingProblem, grid: ScalarGrid, scales: Scales, codes: Int[Tensor, "d_out d_in"]) -> Int[Tensor, "d_out d_in"]:
    """One sweep over all entries; returns new codes whose proxy loss is not higher."""
    return _swept(problem, grid, scales, codes, None)[0]


def descend(problem: RoundingProblem, grid: ScalarGrid, state: State) -> State:
    """One sweep from a state to the next."""
    codes, curved = _swept(problem, grid, state.scales, state.codes, state.curved)
    if curved is None:
        return State.of(problem, grid, state.scales, codes)
    E = problem.W - grid.dequantize(codes, state.scales, problem.shape, problem.W.dtype)
    return State(codes=codes, scales=state.scales, E=E, curved=curved)


def _swept(
    problem: RoundingProblem, grid: ScalarGrid, scales: Scales, codes: Tensor, curved: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The codes, and `H_out E H_in` with them where it is known."""
    if problem.W.device.type == "cpu" or (problem.W.is_cuda and find_spec("triton")):
        step, offset = grid.affine(scales, problem.shape, problem.W.dtype)
        arguments = (problem.W, problem.H_out, problem.H_in, step, offset, grid.level_table(), *grid.code_range, codes)
        if problem.W.is_cuda:
            from roundel.kernels import triton_rounding  # an optional dependency

            return triton_rounding.sweep(*arguments), None
        return kernels.sweep(*arguments, curved)
    return sweep_rows(problem, grid, scales, codes), None


def sweep_rows(
    problem: RoundingProblem, grid: ScalarGrid, scales: Scales, codes: Int[Tensor, "d_out d_in"], *, tile: tuple[int, int] = kernels.TILE
) -> Int[Tensor, "d_out d_in"]:
    """The specification on CPUs: tiles from top to bottom, in each block of rows from left to right; in a tile row by row."""
    tiles = _Tiles(problem, grid, scales, codes, tile)
    for row, column in itertools.product(range(tiles.down), range(tiles.across)):
        tiles.change([(row, column)])
    return tiles.codes


def sweep_waves(
    problem: RoundingProblem, grid: ScalarGrid, scales: Scales, codes: Int[Tensor, "d_out d_in"], *, tile: tuple[int, int]
) -> Int[Tensor, "d_out d_in"]:
    """The specification on GPUs: all tiles of a wave from the same `P`, and taken if together they lower the loss."""
    tiles = _Tiles(problem, grid, scales, codes, tile)
    waves = Waves(tiles.down, tiles.across)
    while wave := waves.next():
        before = tiles.codes.clone(), tiles.W_hat.clone(), tiles.R.clone()
        if not waves.took(*tiles.change(wave)):
            tiles.codes, tiles.W_hat, tiles.R = before
    return tiles.codes


class _Tiles:
    """A weight on its way through a sweep, `R = E H_in` kept."""

    def __init__(self, problem: RoundingProblem, grid: ScalarGrid, scales: Scales, codes: Tensor, tile: tuple[int, int]) -> None:
        self.problem, self.grid, self.tile = problem, grid, tile
        self.down, self.across = (-(-size // part) for size, part in zip(problem.shape, tile, strict=True))
        self.step, self.offset = grid.affine(scales, problem.shape, problem.W.dtype)
        self.codes = codes.clone()
        self.W_hat = grid.decode(self.codes, self.step, self.offset)
        self.R = (problem.W - self.W_hat) @ problem.H_in

    def change(self, wave: Sequence[tuple[int, int]]) -> tuple[float, float]:
        """Descends in each of these tiles; by how much the loss falls, and by how much for each alone, summed."""
        H_out, H_in = self.problem.H_out, self.problem.H_in
        moved, hoped, changed = torch.zeros_like(self.R), 0.0, []
        for i, j in wave:
            rows, columns = (slice(at * size, (at + 1) * size) for at, size in zip((i, j), self.tile, strict=True))
            P = H_out[rows] @ self.R[:, columns]
            change = self._descended(P.clone(), rows, columns)
            moved[rows] += change @ H_in[columns]
            hoped += (change * (P - H_out[rows, rows] @ change @ H_in[columns, columns] / 2)).sum().item()
            changed.append((rows, columns, change, P))
        self.R -= moved
        return sum((change * (P + H_out[rows] @ self.R[:, columns]) / 2).sum().item() for rows, columns, change, P in changed), hoped

    def _descended(self, P: Tensor, rows: slice, columns: slice) -> Tensor:
        """What changes in one tile, row by row, from change to change."""
        grid, H_out, H_in = self.grid, self.problem.H_out[rows, rows], self.problem.H_in[columns, columns]
        W_hat, codes, step = self.W_hat[rows, columns], self.codes[rows, columns], self.step[rows, columns]
        before = W_hat.clone()
        for i in range(len(W_hat)):
            curvature = H_out[i, i] * H_in.diagonal()
            shift = None if self.offset is None else self.offset[rows, columns][i]
            start = 0
            while True:
                wanted = grid.encode(W_hat[i] + P[i] / curvature, step[i], shift)
                change = grid.decode(wanted, step[i], shift) - W_hat[i]
                lowers = (change * P[i] - 0.5 * change**2 * curvature > 0) & (wanted != codes[i])
                candidates = torch.nonzero(lowers[start:])
                if candidates.numel() == 0:
                    break
                j = start + int(candidates[0])
                codes[i, j] = wanted[j]
                W_hat[i, j] += change[j]
                P -= H_out[:, i, None] * (change[j] * H_in[j])
                start = j + 1
        return W_hat - before
