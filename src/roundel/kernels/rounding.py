"""Feedback and descent sweeps on the CPU: general products outside a tile, numba inside.

*Feedback*: `d_out d_in (d_out + d_in) / 2` multiply-adds in products, and `BLOCK` for each weight inside tiles, where both sums are kept
as vectors that grow by one scaled row at a time: a processor's lanes are full.

*Sweep*: it starts from `curved = H_out E H_in` and ends with it, so that what does not change costs nothing: one row of `H_in` for each
change (a few percent of the entries), `BLOCK / 2` multiply-adds for each weight and `d_out` more in products.

What is not a product is compiled scalar code, in loops only, because NumPy's expressions take seconds to compile.
Specifications: `rounding.feedback.feedback_waves`, `rounding.descent.sweep_rows`; sums are taken in another order.

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
    errors = np.empty((columns, rows), W.dtype)
    column_part, row_part = np.empty(rows, W.dtype), np.empty(rows, W.dtype)
    for j in range(columns - 1, -1, -1):
        for i in range(rows):
            column_part[i] = from_columns[i, j]
            row_part[i] = from_rows[i, j]
        for k in range(j + 1, columns):
            weight = L_in[k, j]
            for i in range(rows):
                column_part[i] += errors[k, i] * weight
        for i in range(rows - 1, -1, -1):
            size = step[i, j]
            units = (W[i, j] + column_part[i] + row_part[i] - offset[i, j]) / size if size != 0 else W.dtype.type(0)
            code, level = _nearest(units, levels, low, high)
            codes[i, j] = code
            error = W[i, j] - (level * size + offset[i, j])
            errors[j, i] = error
            E[i, j] = error
            compensated = error + column_part[i]
            Y[i, j] = compensated
            for k in range(i):
                row_part[k] += L_out[i, k] * compensated


def sweep(
    W: Tensor,
    H_out: Tensor,
    H_in: Tensor,
    step: Tensor,
    offset: Tensor | None,
    levels: Tensor | None,
    low: int,
    high: int,
    codes: Tensor,
    curved: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Twin of `sweep_rows`: a block of rows sees the changes of those before it by one product. All but the codes of one type.

    Returns:
        The codes, and `H_out E H_in` with them; `curved` is that with the codes that are given, formed if it is not known.
    """
    H_in, step = H_in.contiguous(), step.contiguous()
    d_out, d_in = W.shape
    codes = codes.clone()
    table = NO_LEVELS if levels is None else levels.to(W.dtype).numpy()
    shift = torch.zeros(1, 1, dtype=W.dtype).expand(d_out, d_in) if offset is None else offset
    units = codes.to(W.dtype) if levels is None else levels.to(W.dtype)[codes.long() - low]
    W_hat = units.mul_(step).add_(shift)
    if curved is None:
        curved = H_out @ (W - W_hat) @ H_in
    change_of_R, after = torch.empty_like(W_hat), torch.empty_like(W_hat)  # of E H_in, and H_out E H_in
    for top in range(0, d_out, BLOCK):
        bottom = min(top + BLOCK, d_out)
        P = torch.addmm(curved[top:bottom], H_out[top:bottom, :top], change_of_R[:top], out=after[top:bottom])
        _sweep_rows(
            P.clone().numpy(),
            change_of_R[top:bottom].numpy(),
            H_out[top:bottom, top:bottom].contiguous().numpy(),
            H_in.numpy(),
            H_in.diagonal().contiguous().numpy(),
            step[top:bottom].numpy(),
            shift[top:bottom].contiguous().numpy(),
            table,
            low,
            high,
            W_hat[top:bottom].numpy(),
            codes[top:bottom].numpy(),
        )
    for top in range(0, d_out, BLOCK):  # and those of its own rows and of those below
        after[top : top + BLOCK].addmm_(H_out[top : top + BLOCK, top:], change_of_R[top:])
    return codes, after


@numba.njit(cache=True)
def _sweep_rows(
    P: _Array,
    change_of_R: _Array,
    H_out: _Array,
    H_in: _Array,
    diagonal: _Array,
    step: _Array,
    offset: _Array,
    levels: _Array,
    low: int,
    high: int,
    W_hat: _Array,
    codes: _Array,
) -> None:
    rows, columns = P.shape
    for i in range(rows):
        own, moved = H_out[i, i], change_of_R[i]
        for k in range(columns):
            moved[k] = 0
        any_change = False
        for j in range(columns):
            size = step[i, j]
            if size == 0:
                continue
            curvature, slope = own * diagonal[j], P[i, j] + own * moved[j]
            wanted, level = _nearest((W_hat[i, j] + slope / curvature - offset[i, j]) / size, levels, low, high)
            if wanted == codes[i, j]:
                continue
            change = level * size + offset[i, j] - W_hat[i, j]
            if not change * slope - 0.5 * change * change * curvature > 0:
                continue
            codes[i, j] = wanted
            W_hat[i, j] += change
            any_change = True
            row = H_in[j]
            for k in range(columns):
                moved[k] -= change * row[k]
        if any_change:
            for below in range(i + 1, rows):
                weight, P_below = H_out[below, i], P[below]
                for k in range(columns):
                    P_below[k] += weight * moved[k]
