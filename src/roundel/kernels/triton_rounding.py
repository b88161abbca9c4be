"""Feedback and descent sweeps on a GPU: batched products outside a tile, Triton inside it.

Twins of `rounding.feedback.feedback_waves` and, with whole rows as tiles, `rounding.descent.sweep_rows`: the same entries in the same
order by the same rule; sums are taken in another order, so that float32 codes can differ where a target lies at a boundary between two
codes.

*Feedback.* Tiles of an anti-diagonal do not depend on each other. One program takes a tile through its own `2 BLOCK - 1` anti-diagonals,
one row to a lane, and holds what has been fed to the tile so far in registers; two batched products then feed the tiles' errors to all
tiles on the left and above. Flops: at most `4 d_out d_in (d_out + d_in)` in products and `4 BLOCK` for an entry inside tiles (`8
BLOCK^2` for each diagonal, half of which has entries). Bytes: each of the `down + across - 1` waves reads and writes up to `2 min(down,
across) BLOCK` rows of all entries. Buffers are laid out so that a wave is a slice of each: row blocks from the last, column blocks from
the first.

*Sweep.* What is done to an entry depends on all changes of the rows above it and on those on its left, so it is one chain of changes. One
program walks along a row: it holds `SPAN` columns, jumps from change to change in them, each a row of `H_in` of that length, then
feeds the changes to the rest of the row. A second kernel, with all columns at once, takes a row's changes to `R` and to the rows below.
Bytes: `8 d_in` for each change, and for each row the rows below it in its block; a change waits for the memory once, about a microsecond.
Where `H_out` is diagonal all rows are walked at once.

Products are float32 only as long as torch is not told to take TF32 for them. Not done: several matrices in one call; one row on several
multiprocessors.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["feedback", "sweep"]

BLOCK = 64
"""Rows and columns of a tile of the feedback."""

SPAN = 256
"""Columns of a row that a program of the sweep holds."""

ROWS = 64
"""Rows whose `P = H_out R` is formed by one product."""

WIDE, DEEP = 1024, 8
"""Columns and changes that are taken at once to the rest of a row."""


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
    rows: int = ROWS,
    span: int = SPAN,
    wide: int = WIDE,
    deep: int = DEEP,
) -> Tensor:
    """Twin of `kernels.rounding.sweep`; `rows`, `span`, `wide` and `deep` are powers of two."""
    d_out, d_in = W.shape
    codes, step, H_in = codes.clone(memory_format=torch.contiguous_format), step.contiguous(), H_in.contiguous()
    shift = None if offset is None else offset.expand(W.shape).contiguous()
    units = codes.to(W.dtype) if levels is None else levels.to(W)[codes.long() - low]
    W_hat = units * step if shift is None else units * step + shift
    R = (W - W_hat) @ H_in
    curvature_out, curvature_in = H_out.diagonal().contiguous(), H_in.diagonal().contiguous()
    table, middles, bits = _search_tables(levels, W)
    alone = bool((H_out == torch.diag(curvature_out)).all())
    lists = d_out if alone else 1
    places = torch.empty(lists, d_in, dtype=torch.int32, device=W.device)
    changes = torch.empty(lists, d_in, dtype=W.dtype, device=W.device)
    found = torch.zeros(lists, dtype=torch.int32, device=W.device)

    def walk(P: Tensor, first: int, row: int, count: int) -> None:
        _walk[(count,)](
            P,
            H_in,
            curvature_out,
            curvature_in,
            step,
            shift,
            table,
            middles,
            W_hat,
            codes,
            places,
            changes,
            found,
            first,
            row,
            d_in,
            low,
            high,
            BITS=bits,
            OFFSET=offset is not None,
            SPAN=span,
            WIDE=wide,
            DEEP=deep,
            num_warps=max(1, span // 32),
            num_stages=1,
        )

    if alone:
        walk(curvature_out[:, None] * R, 0, 0, d_out)
        return codes
    across = max(16, wide // 16)
    for top in range(0, d_out, rows):
        P = H_out[top : top + rows] @ R
        coupling = H_out[top : top + rows, top : top + rows].contiguous()
        for row in range(len(P)):
            walk(P, top, row, 1)
            _spread[(triton.cdiv(d_in, across),)](
                P, R, coupling, H_in, places, changes, found, top, row, len(P), d_in, ROWS=rows, ACROSS=across, DEEP=4 * deep, num_stages=1
            )
    return codes


def _padded(matrix: Tensor, block: int) -> Tensor:
    """With zeros below and to the right, up to whole tiles."""
    padded: Tensor = torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % block, 0, -matrix.shape[0] % block))
    return padded.contiguous()


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


@triton.jit(do_not_specialize=["first", "row"])
def _walk(
    P,
    H_in,
    curvature_out,
    curvature_in,
    step,
    offset,
    levels,
    middles,
    W_hat,
    codes,
    places,
    changes,
    found,
    first,
    row,
    d_in,
    low,
    high,
    BITS: tl.constexpr,
    OFFSET: tl.constexpr,
    SPAN: tl.constexpr,
    WIDE: tl.constexpr,
    DEEP: tl.constexpr,
):
    """Row `row + program` of `P`, `first` rows further down of the weight: its changes in order, listed for that program.

    What one thread stores others load after a barrier: the list, and the rest of the row of `P`.
    """
    program = tl.program_id(0)
    P += (row + program).to(tl.int64) * d_in
    here = (first + row + program).to(tl.int64) * d_in
    places += program.to(tl.int64) * d_in
    changes += program.to(tl.int64) * d_in
    weight = tl.load(curvature_out + first + row + program)
    count = 0
    for left in range(0, d_in, SPAN):
        tl.debug_barrier()
        column = left + tl.arange(0, SPAN)
        inside = column < d_in
        slope = tl.load(P + column, mask=inside, other=0.0)
        curvature = weight * tl.load(curvature_in + column, mask=inside, other=1.0)
        size = tl.load(step + here + column, mask=inside, other=0.0)
        value = tl.load(W_hat + here + column, mask=inside, other=0.0)
        code = tl.load(codes + here + column, mask=inside, other=0).to(tl.int32)
        if OFFSET:
            shift = tl.load(offset + here + column, mask=inside, other=0.0)
        end = left + SPAN
        before = count
        start = left
        while start < end:
            target = value + _divided(slope, curvature)
            if OFFSET:
                target -= shift
            units = tl.where(size == 0, 0.0, _divided(target, tl.where(size == 0, 1.0, size)))
            wanted, level = _nearest(units, levels, middles, low, high, BITS)
            aim = level * size
            if OFFSET:
                aim += shift
            change = aim - value
            lowers = (change * slope - 0.5 * change * change * curvature > 0) & (wanted != code) & (column >= start) & inside
            place = tl.min(tl.where(lowers, column, end), 0)
            taken = tl.sum(tl.where(column == place, change, 0.0), 0)
            code = tl.where(column == place, wanted, code)
            tl.store(places + count, place, mask=place < end)
            tl.store(changes + count, taken, mask=place < end)
            count += (place < end).to(tl.int32)
            chosen = place + tl.zeros_like(column) < end  # a scalar's mask is refused by the interpreter of Triton 3.9
            near = tl.load(H_in + place.to(tl.int64) * d_in + column, mask=inside & chosen, other=0.0)
            slope -= weight * (taken * near)
            start = place + 1
        tl.store(codes + here + column, code.to(tl.int8), mask=inside)
        tl.debug_barrier()
        if count > before:
            for begin in range(end, d_in, WIDE):
                far = begin + tl.arange(0, WIDE)
                moved = _moved(H_in, places, changes, before, count, far, d_in, DEEP)
                old = tl.load(P + far, mask=far < d_in, other=0.0)
                tl.store(P + far, old - weight * moved, mask=far < d_in)
    tl.store(found + program, count)


@triton.jit
def _moved(H_in, places, changes, begin, end, column, d_in, DEEP: tl.constexpr):
    """What listed changes move in these columns: `sum_k change_k H_in[place_k, column]`, `DEEP` of them at once."""
    moved = tl.zeros_like(tl.load(H_in + column, mask=column < d_in, other=0.0))
    for k in range(begin, end, DEEP):
        which = k + tl.arange(0, DEEP)
        place = tl.load(places + which, mask=which < end, other=0).to(tl.int64)
        change = tl.load(changes + which, mask=which < end, other=0.0)
        known = (which < end)[:, None] & (column < d_in)[None, :]
        moved += tl.sum(change[:, None] * tl.load(H_in + place[:, None] * d_in + column[None, :], mask=known, other=0.0), 0)
    return moved


@triton.jit(do_not_specialize=["first", "row", "rows"])
def _spread(
    P,
    R,
    coupling,
    H_in,
    places,
    changes,
    found,
    first,
    row,
    rows,
    d_in,
    ROWS: tl.constexpr,
    ACROSS: tl.constexpr,
    DEEP: tl.constexpr,
):
    """A row's changes, in `ACROSS` columns, taken to that row of `R` and to the rows of `P` below it. `4 d_in` bytes a change in all."""
    column = tl.program_id(0) * ACROSS + tl.arange(0, ACROSS)
    inside = column < d_in
    moved = _moved(H_in, places, changes, 0, tl.load(found), column, d_in, DEEP)
    at = (first + row).to(tl.int64) * d_in + column
    tl.store(R + at, tl.load(R + at, mask=inside, other=0.0) - moved, mask=inside)
    other = tl.arange(0, ROWS)
    below = (other > row) & (other < rows)
    pull = tl.load(coupling + other * rows + row, mask=below, other=0.0)
    at = other[:, None].to(tl.int64) * d_in + column[None, :]
    both = below[:, None] & inside[None, :]
    tl.store(P + at, tl.load(P + at, mask=both, other=0.0) - pull[:, None] * moved[None, :], mask=both)
