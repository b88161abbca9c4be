"""Coordinate descent on the codes after feedback.

Problem: feedback decides each entry once, before the entries it is fed to. Revisiting every entry with all others fixed can only lower
`loss = 1/2 tr(E^T H_out E H_in)`. Along entry `(i, j)` the loss is a parabola in `W_hat_ij` with its minimum at
`W_hat_ij + P_ij / (H_out,ii H_in,jj)`, `P = H_out E H_in`; the nearest representable value to it is the best there
is, and it is taken if the loss falls.

Keeping `R = E H_in` makes a row cost one product `H_out[i] R`, and an accepted change one row of `H_in`: a sweep is
O(d_out d_in (d_out + d_in)) at most, like the feedback, and less where few entries change and `P` is known before. The torch specification
below jumps from change to change; its twins in `kernels` visit the same entries in the same order: on CPUs tile by tile, so that a row of
`H_in` is read once for all changes of a tile, on GPUs row by row. No order is better than another (`docs/log.md`, 22).
"""

from __future__ import annotations

import itertools
from importlib.util import find_spec

import torch
from jaxtyping import Int
from torch import Tensor

from roundel.grids.base import ScalarGrid, Scales
from roundel.kernels import rounding as kernels
from roundel.rounding.state import State
from roundel.types import RoundingProblem

__all__ = ["descend", "sweep", "sweep_rows"]


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
    """The specification: tiles from top to bottom, in each block of rows from left to right; in a tile row by row."""
    W, H_out, H_in = problem.W, problem.H_out, problem.H_in
    d_out, d_in = W.shape
    step, offset = grid.affine(scales, problem.shape, W.dtype)
    codes = codes.clone()
    W_hat = grid.decode(codes, step, offset)
    R = (W - W_hat) @ H_in
    for top, left in itertools.product(range(0, d_out, tile[0]), range(0, d_in, tile[1])):
        columns = slice(left, left + tile[1])
        for i in range(top, min(top + tile[0], d_out)):
            curvature = H_out[i, i] * H_in.diagonal()[columns]
            shift = None if offset is None else offset[i, columns]
            P = H_out[i] @ R[:, columns]
            start = 0
            while True:
                wanted = grid.encode(W_hat[i, columns] + P / curvature, step[i, columns], shift)
                change = grid.decode(wanted, step[i, columns], shift) - W_hat[i, columns]
                lowers = (change * P - 0.5 * change**2 * curvature > 0) & (wanted != codes[i, columns])
                candidates = torch.nonzero(lowers[start:])
                if candidates.numel() == 0:
                    break
                k = start + int(candidates[0])
                j = left + k
                codes[i, j] = wanted[k]
                W_hat[i, j] += change[k]
                P = P - H_out[i, i] * change[k] * H_in[j, columns]
                R[i] -= change[k] * H_in[j]
                start = k + 1
    return codes
