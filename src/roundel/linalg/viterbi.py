"""Best paths through a shift register: the specification of trellis coding, for any device.

Problem: a register of `L` bits takes in a symbol of `k` bits each step, `state' = ((state << k) | symbol) mod 2^L`, and stands for `V`
values,
`code[state]`. Find the symbols whose values come nearest to targets in weighted squares. States with the same low `L - k` bits, their
*edge*, have the same `2^k` successors, so with `err(s, x) = sum_v weight_v (code[s, v] - x_v)^2`

    cost_t(s) = err(s, x_t) + min_c cost_(t-1)(edge + c 2^(L-k)),   edge = s >> k,

and only the minimising `c` of each edge is kept, a byte (Viterbi 1967). Of equal costs the least `c` wins. A step costs `2^L (3 V + 2)`
flops a tile; choices take `steps 2^(L-k)` bytes, of which nothing else is ever held for more than one step.

A circular path begins with the edge with which it ends. Which one is found first: costs of the best paths *into* each edge over
the last `reach` steps, plus those *out of* it over the first `reach` steps, are the exact costs of the best open paths through each edge
at the seam; the cheapest edges are then tried in turn as the fixed start and end (Tseng et al. 2024, arXiv 2406.11235, section 3.4, find
one edge by tracing back a path; here no choices are kept for it, and every edge has its cost). Out of is into for a register that
runs backwards: with the bits of states reversed it is again a shift register.

All costs are float32, summed in the stated order: `kernels.viterbi` is the compiled twin, equal bit for bit.

Not done: the best circular path over all edges (`2^(L-k)` runs), lists or beams of paths.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

__all__ = ["circular_path", "edge_costs", "path", "reversed_code", "states_of"]


def path(
    targets: Float[Tensor, "tiles steps values"],
    code: Float[Tensor, "states values"],
    shift: int,
    weights: Float[Tensor, "tiles steps values"] | None = None,
    edges: Int[Tensor, " tiles"] | None = None,
) -> tuple[Integer[Tensor, "tiles steps"], Float[Tensor, " tiles"]]:
    """The states of the best path and its cost; with `edges`, of the best path that begins and ends with that edge."""
    tiles, steps, _ = targets.shape
    states = code.shape[0]
    groups = states >> shift
    cost = _start(tiles, states, shift, edges, targets.device)
    choices = torch.empty(steps, tiles, groups, dtype=torch.uint8, device=targets.device)
    for t in range(steps):
        best, choices[t] = _best(cost, shift)
        cost = _add_errors(best, targets[:, t], code, None if weights is None else weights[:, t])
    if edges is None:
        total, last = cost.min(1)[0], (cost == cost.min(1, keepdim=True)[0]).byte().argmax(1)
    else:
        ends = (torch.arange(1 << shift, device=cost.device) * groups + edges.unsqueeze(1)).long()
        best, choice = _best(cost.gather(1, ends), shift)
        total, last = best.squeeze(1), ends.gather(1, choice.long()).squeeze(1)
    found = torch.empty(tiles, steps, dtype=torch.int64, device=cost.device)
    for t in range(steps - 1, -1, -1):
        found[:, t] = last
        edge = last >> shift
        last = edge + choices[t].gather(1, edge.unsqueeze(1)).squeeze(1).long() * groups
    return found, total


def edge_costs(
    targets: Float[Tensor, "tiles steps values"],
    code: Float[Tensor, "states values"],
    shift: int,
    weights: Float[Tensor, "tiles steps values"] | None = None,
) -> Float[Tensor, "tiles edges"]:
    """Of each edge, the cost of the best path that ends with it."""
    cost = _start(targets.shape[0], code.shape[0], shift, None, targets.device)
    for t in range(targets.shape[1]):
        cost = _add_errors(_best(cost, shift)[0], targets[:, t], code, None if weights is None else weights[:, t])
    return _best(cost, shift)[0]


def circular_path(
    targets: Float[Tensor, "tiles steps values"],
    code: Float[Tensor, "states values"],
    shift: int,
    weights: Float[Tensor, "tiles steps values"] | None = None,
    *,
    candidates: int = 1,
    reach: int,
) -> tuple[Integer[Tensor, "tiles steps"], Float[Tensor, " tiles"]]:
    """The states and cost of the cheapest circular path among those through the `candidates` most promising edges at the seam."""
    states = code.shape[0]

    def into(steps: slice, flip: bool) -> Tensor:
        parts = [x[:, steps].flip(1) if flip else x[:, steps] for x in (targets, weights) if x is not None]
        return edge_costs(parts[0], reversed_code(code) if flip else code, shift, *parts[1:])

    seam = into(slice(targets.shape[1] - reach, None), False)
    seam = seam + into(slice(0, reach), True)[:, bit_reversal(states >> shift, seam.device)]
    promising = seam.sort(dim=1, stable=True)[1][:, :candidates]
    found, cost = path(targets, code, shift, weights, promising[:, 0])
    for edges in promising.unbind(1)[1:]:
        other, its_cost = path(targets, code, shift, weights, edges)
        better = its_cost < cost
        found, cost = torch.where(better.unsqueeze(1), other, found), torch.where(better, its_cost, cost)
    return found, cost


def states_of(symbols: Integer[Tensor, "tiles steps"], shift: int, state_bits: int) -> Int[Tensor, "tiles steps"]:
    """The states of a register that has run through these symbols in a circle; any symbols will do."""
    steps = symbols.shape[1]
    state = symbols.long()
    for back in range(1, -(-state_bits // shift)):
        state = state | symbols.long().roll(back % steps, 1) << (shift * back)
    return state & (1 << state_bits) - 1


def reversed_code(code: Float[Tensor, "states values"]) -> Float[Tensor, "states values"]:
    """The code of the register that runs backwards: state `s` stands for what `s` with its bits reversed stood for."""
    return code[bit_reversal(code.shape[0], code.device)]


def bit_reversal(size: int, device: torch.device | None = None) -> Int[Tensor, " size"]:
    """`0 .. size - 1`, a power of two, with the order of their bits reversed."""
    order = torch.zeros(1, dtype=torch.int64, device=device)
    while order.shape[0] < size:
        order = torch.cat([2 * order, 2 * order + 1])
    return order


def _start(tiles: int, states: int, shift: int, edges: Tensor | None, device: torch.device) -> Tensor:
    cost = torch.zeros(tiles, states, device=device)
    if edges is not None:
        groups = states >> shift
        outside = torch.arange(states, device=device) % groups != edges.unsqueeze(1)
        cost.masked_fill_(outside, torch.inf)
    return cost


def _best(cost: Tensor, shift: int) -> tuple[Tensor, Tensor]:
    """Of each edge the least cost of its states, and the high bits of the first of them."""
    streams = cost.unflatten(1, (1 << shift, -1))
    best, choice = streams[:, 0], torch.zeros_like(streams[:, 0], dtype=torch.uint8)
    for c in range(1, 1 << shift):
        better = streams[:, c] < best
        best, choice = torch.where(better, streams[:, c], best), torch.where(better, c, choice)
    return best, choice


def _add_errors(best: Tensor, target: Tensor, code: Tensor, weights: Tensor | None) -> Tensor:
    error = None
    for v in range(code.shape[1]):
        difference = code[:, v] - target[:, v, None]
        term = difference * difference if weights is None else difference * difference * weights[:, v, None]
        error = term if error is None else error + term
    assert error is not None
    cost: Tensor = (error.unflatten(1, (best.shape[1], -1)) + best.unsqueeze(-1)).flatten(1)
    return cost
