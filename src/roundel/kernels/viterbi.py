"""Best paths through a shift register, compiled: the twin of `linalg.viterbi`, equal to it bit for bit.

Problem: `2^L` states a step, 256 steps a tile, and nothing but a minimum of `2^k` numbers and `2^k` sums for each group of as many
states. Three things decide the time:

- *No shuffles.* `LANES` tiles are coded together, the last axis of every array, so a vector holds one state of all of them, an entry of
  the code is loaded once for all, and each instruction is a plain one on whole vectors. `_groups` states them in LLVM's own
  terms, since the loop vectoriser does not see that the streams of a group are apart.
- *Memory.* Costs of `LANES` tiles take `2^L 4 LANES` bytes, twice: more than a core's own cache. So `f` short steps are made at once: the
  `2^(f k)` states that share their other bits go through them among themselves, as in a fast Fourier transform, in registers. They are
  read as streams, side by side, and written one after another. Rows are padded (`PAD`), or the streams, a power of two
  apart, would use a few sets of the cache only. Larger blocks, in a buffer, were slower: their reads jump, and are not foreseen.
- *Choices.* Up to `2^k = 8` a tournament's comparisons are kept as they are, one bit of each lane; from there on a byte each. They
  are written in the order in which they are found. At most `steps 2^(L-k)` bytes a tile, and for 2 bits `3/8` of that.

Threads are Python's, as many as torch uses; a worker owns one workspace and takes the next `LANES` tiles when it is free.

Not done: fewer lanes for fewer than `LANES` tiles; leaving out states that a fixed edge cannot reach.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from torch import Tensor

from roundel.linalg.viterbi import reversed_code

__all__ = ["circular_path"]

LANES = 8
"""Tiles coded together: vectors of 32 bytes, the widest that all x86 machines of the last ten years have."""

ROW_BITS, PAD = 8, 2
"""In the arrays of costs `PAD` vectors, a cache line, are left free after each `2^ROW_BITS` states."""

FUSED_BITS, UNROLLED = 4, 16
"""Steps of together up to 4 bits are made at once, in registers, on 16 states; groups of more states are a loop over so many."""

MASKED_BITS = 3
"""Symbols of up to so many bits keep comparisons, longer ones bytes."""

_Array = np.ndarray[Any, np.dtype[Any]]


def circular_path(
    targets: Tensor, code: Tensor, shift: int, weights: Tensor | None = None, *, candidates: int = 1, reach: int
) -> tuple[Tensor, Tensor]:
    """Twin of `linalg.viterbi.circular_path`: `(tiles, steps, values)` float32 to states `(tiles, steps)` and costs `(tiles,)`."""
    tiles, steps, values = targets.shape
    lanes = -(-tiles // LANES)
    wanted, weigh = _interleaved(targets), _interleaved(torch.ones_like(targets) if weights is None else weights)
    forward, backward = (table.contiguous().flatten().numpy() for table in (code, reversed_code(code)))
    states, groups = code.shape[0], code.shape[0] >> shift
    fused = math.gcd(max(1, FUSED_BITS // shift), steps, reach)
    pad = _padding(states >> shift * fused)
    found, cost = np.empty((lanes * LANES, steps), np.int64), np.full(lanes * LANES, np.nan, np.float32)
    waiting = iter(range(lanes))

    def work(_: int) -> None:
        front, back, choices = _workspace(states, steps, shift)
        fixed = (0,) * shift, (0,) * fused, (0,) * values
        for i in _shared(waiting):
            here, given = slice(i * LANES, (i + 1) * LANES), (wanted[i], weigh[i])
            seam = np.zeros((groups, LANES), np.float32)
            for begin, direction, table in ((steps - reach, 1, forward), (reach - 1, -1, backward)):
                front[:] = 0
                front, back = _advance(*given, begin, direction, reach, table, *fixed, front, back, None)
                _add_costs_of_edges(front, states, shift, pad, direction < 0, seam)
            for _ in range(candidates):
                edges = seam.argmin(0)
                seam[edges, np.arange(LANES)] = np.inf
                _start(front, states, shift, pad, edges)
                front, back = _advance(*given, 0, 1, steps, forward, *fixed, front, back, choices)
                _trace(front, states, shift, fused, edges, choices, found[here], cost[here])

    workers = min(torch.get_num_threads(), lanes)
    if workers <= 1:
        work(0)
    else:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(work, range(workers)))
    return torch.from_numpy(found[:tiles]), torch.from_numpy(cost[:tiles])


def _shared(waiting: Iterator[int]) -> Iterator[int]:
    """What is left of an iterator that several threads take from."""
    while (item := next(waiting, None)) is not None:
        yield item


def _interleaved(x: Tensor) -> _Array:
    """`(lane groups, steps * values * LANES)`, filled up with zeros."""
    padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, -x.shape[0] % LANES))
    arranged: _Array = padded.unflatten(0, (-1, LANES)).permute(0, 2, 3, 1).contiguous().flatten(1).numpy()
    return arranged


def _workspace(states: int, steps: int, shift: int) -> tuple[_Array, _Array, _Array]:
    """Two arrays of costs, from a cache line on, and the choices."""
    size = (states + (states >> ROW_BITS) * PAD) * LANES
    both = np.empty(2 * size + 16, np.float32)  # one array: large ones get large pages
    both = both[-both.ctypes.data % 64 // 4 :][: 2 * size]
    entry = (2**shift - 1) * LANES // 8 if shift <= MASKED_BITS else LANES
    return both[:size], both[size:], np.empty(steps * (states >> shift) * entry, np.uint8)


class _Vectors:
    """Vectors of `LANES` numbers in the code that is being generated."""

    floats = ir.VectorType(ir.FloatType(), LANES)
    integers = ir.VectorType(ir.IntType(32), LANES)
    bytes = ir.VectorType(ir.IntType(8), LANES)
    mask = ir.IntType(LANES)

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.builder = builder

    @staticmethod
    def index(number: int) -> ir.Constant:
        return ir.Constant(ir.IntType(64), number)

    def at(self, start: Any, stride: Any, times: Any) -> Any:
        return self.builder.add(start, self.builder.mul(stride, times))

    def address(self, pointer: Any, index: Any, kind: ir.Type, unit: int) -> Any:
        """Of the `index`-th run of `unit` elements."""
        start = self.builder.gep(pointer, [self.builder.mul(index, self.index(unit))])
        return self.builder.bitcast(start, kind.as_pointer())

    def load(self, pointer: Any, index: Any) -> Any:
        return self.builder.load(self.address(pointer, index, self.floats, LANES), align=4)

    def store(self, value: Any, pointer: Any, index: Any) -> None:
        self.builder.store(value, self.address(pointer, index, self.floats, LANES), align=4)

    @classmethod
    def names(cls, count: int) -> list[Any]:
        """The numbers `0 .. count - 1`."""
        return [ir.Constant(cls.integers, [number] * LANES) for number in range(count)]

    def spread(self, scalar: Any, kind: ir.VectorType) -> Any:
        nothing = ir.Constant(kind, ir.Undefined)
        first = self.builder.insert_element(nothing, scalar, ir.Constant(ir.IntType(32), 0))
        return self.builder.shuffle_vector(first, nothing, ir.Constant(self.integers, [0] * LANES))

    def least(self, values: list[Any], names: list[Any] | None) -> tuple[Any, Any, list[Any]]:
        """The least of each lane, the first of equal ones; its name, if names are given; and the comparisons, pairs first."""
        comparisons = []
        while len(values) > 1:
            pairs = range(0, len(values), 2)
            better = [self.builder.fcmp_ordered("<", values[i + 1], values[i]) for i in pairs]
            values = [self.builder.select(b, values[i + 1], values[i]) for b, i in zip(better, pairs, strict=True)]
            if names is not None:
                names = [self.builder.select(b, names[i + 1], names[i]) for b, i in zip(better, pairs, strict=True)]
            comparisons += better
        return values[0], None if names is None else names[0], comparisons


@intrinsic  # type: ignore[untyped-decorator]
def _groups(  # noqa: ANN202
    context: Any,
    symbol: Any,
    fused: Any,
    value: Any,
    source: Any,
    source_at: Any,
    source_stride: Any,
    goal: Any,
    goal_at: Any,
    goal_stride: Any,
    code: Any,
    edge: Any,
    edges: Any,
    targets: Any,
    weights: Any,
    step: Any,
    direction: Any,
    choices: Any,
    choice_at: Any,
):
    """Those states that share all but their highest `f k` bits, `f` steps on: in each the least of `2^k` old costs, and `2^k` new ones.

    Numbers known when compiling are the lengths of the tuples `symbol`, the symbol's bits `k`, `fused`, the steps `f`, and `value`.
    `edge` is
    what the states share, one of `edges`. Positions and strides count vectors in `source` and `goal`, entries in `choices`, of which none
    are kept if it is None.
    """
    k, steps, values = len(symbol), len(fused), len(value)
    n, size = 1 << k, 1 << (k * steps)
    keep = not isinstance(choices, types.NoneType)
    masks = k <= MASKED_BITS
    at = types.intp
    signature = types.void(symbol, fused, value, source, at, at, goal, at, at, code, at, at, targets, weights, at, at, choices, at)
    arrays = {"source": 3, "goal": 6, "code": 9, "targets": 12, "weights": 13} | ({"choices": 16} if keep else {})

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        v = _Vectors(builder)
        pointer = {name: context.make_array(signature.args[i])(context, builder, given[i]).data for name, i in arrays.items()}
        source_at, source_stride, goal_at, goal_stride, edge, edges, step, direction, choice_at = (
            given[i] for i in (4, 5, 7, 8, 10, 11, 14, 15, 17)
        )

        def old(c: Any) -> Any:
            return v.load(pointer["source"], v.at(source_at, source_stride, c))

        def constants(at: int) -> tuple[list[Any], list[Any]]:
            """Targets and weights of a step."""
            now = v.at(step, direction, v.index(at))
            places = [v.at(v.index(i), now, v.index(values)) for i in range(values)]
            return [v.load(pointer["targets"], place) for place in places], [v.load(pointer["weights"], place) for place in places]

        def new(best: Any, state: Any, wanted: list[Any], weigh: list[Any]) -> Any:
            total = None
            for i in range(values):
                entry = builder.load(builder.gep(pointer["code"], [v.at(v.index(i), state, v.index(values))]))
                difference = builder.fsub(wanted[i], v.spread(entry, v.floats))
                term = builder.fmul(builder.fmul(difference, difference), weigh[i])
                total = term if total is None else builder.fadd(total, term)
            return builder.fadd(total, best)

        # Kept at once: left to the end, the old costs would have to be held for them.
        def note(number: int, comparisons: list[Any], name: Any) -> None:
            """Keeps the choice of the group of that number."""
            if keep and masks:
                entry = v.address(pointer["choices"], choice_at, v.mask, steps * (size >> k) * (n - 1) * LANES // 8)
                for i, comparison in enumerate(comparisons):
                    at = builder.gep(entry, [v.index(number * (n - 1) + i)])
                    builder.store(builder.bitcast(comparison, v.mask), at, align=1)
            elif keep:
                entry = v.address(pointer["choices"], choice_at, v.bytes, steps * (size >> k) * LANES)
                builder.store(builder.trunc(name, v.bytes), builder.gep(entry, [v.index(number)]), align=1)

        if size <= UNROLLED:
            cost = [old(v.index(c)) for c in range(size)]
            number = 0
            for a in range(steps):
                wanted, weigh = constants(a)
                right = 1 << (k * (steps - 1 - a))
                following = list(cost)
                # Before step a the state with the bits [c][r][edge][h] is number [h][c][r]: c is forgotten now, h has come in.
                for h in range(1 << (k * a)):
                    for r in range(right):
                        group = [(h * n + c) * right + r for c in range(n)]
                        best, name, compared = v.least([cost[c] for c in group], v.names(n) if keep and not masks else None)
                        note(number, compared, name)
                        number += 1
                        shared = v.at(v.index(h), v.at(edge, edges, v.index(r)), v.index(1 << (k * a)))
                        for j, place in enumerate(group):
                            following[place] = new(best, v.at(v.index(j), shared, v.index(n)), wanted, weigh)
                cost = following
            for c, least in enumerate(cost):
                v.store(least, pointer["goal"], v.at(goal_at, goal_stride, v.index(c)))
            return context.get_dummy_value()

        best_yet = cgutils.alloca_once_value(builder, ir.Constant(v.floats, [float("inf")] * LANES))
        name_yet = cgutils.alloca_once_value(builder, ir.Constant(v.integers, [0] * LANES))
        with cgutils.for_range(builder, v.index(n // UNROLLED)) as loop:
            first = builder.mul(loop.index, v.index(UNROLLED))
            costs = [old(builder.add(first, v.index(c))) for c in range(UNROLLED)]
            best, name, _ = v.least(costs, v.names(UNROLLED) if keep else None)
            better = builder.fcmp_ordered("<", best, builder.load(best_yet))
            builder.store(builder.select(better, best, builder.load(best_yet)), best_yet)
            if keep:
                name = builder.add(name, v.spread(builder.trunc(first, ir.IntType(32)), v.integers))
                builder.store(builder.select(better, name, builder.load(name_yet)), name_yet)
        note(0, [], builder.load(name_yet))
        best, (wanted, weigh) = builder.load(best_yet), constants(0)
        with cgutils.for_range(builder, v.index(n // UNROLLED)) as loop:
            for j in range(UNROLLED):
                number = v.at(v.index(j), loop.index, v.index(UNROLLED))
                value = new(best, v.at(number, edge, v.index(n)), wanted, weigh)
                v.store(value, pointer["goal"], v.at(goal_at, goal_stride, number))
        return context.get_dummy_value()

    return signature, generate


@numba.njit(nogil=True, cache=True)
def _padding(groups: int) -> int:
    """Vectors left free after each row: none where a stride would not be the same everywhere."""
    return PAD if groups >> ROW_BITS else 0


@numba.njit(nogil=True, cache=True)
def _place(state: int, pad: int) -> int:
    """Where the costs of a state are, in vectors."""
    return state + (state >> ROW_BITS) * pad


@numba.njit(nogil=True, cache=True)
def _advance(
    targets: _Array,
    weights: _Array,
    begin: int,
    direction: int,
    steps: int,
    code: _Array,
    symbol: Any,
    fused: Any,
    value: Any,
    front: _Array,
    back: _Array,
    choices: Any,
) -> tuple[_Array, _Array]:
    """The costs after `steps` steps, from those in `front`, and the other array."""
    f = len(fused)
    digit = len(symbol) * f
    edges = len(code) // len(value) >> digit
    pad = _padding(edges)
    apart = _place(edges, pad)
    for t in range(0, steps, f):
        now, at = begin + direction * t, t // f * edges
        for edge in range(edges):
            here, there = _place(edge, pad), _place(edge << digit, pad)
            _groups(
                symbol,
                fused,
                value,
                front,
                here,
                apart,
                back,
                there,
                1,
                code,
                edge,
                edges,
                targets,
                weights,
                now,
                direction,
                choices,
                at + edge,
            )
        front, back = back, front
    return front, back


@numba.njit(nogil=True, cache=True)
def _choice(choices: _Array, states: int, k: int, f: int, t: int, edge: int, lane: int) -> int:
    """The bits that the best state of an edge had above it before step `t`."""
    digit = k * f
    edges, groups, a = states >> digit, 1 << (digit - k), t % f
    # For step a of f the edge's bits are [r][shared][h].
    left, right = 1 << (k * a), 1 << (k * (f - 1 - a))
    h, shared, r = edge % left, edge // left % edges, edge // left // edges
    entry = ((t // f * edges + shared) * f + a) * groups + h * right + r
    if k > MASKED_BITS:
        return int(choices[entry * LANES + lane])
    first = entry * ((1 << k) - 1) * (LANES // 8)
    winner, level = 0, (1 << k) - 2  # comparisons of one level lie together, the last one at the end
    for count in range(k):
        bit = choices[first + level + winner] >> lane & 1
        winner = 2 * winner + bit
        level -= 2 << count
    return winner


@numba.njit(nogil=True, cache=True)
def _start(front: _Array, states: int, k: int, pad: int, edges: _Array) -> None:
    """Costs of a path that has cost nothing yet and must go on from each lane's edge."""
    groups = states >> k
    front[:] = np.inf
    for lane in range(LANES):
        for c in range(1 << k):
            front[_place(c * groups + edges[lane], pad) * LANES + lane] = 0


