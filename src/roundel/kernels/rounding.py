"""Feedback and descent sweeps on the CPU: general products outside a tile, numba inside.

Both loops touch `d_out d_in (d_out + d_in)` multiply-adds. Tiles of `BLOCK` put all but `2 BLOCK` of them per weight
into matrix products; the rest is compiled scalar code. Specifications: `rounding.feedback.feedback_waves`,
`rounding.descent.sweep_rows`.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from roundel.grids.base import Grid
from roundel.types import RoundingProblem

__all__ = ["feedback", "sweep"]

BLOCK = 64

_Array = np.ndarray[Any, np.dtype[Any]]


def feedback(problem: RoundingProblem, grid: Grid, scales: Tensor) -> Tensor:
    """Twin of `feedback_waves`: column blocks from the last, in each the row blocks from the last."""
    W = problem.W.contiguous()
    d_out, d_in = W.shape
    step = grid.expand(scales, d_in).to(W.dtype)
    low, high = grid.code_range
    E, Y = torch.zeros_like(W), torch.zeros_like(W)
    codes = torch.zeros(W.shape, dtype=torch.int8)
    one_sided = bool((problem.L_out.tril(-1) == 0).all())
    for left in range((d_in - 1) // BLOCK * BLOCK, -1, -BLOCK):
        right = min(left + BLOCK, d_in)
        from_columns = E[:, right:] @ problem.L_in[right:, left:right]
        inner_in = problem.L_in[left:right, left:right].contiguous().numpy()
        for top in range((d_out - 1) // BLOCK * BLOCK, -1, -BLOCK):
            bottom = min(top + BLOCK, d_out)
            if one_sided:
                from_rows = torch.zeros(bottom - top, right - left, dtype=W.dtype)
            else:
                from_rows = problem.L_out[bottom:, top:bottom].T @ Y[bottom:, left:right]
            _feedback_tile(
                W[top:bottom, left:right].numpy(),
                step[top:bottom, left:right].numpy(),
                from_columns[top:bottom].numpy(),
                from_rows.numpy(),
                problem.L_out[top:bottom, top:bottom].contiguous().numpy(),
                inner_in,
                low,
                high,
                E[top:bottom, left:right].numpy(),
                Y[top:bottom, left:right].numpy(),
                codes[top:bottom, left:right].numpy(),
            )
    return codes


@numba.njit(cache=True)
def _feedback_tile(
    W: _Array,
    step: _Array,
    from_columns: _Array,
    from_rows: _Array,
    L_out: _Array,
    L_in: _Array,
    low: int,
    high: int,
    E: _Array,
    Y: _Array,
    codes: _Array,
) -> None:
    rows, columns = W.shape
    for j in range(columns - 1, -1, -1):
        for i in range(rows - 1, -1, -1):
            column_part = from_columns[i, j]
            for k in range(j + 1, columns):
                column_part += E[i, k] * L_in[k, j]
            row_part = from_rows[i, j]
            for k in range(i + 1, rows):
                row_part += L_out[k, i] * Y[k, j]
            q = min(max(np.rint((W[i, j] + column_part + row_part) / step[i, j]), low), high)
            codes[i, j] = q
            E[i, j] = W[i, j] - codes[i, j] * step[i, j]
            Y[i, j] = E[i, j] + column_part


def sweep(problem: RoundingProblem, grid: Grid, scales: Tensor, codes: Tensor) -> Tensor:
    """Twin of `sweep_rows`: one product for a block of rows, then row by row inside it."""
    W, H_out, H_in = problem.W, problem.H_out, problem.H_in.contiguous()
    d_out, d_in = W.shape
    step = grid.expand(scales, d_in).to(W.dtype)
    codes = codes.clone()
    W_hat = grid.decode(codes, step)
    R = (W - W_hat) @ H_in
    low, high = grid.code_range
    for top in range(0, d_out, BLOCK):
        bottom = min(top + BLOCK, d_out)
        P = H_out[top:bottom] @ R
        _sweep_rows(
            P.numpy(),
            R[top:bottom].numpy(),
            H_out[top:bottom, top:bottom].contiguous().numpy(),
            H_in.numpy(),
            step[top:bottom].numpy(),
            low,
            high,
            W_hat[top:bottom].numpy(),
            codes[top:bottom].numpy(),
        )
    return codes


@numba.njit(cache=True)
def _sweep_rows(
    P: _Array,
    R: _Array,
    H_out: _Array,
    H_in: _Array,
    step: _Array,
    low: int,
    high: int,
    W_hat: _Array,
    codes: _Array,
) -> None:
    rows, columns = P.shape
    change_of_R = np.empty(columns, P.dtype)
    for i in range(rows):
        change_of_R[:] = 0
        for j in range(columns):
            curvature = H_out[i, i] * H_in[j, j]
            wanted = min(max(np.rint((W_hat[i, j] + P[i, j] / curvature) / step[i, j]), low), high)
            if wanted == codes[i, j]:
                continue
            change = wanted * step[i, j] - W_hat[i, j]
            if not change * P[i, j] - 0.5 * change * change * curvature > 0:
                continue
            codes[i, j] = wanted
            W_hat[i, j] += change
            for k in range(columns):
                moved = change * H_in[j, k]
                change_of_R[k] -= moved
                P[i, k] -= H_out[i, i] * moved
        R[i] += change_of_R
        for below in range(i + 1, rows):
            for k in range(columns):
                P[below, k] += H_out[below, i] * change_of_R[k]
