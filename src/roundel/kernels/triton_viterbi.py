"""Best paths through a shift register on a GPU: the twin of `linalg.viterbi`, equal to it bit for bit.

Problem: see there. Costs of states are never stored, only the least of each edge, from which the costs after a step follow:

    best_(t+1)(edge) = min_c err(s, x_t) + best_t(s >> k),    s = edge + c 2^(L-k).

*Memory.* A program codes one tile. Its costs do not fit into registers together with the rest, so they are in global memory, two arrays
of `4 2^(L-k)` bytes, 64 KiB for 16 state bits and 2 new ones: read and written by one program only, they stay in its multiprocessor's
first-level cache or in the second. After each step a barrier; within a step nothing that is read is written. Choices are a byte for
each edge and step, written once, `steps 2^(L-k)` bytes a tile: 4 MiB. Tracing back reads one of them a step, one tile to a lane.

Cost of a step of a tile: `2^L (3 V + 2)` flops and `4 V 2^L` bytes of the code, 256 KiB from the second-level cache, which is the limit
where programs do not share it in the first. Steps: `steps + 2 reach`, and `steps` for each further candidate. Any number of tiles goes
into one call, so those of several matrices can be put together; the more than multiprocessors, the better.

No sums and products are fused, or costs would not be the specification's. Not done: several tiles to a program, which would share the code.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from roundel.linalg.viterbi import bit_reversal, reversed_code

__all__ = ["circular_path"]

BLOCK = 4096
"""Edges that a program holds at once."""

LANES = 32
"""Tiles that a program traces back."""


def circular_path(
    targets: Tensor, code: Tensor, shift: int, weights: Tensor | None = None, *, candidates: int = 1, reach: int
) -> tuple[Tensor, Tensor]:
    """Twin of `linalg.viterbi.circular_path`: `(tiles, steps, values)` float32 to states `(tiles, steps)` and costs `(tiles,)`."""
    tiles, steps, values = targets.shape
    groups = code.shape[0] >> shift
    edges = torch.arange(groups, device=targets.device)
    best = torch.empty(tiles, 2, groups, device=targets.device)
    choices = torch.empty(tiles, steps, groups, dtype=torch.uint8, device=targets.device)

    def advance(part: slice, flip: bool, keep: bool) -> Tensor:
        """The costs of edges, from those in `best[:, 0]`, after these steps."""
        wanted, weigh = (None if x is None else (x[:, part].flip(1) if flip else x[:, part]).contiguous() for x in (targets, weights))
        assert wanted is not None
        block = min(BLOCK, groups)
        _advance[(tiles,)](
            wanted,
            weigh,
            (reversed_code(code) if flip else code).contiguous(),
            best,
            choices,
            wanted.shape[1],
            WEIGHTS=weights is not None,
            KEEP=keep,
            VALUES=values,
            SHIFT=shift,
            GROUPS=groups,
            BLOCK=block,
            num_warps=max(1, block // 256),
            num_stages=1,
            enable_fp_fusion=False,
        )
        return best[:, wanted.shape[1] % 2]

    best[:, 0] = 0
    seam = advance(slice(steps - reach, None), flip=False, keep=False).clone()
    best[:, 0] = 0
    seam += advance(slice(0, reach), flip=True, keep=False)[:, bit_reversal(groups, targets.device)]
    found = torch.empty(tiles, steps, dtype=torch.int64, device=targets.device)
    cost = torch.full((tiles,), torch.nan, device=targets.device)  # nan: none yet
    for _ in range(candidates):
        edge = torch.where(seam == seam.amin(1, keepdim=True), edges, groups).amin(1, keepdim=True)  # the first of the least
        seam.scatter_(1, edge, torch.inf)
        best[:, 0] = torch.where(edges == edge, 0.0, torch.inf)
        its_cost = advance(slice(None), flip=False, keep=True).gather(1, edge).squeeze(1)
        better = ~(its_cost >= cost)
        cost = torch.where(better, its_cost, cost)
        _trace[(triton.cdiv(tiles, LANES),)](
            choices, edge, better, found, tiles, steps, SHIFT=shift, GROUPS=groups, LANES=LANES, num_warps=1, num_stages=1
        )
    return found, cost


@triton.jit
def _advance(
    targets,
    weights,
    code,
    best,
    choices,
    steps,
    WEIGHTS: tl.constexpr,
    KEEP: tl.constexpr,
    VALUES: tl.constexpr,
    SHIFT: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`steps` steps of one tile, from the costs in the first of its two arrays, in turn into the other. Of equal costs the first stays."""
    tile = tl.program_id(0).to(tl.int64)
    targets += tile * steps * VALUES
    if WEIGHTS:
        weights += tile * steps * VALUES
    best += tile * 2 * GROUPS
    choices += tile * steps * GROUPS
    for t in range(steps):
        source, goal = best + (t % 2) * GROUPS, best + (1 - t % 2) * GROUPS
        for start in range(0, GROUPS, BLOCK):
            edge = start + tl.arange(0, BLOCK)
            least = tl.full((BLOCK,), float("inf"), tl.float32)
            choice = tl.zeros((BLOCK,), tl.int32)
            for c in range(1 << SHIFT):
                state = edge + c * GROUPS
                error = tl.zeros((BLOCK,), tl.float32)
                for v in tl.static_range(VALUES):
                    difference = tl.load(code + state * VALUES + v) - tl.load(targets + t * VALUES + v)
                    term = difference * difference
                    if WEIGHTS:
                        term *= tl.load(weights + t * VALUES + v)
                    error += term
                cost = error + tl.load(source + (state >> SHIFT))
                choice = tl.where(cost < least, c, choice)
                least = tl.where(cost < least, cost, least)
            tl.store(goal + edge, least)
            if KEEP:
                tl.store(choices + edge, choice.to(tl.uint8))
        choices += GROUPS
        tl.debug_barrier()


@triton.jit
def _trace(
    choices,
    edges,
    wanted,
    found,
    tiles,
    steps,
    SHIFT: tl.constexpr,
    GROUPS: tl.constexpr,
    LANES: tl.constexpr,
):
    """The states of the best paths that end with these edges, of those tiles where they are wanted; one dependent load a step."""
    tile = tl.program_id(0) * LANES + tl.arange(0, LANES)
    known = tile < tiles
    edge = tl.load(edges + tile, mask=known, other=0)
    keep = known & (tl.load(wanted + tile, mask=known, other=0) != 0)
    for turn in range(steps):
        at = tile.to(tl.int64) * steps + steps - 1 - turn
        state = edge + tl.load(choices + at * GROUPS + edge, mask=known, other=0).to(tl.int64) * GROUPS
        tl.store(found + at, state, mask=keep)
        edge = state >> SHIFT
