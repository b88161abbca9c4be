"""Adaptive rounding with feedback on both sides, in O(d_out d_in (d_out + d_in)).

Problem: choose `W_hat` so that `L_out^T E L_in` is no more than the grid's own error (see `linalg.ldl`). The target of entry `(i, j)` is

    W_ij + sum_{j'>j} E_ij' L_in[j', j] + sum_{i'>i} L_out[i', i] Y_i'j,      Y = E L_in

(YAQA, arXiv 2505.22988, eq. 8, rearranged). `Y_i'j` is final once its entry is, which is why nothing has to be
recomputed: the published loop costs O(d_out^2 d_in^2 / tile). With `L_out = I` this is LDLQ, code for code; with both
identities it is nearest rounding.

Rows and columns are decided in the order of the problem (`RoundingProblem.order`), the largest diagonal first: what costs most is
rounded while most others can still take back its error. Codes and scales stay in their places, so no format knows of it. With scales that
are searched under what errors then cost (`D_in`) that is 5 % of the proxy loss after all sweeps (`docs/log.md`, 24), for some copies.

Two twins with the same order of feedback: `feedback_waves`, the plain torch specification, goes over anti-diagonals from the bottom
right, whose entries do not depend on each other; `kernels.feedback` goes over tiles, general products outside a tile and numba inside.

Flops: `d_out d_in (d_out + d_in)` multiply-adds; memory: six matrices of the weight's size.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from jaxtyping import Int
from torch import Tensor

from roundel.grids.base import ScalarGrid, Scales
from roundel.kernels import rounding as kernels
from roundel.types import RoundingProblem

__all__ = ["feedback", "feedback_waves"]


def feedback(problem: RoundingProblem, grid: ScalarGrid, scales: Scales) -> Int[Tensor, "d_out d_in"]:
    """Codes by two-sided feedback: numba on the CPU, Triton on a GPU that has it, the torch specification elsewhere."""
    if problem.W.device.type == "cpu" or (problem.W.is_cuda and find_spec("triton")):
        W, step, offset = _in_order(problem, grid, scales)
        arguments = (W, problem.L_out, problem.L_in, step, offset, grid.level_table(), *grid.code_range)
        if problem.W.is_cuda:
            from roundel.kernels import triton_rounding  # an optional dependency

            return _in_place(problem, triton_rounding.feedback(*arguments))
        return _in_place(problem, kernels.feedback(*arguments))
    return feedback_waves(problem, grid, scales)


def feedback_waves(problem: RoundingProblem, grid: ScalarGrid, scales: Scales) -> Int[Tensor, "d_out d_in"]:
    """The specification: `d_out + d_in - 1` waves, each one vectorised step."""
    W, step, offset = _in_order(problem, grid, scales)
    d_out, d_in = W.shape
    below_out, below_in = problem.L_out.tril(-1), problem.L_in.tril(-1)
    from_columns, from_rows = torch.zeros_like(W), torch.zeros_like(W)
    codes = torch.zeros(W.shape, dtype=torch.int8, device=W.device)
    for wave in range(d_out + d_in - 2, -1, -1):
        i = torch.arange(max(0, wave - d_in + 1), min(d_out, wave + 1), device=W.device)
        j = wave - i
        shift = None if offset is None else offset[i, j]
        codes[i, j] = grid.encode(W[i, j] + from_columns[i, j] + from_rows[i, j], step[i, j], shift)
        E = W[i, j] - grid.decode(codes[i, j], step[i, j], shift)
        Y = E + from_columns[i, j]
        from_rows[:, j] += below_out[i].T * Y
        from_columns[i] += E[:, None] * below_in[j]
    return _in_place(problem, codes)


def _in_order(problem: RoundingProblem, grid: ScalarGrid, scales: Scales) -> tuple[Tensor, Tensor, Tensor | None]:
    """The weight and each entry's step and offset, in the order of the problem's factors."""
    step, offset = grid.affine(scales, problem.shape, problem.W.dtype)
    if problem.order is None:
        return problem.W, step, offset
    rows, columns = problem.order
    index = (rows[:, None], columns)
    return problem.W[index], step[index], None if offset is None else offset[index]


def _in_place(problem: RoundingProblem, codes: Tensor) -> Tensor:
    """Codes in the order of the weight."""
    if problem.order is None:
        return codes
    rows, columns = problem.order
    return torch.empty_like(codes).index_put_((rows[:, None], columns), codes)
