"""Feedback and descent sweeps on a GPU: batched products outside a tile, Triton inside it.

Twins of `rounding.feedback.feedback_waves` and `rounding.descent.sweep_waves`: the same entries in the same order by the same rule; sums
are taken in another order, so that float32 codes can differ where a target lies at a boundary between two codes.

*Feedback.* Tiles of an anti-diagonal do not depend on each other. One program takes a tile through its own `2 BLOCK - 1` anti-diagonals,
one row to a lane, and holds what has been fed to the tile so far in registers; two batched products then feed the tiles' errors to all
tiles on the left and above. Flops: at most `4 d_out d_in (d_out + d_in)` in products and `4 BLOCK` for an entry inside tiles (`8
BLOCK^2` for each diagonal, half of which has entries). Bytes: each of the `down + across - 1` waves reads and writes up to `2 min(down,
across) BLOCK` rows of all entries. Buffers are laid out so that a wave is a slice of each: row blocks from the last, column blocks from
the first.

*Sweep.* Tiles of different rows and columns are changed in one call, one program each, from products formed before it; `Waves` says how
many, by what the last ones gained. A program holds the tile's part of `H_out E H_in` in registers and goes from row to row and in a row
from change to change: what one after the other must wait for is inside a tile. For a wave of `n` tiles: `2 n TILE[0] TILE[1] d_out` flops
before it, as many after it to see what it gained, and `2 n TILE[0] TILE[1] d_in` to take its changes to the rest of their rows, so for a
sweep `2 d_out d_in (2 d_out + d_in)`, and more where waves are refused. Bytes: the wave's rows of `H_out` and `H_in` and its columns of `E
H_in`, copied and read, twice those of `d_out`. Two numbers come back to the host for each wave of more than one tile.

Products are float32 only as long as torch is not told to take TF32 for them. Not done: several matrices in one call.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from roundel.kernels.waves import Waves

__all__ = ["feedback", "sweep"]

BLOCK = 64
"""Rows and columns of a tile of the feedback."""

TILE = (32, 64)
"""Rows and columns of a tile of a sweep: short, because tiles of a wave do not wait for each other and rows of a tile do."""


def feedback(
    W: Tensor,
    L_out: Tensor,
    L_in: Tensor,
    step: Tensor,
    offset: Tensor | None,
    levels: Tensor | None,
    low: int,
    high: int,
    *,
    block: int = BLOCK,
) -> Tensor:
    """Twin of `kernels.rounding.feedback`; `block` is a power of two."""
    d_out, d_in = W.shape
    options: dict[str, Any] = {"dtype": W.dtype, "device": W.device}
    down, across = -(-d_out // block), -(-d_in // block)
    below_out, below_in = _padded(L_out.tril(-1), block), _padded(L_in.tril(-1), block)
    inner_out, inner_in = _diagonal_tiles(below_out, block).transpose(1, 2).contiguous(), _diagonal_tiles(below_in, block).contiguous()
    row_blocks = below_out.unflatten(0, (down, block)).flip(0)  # (down, block, d_out), the last one first
    column_blocks = below_in.unflatten(0, (across, block))
    wanted, steps, offsets = (_padded(x, block) if x is not None else None for x in (W, step, offset))
    from_columns = torch.zeros(down, block, across * block, **options)  # the last rows first
    from_rows = torch.zeros(across, down * block, block, **options)
    E, Y = (torch.empty(min(down, across), block, block, **options) for _ in range(2))
    codes = torch.zeros(down * block, across * block, dtype=torch.int8, device=W.device)
    table, middles, bits = _search_tables(levels, W)
    for wave in range(down + across - 2, -1, -1):
        left, right = max(0, wave - down + 1), min(across, wave + 1)  # the wave's columns of tiles; its rows go up from `bottom`
        bottom, count = wave - left, right - left
        _feedback_tile[(count,)](
            wanted,
            steps,
            offsets,
            table,
            middles,
            from_columns,
            from_rows,
            inner_out,
            inner_in,
            E,
            Y,
            codes,
            left,
            bottom,
            down,
            across,
            low,
            high,
            BITS=bits,
            OFFSET=offset is not None,
            BLOCK=block,
            num_warps=min(8, max(1, block * block // 512)),
            num_stages=1,
        )
        across_wave, down_wave = slice(left, right), slice(down - 1 - bottom, down - 1 - bottom + count)
        reached = (right - 1) * block
        from_columns[down_wave, :, :reached].baddbmm_(E[:count], column_blocks[across_wave, :, :reached])
        reached = bottom * block
        from_rows[across_wave, :reached].baddbmm_(row_blocks[down_wave, :, :reached].transpose(1, 2), Y[:count])
    return codes[:d_out, :d_in].contiguous()


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
    *,
    tile: tuple[int, int] = TILE,
) -> Tensor:
    """Twin of `sweep_waves`; both sizes of `tile` are powers of two."""
    (d_out, d_in), (rows, columns) = W.shape, tile
    waves = Waves(-(-d_out // rows), -(-d_in // columns))
    order = torch.tensor(waves.order, device=W.device)
    H_out, H_in = _padded(H_out, rows), _padded(H_in, columns)
    W, codes, step = (_padded(x, rows, columns) for x in (W, codes, step))
    shift = None if offset is None else _padded(offset.expand(d_out, d_in), rows, columns)
    table, middles, bits = _search_tables(levels, W)
    codes = codes.clone()
    units = codes.to(W.dtype) if levels is None else levels.to(W)[(codes.long() - low).clamp(min=0)]
    W_hat = units * step if shift is None else units * step + shift

    def tiles(matrix: Tensor) -> Tensor:
        split: Tensor = matrix.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).transpose(1, 2)
        return split

    R = (W - W_hat) @ H_in
    R_rows, R_columns = R.unflatten(0, (-1, rows)), R.unflatten(1, (-1, columns))
    out_rows, in_rows = H_out.unflatten(0, (-1, rows)), H_in.unflatten(0, (-1, columns))
    own_out = out_rows.unflatten(2, (-1, rows)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    own_in = in_rows.unflatten(2, (-1, columns)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    while wave := waves.next():
        where = order[waves.start : waves.end]
        i, j = where.unbind(1)
        P = out_rows[i] @ R_columns[:, j].transpose(0, 1)
        before = tiles(codes)[i, j], tiles(W_hat)[i, j]
        change = torch.empty_like(P)
        _sweep_tile[(len(wave),)](
            P,
            H_out,
            H_in,
            step,
            shift,
            table,
            middles,
            W_hat,
            codes,
            change,
            where,
            len(H_out),
            len(H_in),
            low,
            high,
            BITS=bits,
            OFFSET=offset is not None,
            ROWS=rows,
            COLUMNS=columns,
            num_warps=max(1, rows * columns // 1024),
            num_stages=1,
        )
        moved = change @ in_rows[j]
        R_rows.index_add_(0, i, moved, alpha=-1)
        gain = hoped = 0.0
        if len(wave) > 1:
            after = out_rows[i] @ R_columns[:, j].transpose(0, 1)
            alone = P - own_out[i] @ change @ own_in[j] / 2
            gain, hoped = torch.stack([(change * (P + after)).sum() / 2, (change * alone).sum()]).tolist()
        if not waves.took(gain, hoped):
            R_rows.index_add_(0, i, moved)
            tiles(codes)[i, j], tiles(W_hat)[i, j] = before
    return codes[:d_out, :d_in].contiguous()


def _padded(matrix: Tensor, rows: int, columns: int | None = None) -> Tensor:
    """With zeros below and to the right, up to whole tiles, which are square if `columns` is not given; itself, where it is so already."""
    right, below = -matrix.shape[1] % (columns or rows), -matrix.shape[0] % rows
    if right or below:
        matrix = torch.nn.functional.pad(matrix, (0, right, 0, below))
    return matrix.contiguous()


def _diagonal_tiles(L: Tensor, block: int) -> Tensor:
    """`(tiles, block, block)`."""
    tiles: Tensor = L.unflatten(1, (-1, block)).unflatten(0, (-1, block)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    return tiles


def _search_tables(levels: Tensor | None, like: Tensor) -> tuple[Tensor | None, Tensor | None, int]:
    """Levels, the middles between them, filled up with infinities, and the steps of a search among them: 0, where codes are levels."""
    if levels is None:
        return None, None, 0
    table = levels.to(like)
    bits = max(1, (len(table) - 1).bit_length())
    middles = torch.full((2**bits - 1,), torch.inf, dtype=like.dtype, device=like.device)
    middles[: len(table) - 1] = (table[1:] + table[:-1]) / 2
    return table, middles, bits


@triton.jit
def _divided(x, y):
    """The quotient, correctly rounded: `/` of two float32 is not."""
    return tl.div_rn(x, y) if x.dtype == tl.float32 else x / y


@triton.jit
def _nearest(units, levels, middles, low, high, BITS: tl.constexpr):
    """Codes and levels nearest to values in units of the step; halves go to the even integer, or to the lower level."""
    if BITS == 0:
        units = tl.minimum(tl.maximum(units, low), high)
        level = tl.floor(units)
        rest = units - level
        odd = (level.to(tl.int32) & 1) == 1
        level += ((rest > 0.5) | ((rest == 0.5) & odd)).to(level.dtype)
        code = level.to(tl.int32)
    else:
        index = tl.zeros_like(units).to(tl.int32)
        for bit in tl.static_range(BITS):
            probe = index + (1 << (BITS - 1 - bit))
            index = tl.where(units > tl.load(middles + probe - 1), probe, index)
        code = index + low
        level = tl.load(levels + index)
    return code, level


@triton.jit(do_not_specialize=["left", "bottom"])
def _feedback_tile(
    W,
    step,
    offset,
    levels,
    middles,
    from_columns,
    from_rows,
    L_out,
    L_in,
    E,
    Y,
    codes,
    left,
    bottom,
    down,
    across,
    low,
    high,
    BITS: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One tile. `8 BLOCK^2` flops for each of `2 BLOCK - 1` diagonals, as many bytes read from the two factors' tiles, which stay near."""
    number = tl.program_id(0).to(tl.int64)
    j, i = left + number, bottom - number
    row, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    lane = tl.arange(0, BLOCK)
    column_part = tl.load(from_columns + ((down - 1 - i) * BLOCK + row) * (across * BLOCK) + j * BLOCK + column)
    row_part = tl.load(from_rows + ((j * down + i) * BLOCK + row) * BLOCK + column)
    for turn in range(2 * BLOCK - 1):
        diagonal = 2 * BLOCK - 2 - turn
        at = diagonal - lane  # each row's column
        here = (at >= 0) & (at < BLOCK)
        on = row + column == diagonal
        fed = tl.sum(tl.where(on, column_part, 0.0), 1)
        entry = (i * BLOCK + lane) * (across * BLOCK) + j * BLOCK + at
        w = tl.load(W + entry, mask=here, other=0.0)
        size = tl.load(step + entry, mask=here, other=0.0)
        target = w + fed + tl.sum(tl.where(on, row_part, 0.0), 1)
        if OFFSET:
            shift = tl.load(offset + entry, mask=here, other=0.0)
            target -= shift
        units = tl.where(size == 0, 0.0, _divided(target, tl.where(size == 0, 1.0, size)))
        code, level = _nearest(units, levels, middles, low, high, BITS)
        value = level * size
        if OFFSET:
            value += shift
        error = w - value  # zero where there is no entry, like all else that is loaded there
        passed = error + fed
        tl.store(codes + entry, code.to(tl.int8), mask=here)
        out = (number * BLOCK + lane) * BLOCK + at
        tl.store(E + out, error, mask=here)
        tl.store(Y + out, passed, mask=here)
        passed_by_column = tl.sum(tl.where(on, passed[:, None], 0.0), 0)
        source = diagonal - column  # each column's row
        right_of = tl.load(L_in + (j * BLOCK + at[:, None]) * BLOCK + column, mask=here[:, None], other=0.0)
        below = tl.load(L_out + (i * BLOCK + row) * BLOCK + source, mask=(source >= 0) & (source < BLOCK), other=0.0)
        column_part += error[:, None] * right_of
        row_part += below * passed_by_column[None, :]


