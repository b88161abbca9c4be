"""Feedback and descent sweeps on the CPU: general products outside a tile, numba inside.

Both loops touch `d_out d_in (d_out + d_in)` multiply-adds. Tiles of `BLOCK` put all but `2 BLOCK` of them per weight
into matrix products; the rest is compiled scalar code, in loops only, because NumPy's expressions take seconds to compile.
Specifications: `rounding.feedback.feedback_waves`, `rounding.descent.sweep_rows`.

A representable value is `levels[code - low] * step + offset`. With no `levels` the codes `low .. high` are the levels themselves, and the
nearest one needs no search.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

__all__ = ["feedback", "sweep"]

BLOCK = 64

_Array = np.ndarray[Any, np.dtype[Any]]


NO_LEVELS = np.zeros(0, np.float32)


def feedback(
    W: Tensor, L_out: Tensor, L_in: Tensor, step: Tensor, offset: Tensor | None, levels: Tensor | None, low: int, high: int
) -> Tensor:
    """Twin of `feedback_waves`: column blocks from the last, in each the row blocks from the last. All of one type."""
    W, step = W.contiguous(), step.contiguous()
    d_out, d_in = W.shape
    table = NO_LEVELS if levels is None else levels.to(W.dtype).numpy()
    shift = torch.zeros(1, 1, dtype=W.dtype).expand(d_out, d_in) if offset is None else offset
    E, Y = torch.zeros_like(W), torch.zeros_like(W)
    codes = torch.zeros(W.shape, dtype=torch.int8)
    one_sided = bool((L_out.tril(-1) == 0).all())
    for left in range((d_in - 1) // BLOCK * BLOCK, -1, -BLOCK):
        right = min(left + BLOCK, d_in)
        from_columns = E[:, right:] @ L_in[right:, left:right]
        inner_in = L_in[left:right, left:right].contiguous().numpy()
        for top in range((d_out - 1) // BLOCK * BLOCK, -1, -BLOCK):
            bottom = min(top + BLOCK, d_out)
            if one_sided:
                from_rows = torch.zeros(bottom - top, right - left, dtype=W.dtype)
            else:
                from_rows = L_out[bottom:, top:bottom].T @ Y[bottom:, left:right]
            _feedback_tile(
                W[top:bottom, left:right].numpy(),
                step[top:bottom, left:right].numpy(),
                shift[top:bottom, left:right].contiguous().numpy(),
                table,
                from_columns[top:bottom].numpy(),
                from_rows.numpy(),
                L_out[top:bottom, top:bottom].contiguous().numpy(),
                inner_in,
                low,
                high,
                E[top:bottom, left:right].numpy(),
                Y[top:bottom, left:right].numpy(),
                codes[top:bottom, left:right].numpy(),
            )
    return codes


@numba.njit(cache=True, inline="always")
def _nearest(units: Any, levels: _Array, low: int, high: int) -> tuple[Any, Any]:
    """Code and level nearest to a value in units of the step."""
    if levels.size == 0:
        level = min(max(np.rint(units), low), high)
        return int(level), level
    index, end = 0, levels.size
    while index < end:
        middle = (index + end) // 2
        if levels[middle] < units:
            index = middle + 1
        else:
            end = middle
    if index == levels.size or (index > 0 and units <= (levels[index] + levels[index - 1]) / 2):
        index -= 1
    return index + low, levels[index]


@numba.njit(cache=True)
def _feedback_tile(
    W: _Array,
    step: _Array,
    offset: _Array,
    levels: _Array,
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
            size = step[i, j]
            units = (W[i, j] + column_part + row_part - offset[i, j]) / size if size != 0 else W.dtype.type(0)
            code, level = _nearest(units, levels, low, high)
            codes[i, j] = code
            E[i, j] = W[i, j] - (level * size + offset[i, j])
            Y[i, j] = E[i, j] + column_part


def sweep(
    W: Tensor, H_out: Tensor, H_in: Tensor, step: Tensor, offset: Tensor | None, levels: Tensor | None, low: int, high: int, codes: Tensor
) -> Tensor:
    """Twin of `sweep_rows`: one product for a block of rows, then row by row inside it. All but the codes of one type."""
    H_in, step = H_in.contiguous(), step.contiguous()
    d_out, d_in = W.shape
    codes = codes.clone()
    table = NO_LEVELS if levels is None else levels.to(W.dtype).numpy()
    shift = torch.zeros(1, 1, dtype=W.dtype).expand(d_out, d_in) if offset is None else offset
    units = codes.to(W.dtype) if levels is None else levels.to(W.dtype)[codes.long() - low]
    W_hat = units * step + shift
    R = (W - W_hat) @ H_in
    for top in range(0, d_out, BLOCK):
        bottom = min(top + BLOCK, d_out)
        P = H_out[top:bottom] @ R
        _sweep_rows(
            P.numpy(),
            R[top:bottom].numpy(),
            H_out[top:bottom, top:bottom].contiguous().numpy(),
            H_in.numpy(),
            step[top:bottom].numpy(),
            shift[top:bottom].contiguous().numpy(),
            table,
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
    offset: _Array,
    levels: _Array,
    low: int,
    high: int,
    W_hat: _Array,
    codes: _Array,
) -> None:
    rows, columns = P.shape
    change_of_R = np.empty(columns, P.dtype)
    for i in range(rows):
        for k in range(columns):
            change_of_R[k] = 0
        for j in range(columns):
            curvature = H_out[i, i] * H_in[j, j]
            size = step[i, j]
            if size == 0:
                continue
            wanted, level = _nearest((W_hat[i, j] + P[i, j] / curvature - offset[i, j]) / size, levels, low, high)
            if wanted == codes[i, j]:
                continue
            change = level * size + offset[i, j] - W_hat[i, j]
            if not change * P[i, j] - 0.5 * change * change * curvature > 0:
                continue
            codes[i, j] = wanted
            W_hat[i, j] += change
            for k in range(columns):
                moved = change * H_in[j, k]
                change_of_R[k] -= moved
                P[i, k] -= H_out[i, i] * moved
        for k in range(columns):
            R[i, k] += change_of_R[k]
        for below in range(i + 1, rows):
            for k in range(columns):
                P[below, k] += H_out[below, i] * change_of_R[k]
