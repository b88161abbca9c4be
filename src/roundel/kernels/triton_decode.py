"""Few rows times a packed weight on a GPU: codes are decoded in registers and multiplied at once, so that only packed bits are read.

    y = x W~^T,     x (m, d_in), m <= ROWS,     y (m, d_out) float32

for integers with a scale (and a zero point) for each group of columns, and for trellises. Twins of `grid.dequantize` followed by a product:
weights are decoded in float32 by the same operations, taken to the type of `x`, and the products summed in float32.

One program takes `BLOCK_OUT` rows of the weight and a part of the columns, `BLOCK_IN` at a time; the parts are added up in a fixed order.
A code or a state is a run of at most 16 bits, read from one or two words. What a state stands for is computed (`linalg.codebooks`); only
`hyb` looks up its table of 2 KB. Cost: `2 m d_in d_out` flops in matrix units, 10 to 20 integer operations a weight, `bits / 8` bytes a
weight from memory. Sizes are arguments: only bits, code and type make another compilation. Loads are not pipelined: gathered words would
be copied to shared memory first, more than some GPUs have; other programs of the same processor fill the time.

Not done: more rows than `ROWS`, where it pays to decode once and multiply densely; other grids; rotations, which are the caller's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["ROWS", "multiply_integers", "multiply_trellis"]

ROWS = 16
"""Most rows of `x`: what a matrix unit takes at once."""

BLOCK_OUT, BLOCK_IN = 32, 128
"""Rows and columns of the weight that a program has in registers."""

PROGRAMS = 512
"""As many programs are started, if there are as many blocks of columns."""

TILE = 256
"""Weights of a trellis's tile."""


def multiply_integers(
    x: Tensor,
    words: Tensor,
    bits: int,
    low: int,
    scale: Tensor,
    zero: Tensor | None,
    shape: tuple[int, int],
    *,
    block: tuple[int, int] = (BLOCK_OUT, BLOCK_IN),
) -> Tensor:
    """`x W^T` with `W = (code - zero) scale`.

    Args:
        x: `(m, d_in)`.
        words: int32, rows of `bits`-bit codes, each filled up to whole words.
        bits: Of a code.
        low: What is stored as 0.
        scale: `(d_out or 1, groups)`.
        zero: `(d_out, groups)` as a stream of `bits`-bit codes, counted as they are; None: 0.
        shape: `(d_out, d_in)`.
        block: Powers of two, at least 16.
    """
    d_out, d_in = shape
    groups = scale.shape[1]
    x, partial, grid, span = _prepared(x, shape, block)
    _integers[grid](
        x,
        words,
        scale,
        zero,
        partial,
        x.shape[0],
        d_out,
        d_in,
        words.numel() // d_out,
        0 if zero is None else zero.numel(),
        groups,
        d_in // groups,
        groups if scale.shape[0] > 1 else 0,
        low,
        span,
        BITS=bits,
        ZERO=zero is not None,
        ROWS=ROWS,
        BLOCK_OUT=block[0],
        BLOCK_IN=block[1],
        num_stages=1,
    )
    return partial.sum(0)