@numba.njit(nogil=True, cache=True)
def _add_costs_of_edges(front: _Array, states: int, k: int, pad: int, flip: bool, seam: _Array) -> None:
    """Adds each edge's least cost; if `flip`, to the edge with its bits reversed."""
    groups = states >> k
    for edge in range(groups):
        target, bit, mirrored = 0, 1, groups
        while bit < groups:
            mirrored >>= 1
            if edge & bit:
                target |= mirrored if flip else bit
            bit <<= 1
        for lane in range(LANES):
            best = front[_place(edge, pad) * LANES + lane]
            for c in range(1, 1 << k):
                best = min(best, front[_place(c * groups + edge, pad) * LANES + lane])
            seam[target, lane] += best


@numba.njit(nogil=True, cache=True)
def _trace(front: _Array, states: int, k: int, f: int, edges: _Array, choices: _Array, found: _Array, cost: _Array) -> None:
    """The states of each lane's best path that ends with its edge, and its cost, unless one that costs no more is there; nan: none is."""
    steps, groups, pad = found.shape[1], states >> k, _padding(states >> k * f)
    for lane in range(LANES):
        last = edges[lane]
        for c in range(1, 1 << k):
            state = c * groups + edges[lane]
            if front[_place(state, pad) * LANES + lane] < front[_place(last, pad) * LANES + lane]:
                last = state
        total = front[_place(last, pad) * LANES + lane]
        if total >= cost[lane]:
            continue
        cost[lane] = total
        for t in range(steps - 1, -1, -1):
            found[lane, t] = last
            edge = last >> k
            last = edge + _choice(choices, states, k, f, t, edge, lane) * groups
