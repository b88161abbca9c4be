"""From packed codes to dense float32 rows on the CPU: bits, table, scale, in one pass. The specification is `grid.dequantize`.

Bits are taken from a buffer of 64, a word at a time; every unpacked code is looked up in a table (also integers: 256 entries stay in the
nearest cache) and scaled in float32, by the same operations in the same order as the specification, so that results are equal bit for bit.
A trellis's state is a run of its tile's bits (`formats.native`), looked up in a table of all states.

Cost: 2 ns for a weight of a scalar grid, 4 of the lattice, up to 8 of a trellis, whose table of 256 KB is read all over (one core of a busy
machine), and 4 bytes written for each. Sizes are arguments: one compilation for all shapes. Threads are Python's, as many as torch uses,
each with rows of its own.

Not done: products without the dense rows; types of less than 32 bits as results.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

__all__ = ["decode_scalars", "decode_tiles", "decode_vectors"]

_Array = np.ndarray[Any, np.dtype[Any]]

ALONE = 1 << 17
"""Weights that are not worth another thread."""

NOTHING = np.zeros((0, 0), np.float32)


def decode_scalars(
    words: Tensor, bits: int, columns: int, levels: Tensor, step: Tensor, *, offset: Tensor | None = None, zero: Tensor | None = None
) -> Tensor:
    """`(levels[code] - zero) * step + offset`, `(rows, columns)` float32.

    Args:
        words: `(rows, words)` int32, rows of `bits`-bit codes.
        bits: Of a code, at most 8.
        columns: Codes in a row.
        levels: `(2^bits,)` float32.
        step: `(rows or 1, groups)` float32; `groups` divides `columns`.
        offset: As `step`; None: nothing is added.
        zero: As `step`; None: nothing is subtracted.
    """
    rows = words.shape[0]
    out = torch.empty(rows, columns)
    scale, add, subtract = (NOTHING if x is None else x.contiguous().numpy() for x in (step, offset, zero))
    given, table, result = words.contiguous().numpy().view(np.uint32), levels.contiguous().numpy(), out.numpy()
    _by_rows(rows, columns, lambda top, end: _scalars(given, bits, table, scale, add, subtract, top, end, result))
    return out


def decode_tiles(
    words: Tensor, shift: int, state_bits: int, table: Tensor, order: Tensor, scale: float, shape: tuple[int, int], tile: tuple[int, int]
) -> Tensor:
    """`scale` times what the states of circular registers stand for, `shape` float32.

    Args:
        words: `(tiles, words)` int32: symbols of `shift` bits from the last to the first, without padding; tiles row by row.
        shift: Bits of a symbol.
        state_bits: Of the register, at most 16.
        table: `(2^state_bits, values)` float32.
        order: Of each value of a tile the entry, counted row by row.
        scale: A float32 number.
        shape: Of the weight.
        tile: Rows and columns of a tile.
    """
    out = torch.empty(shape)
    given, values, result = words.contiguous().numpy().view(np.uint32), table.contiguous().numpy(), out.numpy()
    places = order.numpy().astype(np.int64)
    row, column, size = (places // tile[1]).astype(np.uint64), (places % tile[1]).astype(np.uint64), np.float32(scale)
    down, cost = -(-shape[0] // tile[0]), shape[1] * tile[0]
    _by_rows(down, cost, lambda top, end: _tiles(given, shift, state_bits, values, row, column, size, tile, top, end, result))
    return out


def decode_vectors(words: Tensor, columns: int, table: Tensor, scale: float) -> Tensor:
    """`scale` times the rows of `table` that 16-bit codes name, one after another, `(rows, columns)` float32.

    Args:
        words: `(rows, words)` int32, rows of codes.
        columns: Of the result.
        table: `(65536, values)` float32.
        scale: A float32 number.
    """
    rows = words.shape[0]
    out = torch.empty(rows, columns)
    given, values, result = words.contiguous().numpy().view(np.uint32), table.contiguous().numpy(), out.numpy()
    size = np.float32(scale)
    _by_rows(rows, columns, lambda top, end: _vectors(given, values, size, top, end, result))
    return out


def _by_rows(rows: int, cost: int, work: Callable[[int, int], None]) -> None:
    """`work(first, end)` of all rows, of which each is `cost` weights."""
    workers = min(torch.get_num_threads(), max(1, rows * cost // ALONE), rows)
    if workers == 1:
        work(0, rows)
        return
    ends = [rows * part // workers for part in range(workers + 1)]
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, ends[:-1], ends[1:]))


@numba.njit(nogil=True, cache=True)
def _scalars(words: _Array, bits: int, levels: _Array, step: _Array, offset: _Array, zero: _Array, top: int, end: int, out: _Array) -> None:
    groups, columns = step.shape[1], out.shape[1]
    width = columns // groups
    shift, mask = np.uint64(bits), np.uint64((1 << bits) - 1)
    for i in range(top, end):
        at = i if step.shape[0] > 1 else 0
        buffer, held, word, j = np.uint64(0), 0, 0, 0
        for group in range(groups):
            size = step[at, group]
            less = zero[at, group] if zero.size else np.float32(0)
            more = offset[at, group] if offset.size else np.float32(0)
            for _ in range(width):
                if held < bits:
                    buffer |= np.uint64(words[i, word]) << np.uint64(held)
                    word += 1
                    held += 32
                value = levels[buffer & mask]
                buffer >>= shift
                held -= bits
                if zero.size:
                    value -= less
                value *= size
                if offset.size:
                    value += more
                out[i, j] = value
                j += 1


@numba.njit(nogil=True, cache=True)
def _tiles(
    words: _Array,
    shift: int,
    state_bits: int,
    table: _Array,
    row: _Array,
    column: _Array,
    scale: Any,
    size: tuple[int, int],
    top: int,
    end: int,
    out: _Array,
) -> None:
    """Rows `top` to `end` of tiles."""
    d_in = out.shape[1]
    rows, columns = size
    across = (d_in + columns - 1) // columns
    length, values = words.shape[1], table.shape[1]
    symbols, last = length * 32 // shift, np.uint64(length - 1)
    mask = np.uint64((1 << state_bits) - 1)
    for i in range(top, end):
        for j in range(across):
            tile = words[i * across + j]
            place = out[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
            whole = place.shape[0] == rows and place.shape[1] == columns
            for t in range(symbols):
                bit = np.uint64(shift * (symbols - 1 - t))
                word = bit >> np.uint64(5)
                following = np.uint64(0) if word == last else word + np.uint64(1)
                pair = np.uint64(tile[word]) | np.uint64(tile[following]) << np.uint64(32)
                state = (pair >> (bit & np.uint64(31))) & mask
                for v in range(values):
                    r, c = row[t * values + v], column[t * values + v]
                    if whole or (r < place.shape[0] and c < place.shape[1]):
                        place[r, c] = table[state, v] * scale


@numba.njit(nogil=True, cache=True)
def _vectors(words: _Array, table: _Array, scale: Any, top: int, end: int, out: _Array) -> None:
    columns, values = out.shape[1], table.shape[1]
    for i in range(top, end):
        for j in range((columns + values - 1) // values):
            code = (words[i, j >> 1] >> np.uint32(16 * (j & 1))) & np.uint32(0xFFFF)
            for v in range(min(values, columns - j * values)):
                out[i, j * values + v] = table[code, v] * scale