def multiply_trellis(
    x: Tensor,
    words: Tensor,
    code: str,
    shift: int,
    values: int,
    state_bits: int,
    table: Tensor | None,
    scale: Tensor,
    shape: tuple[int, int],
    tile: tuple[int, int],
    *,
    block: tuple[int, int] = (BLOCK_OUT, BLOCK_IN),
) -> Tensor:
    """`x W^T` with `W` a trellis's.

    Args:
        x: `(m, d_in)`.
        words: int32, tile by tile, symbols of `shift` bits from the last to the first.
        code: Name of the code.
        shift: Bits of a symbol.
        values: Weights of a symbol.
        state_bits: Of the register.
        table: With `hyb`, `(512, 2)` float16.
        scale: One float32 number.
        shape: `(d_out, d_in)`.
        tile: Rows and columns, powers of two with the product `TILE`.
        block: Powers of two, at least 16.
    """
    d_out, d_in = shape
    x, partial, grid, span = _prepared(x, shape, block)
    _trellis[grid](
        x,
        words,
        table,
        scale,
        partial,
        x.shape[0],
        d_out,
        d_in,
        -(-d_in // tile[1]),
        tile[0].bit_length() - 1,
        tile[1].bit_length() - 1,
        span,
        CODE=code,
        SHIFT=shift,
        VALUES=values,
        STATE_BITS=state_bits,
        TILE=TILE,
        ROWS=ROWS,
        BLOCK_OUT=block[0],
        BLOCK_IN=block[1],
        num_stages=1,
    )
    return partial.sum(0)


def _prepared(x: Tensor, shape: tuple[int, int], block: tuple[int, int]) -> tuple[Tensor, Tensor, tuple[int, int], int]:
    """Contiguous rows, room for the parts of the result, the programs, and how many columns each takes."""
    assert x.shape[0] <= ROWS
    down, across = triton.cdiv(shape[0], block[0]), triton.cdiv(shape[1], block[1])
    parts = max(1, min(across, PROGRAMS // down))
    span = triton.cdiv(across, parts) * block[1]
    parts = triton.cdiv(shape[1], span)
    return x.contiguous(), torch.empty(parts, x.shape[0], shape[0], device=x.device), (down, parts), span


@triton.jit
def _run(base, bit, following, inside, has_next, BITS: tl.constexpr, CROSSES: tl.constexpr):
    """`BITS` bits from `bit` on; those that are not in its word are the first of the word `following`."""
    first = tl.load(base + (bit >> 5), mask=inside, other=0).to(tl.uint32, bitcast=True)
    if CROSSES:
        second = tl.load(base + following, mask=inside & has_next, other=0).to(tl.uint32, bitcast=True)
        pair = first.to(tl.uint64) | (second.to(tl.uint64) << 32)
        found = (pair >> (bit & 31).to(tl.uint64)).to(tl.uint32)
    else:
        found = first >> (bit & 31).to(tl.uint32)
    return found & ((1 << BITS) - 1)


@triton.jit
def _store(out, total, m, d_out, ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr):
    lane, row = tl.arange(0, ROWS)[:, None], tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)[None, :]
    part = tl.program_id(1).to(tl.int64) * m
    tl.store(out + (part + lane) * d_out + row, total, mask=(lane < m) & (row < d_out))


@triton.jit(
    do_not_specialize=["m", "d_out", "d_in", "row_words", "zero_words", "groups", "width", "scale_stride", "low", "span"],
)
def _integers(
    x,
    words,
    scale,
    zero,
    out,
    m,
    d_out,
    d_in,
    row_words,
    zero_words,
    groups,
    width,
    scale_stride,
    low,
    span,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    lane = tl.arange(0, ROWS)[:, None]
    row = (tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT))[:, None].to(tl.int64)
    begin = tl.program_id(1) * span
    total = tl.zeros((ROWS, BLOCK_OUT), dtype=tl.float32)
    for left in range(begin, min(begin + span, d_in), BLOCK_IN):
        column = left + tl.arange(0, BLOCK_IN)[None, :]
        inside = (row < d_out) & (column < d_in)
        bit = column * BITS
        following = (bit >> 5) + 1
        code = _run(words + row * row_words, bit, following, inside, following < row_words, BITS, 32 % BITS != 0)
        level = code.to(tl.int32) + low
        group = column // width
        if ZERO:
            at = (row * groups + group) * BITS
            after = (at >> 5) + 1
            stored = _run(zero, at, after, inside, after < zero_words, BITS, 32 % BITS != 0)
            level -= stored.to(tl.int32) + low
        size = tl.load(scale + row * scale_stride + group, mask=inside, other=0.0).to(tl.float32)
        weight = level.to(tl.float32) * size
        inputs = tl.load(x + lane * d_in + column, mask=(lane < m) & (column < d_in), other=0.0)
        total = tl.dot(inputs, tl.trans(weight.to(inputs.dtype)), total, input_precision="ieee")
    _store(out, total, m, d_out, ROWS, BLOCK_OUT)


@triton.jit
def _byte_sum(word):
    return ((word & 255) + (word >> 8 & 255) + (word >> 16 & 255) + (word >> 24)).to(tl.int32)


@triton.jit
def _sum_of_halves(word):
    mixed = (word & 0x8FFF8FFF) ^ 0x3B603B60
    low = (mixed & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    high = (mixed >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    return (low + high).to(tl.float16).to(tl.float32)


@triton.jit
def _value(state, which, table, CODE: tl.constexpr, STATE_BITS: tl.constexpr):
    """What a state, uint32, stands for; of two values number `which`."""
    if CODE == "1mad":
        total = (_byte_sum(state * 34038481 + 76625530) - 510).to(tl.float32)
        value = tl.div_rn(total, tl.full(total.shape, 147.800537109375, tl.float32))
    elif CODE == "3inst":
        value = _sum_of_halves(state * 89226354 + 64248484)
    elif CODE == "mcg":
        value = _sum_of_halves(state * 0xCBAC1FED)
    elif CODE == "mul1":
        total = (_byte_sum(state * 0x83DCD12D) + 1024).to(tl.float32)
        value = (total * 0.00676727294921875 - 10.3828125).to(tl.float16).to(tl.float32)  # exact before it is rounded
    else:
        tl.static_assert(CODE == "hyb")
        state = state << (16 - STATE_BITS)
        mixed = state * (state + 1)
        entry = tl.load(table + (mixed >> 6 & 511).to(tl.int32) * 2 + which).to(tl.float32)
        value = tl.where((which == 0) & ((mixed >> 15 & 1) == 1), -entry, entry)
    return value


@triton.jit(do_not_specialize=["m", "d_out", "d_in", "across", "row_bits", "column_bits", "span"])
def _trellis(
    x,
    words,
    table,
    scale,
    out,
    m,
    d_out,
    d_in,
    across,
    row_bits,
    column_bits,
    span,
    CODE: tl.constexpr,
    SHIFT: tl.constexpr,
    VALUES: tl.constexpr,
    STATE_BITS: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    length: tl.constexpr = TILE // VALUES * SHIFT // 32
    lane = tl.arange(0, ROWS)[:, None]
    row = (tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT))[:, None]
    begin = tl.program_id(1) * span
    size = tl.load(scale)
    total = tl.zeros((ROWS, BLOCK_OUT), dtype=tl.float32)
    for left in range(begin, min(begin + span, d_in), BLOCK_IN):
        column = left + tl.arange(0, BLOCK_IN)[None, :]
        inside = (row < d_out) & (column < d_in)
        tile = (row >> row_bits).to(tl.int64) * across + (column >> column_bits)
        entry = ((row & ((1 << row_bits) - 1)) << column_bits) | (column & ((1 << column_bits) - 1))
        # the step of the register that writes an entry: the inverse of `grids.trellis.ORDER`, bit by bit
        step = (entry & 1) | (entry >> 2 & 2) | (entry >> 5 & 4) | (entry << 2 & 24) | (entry << 1 & 224)
        bit = SHIFT * (TILE // VALUES - 1 - step // VALUES)
        following = (bit >> 5) + 1
        following = tl.where(following < length, following, 0)
        state = _run(words + tile * length, bit, following, inside, True, STATE_BITS, True)
        weight = _value(state, step % VALUES, table, CODE, STATE_BITS) * size
        weight = tl.where(inside, weight, 0.0)
        inputs = tl.load(x + lane * d_in + column, mask=(lane < m) & (column < d_in), other=0.0)
        total = tl.dot(inputs, tl.trans(weight.to(inputs.dtype)), total, input_precision="ieee")
    _store(out, total, m, d_out, ROWS, BLOCK_OUT)