@triton.jit(do_not_specialize=["height", "width"])
def _sweep_tile(
    P,
    H_out,
    H_in,
    step,
    offset,
    levels,
    middles,
    W_hat,
    codes,
    change,
    where,
    height,
    width,
    low,
    high,
    BITS: tl.constexpr,
    OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The tile `where[program]`, the program's of `P` and `change`. A change reads `COLUMNS` values of `H_in`, a row `ROWS` of `H_out`."""
    number = tl.program_id(0).to(tl.int64)
    top, left = tl.load(where + 2 * number) * ROWS, tl.load(where + 2 * number + 1) * COLUMNS
    lane, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    slopes = tl.load(P + (number * ROWS + lane[:, None]) * COLUMNS + column[None, :])
    curvature_in = tl.load(H_in + (left + column) * (width + 1))
    for row in range(ROWS):
        here = (top + row) * width + left + column
        weights = tl.load(H_out + (top + row) * height + top + lane)
        own = tl.sum(tl.where(lane == row, weights, 0.0), 0)
        slope = tl.sum(tl.where(lane[:, None] == row, slopes, 0.0), 0)
        curvature = own * curvature_in
        size = tl.load(step + here)
        value = tl.load(W_hat + here)
        code = tl.load(codes + here).to(tl.int32)
        if OFFSET:
            shift = tl.load(offset + here)
        moved = tl.zeros_like(slope)
        start = 0
        while start < COLUMNS:
            target = value + _divided(slope, tl.where(curvature == 0, 1.0, curvature))
            if OFFSET:
                target -= shift
            units = tl.where(size == 0, 0.0, _divided(target, tl.where(size == 0, 1.0, size)))
            wanted, level = _nearest(units, levels, middles, low, high, BITS)
            aim = level * size
            if OFFSET:
                aim += shift
            turn = aim - value
            lowers = (turn * slope - 0.5 * turn * turn * curvature > 0) & (wanted != code) & (column >= start)
            place = tl.min(tl.where(lowers, column, COLUMNS), 0)
            chosen = column == place
            taken = tl.sum(tl.where(chosen, turn, 0.0), 0)
            code = tl.where(chosen, wanted, code)
            value = tl.where(chosen, aim, value)
            any_left = place + tl.zeros_like(column) < COLUMNS  # a scalar's mask is refused by the interpreter of Triton 3.9
            pull = taken * tl.load(H_in + (left + place) * width + left + column, mask=any_left, other=0.0)
            slope -= own * pull
            moved += pull
            start = place + 1
        tl.store(change + (number * ROWS + row) * COLUMNS + column, value - tl.load(W_hat + here))
        tl.store(W_hat + here, value)
        tl.store(codes + here, code.to(tl.int8))
        slopes -= tl.where(lane[:, None] > row, weights[:, None] * moved[None, :], 0.0)
