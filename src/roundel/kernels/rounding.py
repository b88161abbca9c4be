"""Feedback and descent sweeps on the CPU: general products outside a tile, numba inside.

*Feedback*: `d_out d_in (d_out + d_in) / 2` multiply-adds in products, and `BLOCK` for each weight inside tiles, where both sums are kept
as vectors that grow by one scaled row at a time: a processor's lanes are full.

*Sweep*: it starts from `curved = H_out E H_in` and ends with it, so that what does not change costs nothing: `d_in` multiply-adds for each
change (a few percent of the entries), and `TILE[0] + BLOCK / 2` for each weight and `d_out` more in products. One change after the other
would fetch its row of `H_in` from memory; in tiles `BLOCK` of them are read once for the changes of all rows of a block.

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

TILE = (128, 64)
"""Rows and columns of what a sweep visits before it goes on."""

CHUNK = 512
"""Columns that the changes of a tile are added to at a time."""

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
    """Twin of `sweep_rows`, in tiles of `TILE`: what is outside a tile hears of its changes by products. All but the codes of one type.

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
    reach = np.asarray(0.49 * (1 if levels is None else levels.diff().min().item()), table.dtype)[()]
    change_of_R, after = torch.zeros_like(W_hat), torch.empty_like(W_hat)  # of E H_in, and H_out E H_in
    for top in range(0, d_out, TILE[0]):
        block = slice(top, top + TILE[0])
        P = torch.addmm(curved[block], H_out[block, :top], change_of_R[:top], out=after[block])
        own, moved = H_out[block, block].contiguous(), change_of_R[block]
        for left in range(0, d_in, TILE[1]):
            columns = slice(left, left + TILE[1])
            _sweep_tile(
                torch.addmm(P[:, columns], own, moved[:, columns]).numpy(),
                moved.numpy(),
                own.numpy(),
                H_in[columns].numpy(),
                H_in[columns, columns].numpy(),
                step[block, columns].numpy(),
                shift[block, columns].contiguous().numpy(),
                table,
                reach,
                low,
                high,
                W_hat[block, columns].numpy(),
                codes[block, columns].numpy(),
            )
    for top in range(0, d_out, TILE[0]):  # and those of its own rows and of those below
        after[top : top + TILE[0]].addmm_(H_out[top : top + TILE[0], top:], change_of_R[top:])
    return codes, after


@numba.njit(cache=True)
def _sweep_tile(
    P: _Array,
    change_of_R: _Array,
    H_out: _Array,
    H_in: _Array,
    H_tile: _Array,
    step: _Array,
    offset: _Array,
    levels: _Array,
    reach: Any,
    low: int,
    high: int,
    W_hat: _Array,
    codes: _Array,
) -> None:
    """Visits a tile, row by row; `P` is of the tile, `change_of_R` of its rows, `H_in` of its columns, `H_tile` of both.

    No value moves by less than `reach`, in units of its step.
    """
    rows, columns = P.shape
    changes, places = np.empty((rows, columns), P.dtype), np.empty((rows, columns), np.int64)
    counts = np.zeros(rows, np.int64)
    moved = np.empty(columns, P.dtype)
    for i in range(rows):
        own, count = H_out[i, i], 0
        for k in range(columns):
            moved[k] = 0
        for j in range(columns):
            size, curvature, slope = step[i, j], own * H_tile[j, j], P[i, j] + own * moved[j]
            if size == 0 or abs(slope) < reach * curvature * abs(size):
                continue
            wanted, level = _nearest((W_hat[i, j] + slope / curvature - offset[i, j]) / size, levels, low, high)
            if wanted == codes[i, j]:
                continue
            change = level * size + offset[i, j] - W_hat[i, j]
            if not change * slope - 0.5 * change * change * curvature > 0:
                continue
            codes[i, j] = wanted
            W_hat[i, j] += change
            changes[i, count], places[i, count] = change, j
            count += 1
            for k in range(columns):
                moved[k] -= change * H_tile[j, k]
        counts[i] = count
        if count > 0:
            for below in range(i + 1, rows):
                weight = H_out[below, i]
                for k in range(columns):
                    P[below, k] += weight * moved[k]
    for start in range(0, change_of_R.shape[1], CHUNK):
        end = min(start + CHUNK, change_of_R.shape[1])
        for i in range(rows):
            row, count = change_of_R[i, start:end], counts[i]
            even = count - count % 2
            for at in range(0, even, 2):
                first, second = changes[i, at], changes[i, at + 1]
                one, other = H_in[places[i, at], start:end], H_in[places[i, at + 1], start:end]
                for k in range(end - start):
                    row[k] -= first * one[k] + second * other[k]
            if even < count:
                last, one = changes[i, even], H_in[places[i, even], start:end]
                for k in range(end - start):
                    row[k] -= last * one[k]
