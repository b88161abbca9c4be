"""A weight on its way: codes, scales, and what both loops of rounding go on from.

`curved = H_out E H_in`, `E` the error, is two products of the weight's size with its factors, more than all else that a sweep or a refit of
scales does. It is linear in `E`: whoever changes little hands on the old one and the product of the change alone. That product is formed
in bfloat16 where the CPU is fast at it (`linalg.fast`): an error of a part in 500 *of the change*, in what only decides between codes.
Differences of losses are those of the changes, too; the losses of a trace are good to some 1e-5 of themselves.

Cost of `of`: `d_out d_in (d_out + d_in)` multiply-adds; memory: three matrices of the weight's size, and both factors in 16 bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from roundel.grids.base import Grid, Scales
from roundel.linalg.fast import are_possible
from roundel.types import RoundingProblem

__all__ = ["State", "in_16_bits", "roughly_curved"]

WORTH_ROUNDING = 1 << 23
"""Multiply-adds of both products below which converting the factors costs as much as it saves."""


@dataclass(frozen=True, kw_only=True)
class State:
    """Codes and scales, `E = W - W_hat` `(d_out, d_in)`, and `H_out E H_in`."""

    codes: Tensor
    scales: Scales
    E: Float[Tensor, "d_out d_in"]
    curved: Float[Tensor, "d_out d_in"]

    @classmethod
    def of(cls, problem: RoundingProblem, grid: Grid, scales: Scales, codes: Tensor, H_in: Tensor | None = None) -> State:
        """With exact products, or with those of `roughly_curved`."""
        E = problem.W - grid.dequantize(codes, scales, problem.shape, problem.W.dtype)
        return cls(codes=codes, scales=scales, E=E, curved=roughly_curved(problem, H_in)(E))

    @property
    def loss(self) -> float:
        """`1/2 tr(E^T H_out E H_in)`, summed in float64; of errors whose squares float32 does not hold, such as 1e30, all in float64."""
        found = 0.5 * torch.sum(self.curved * self.E, dtype=torch.float64).item()
        return found if math.isfinite(found) else 0.5 * torch.sum(self.curved.double() * self.E).item()


def in_16_bits(problem: RoundingProblem) -> Tensor | None:
    """`H_in` in bfloat16, for all products with it, where such are fast and the problem is not small; else None."""
    d_out, d_in = problem.shape
    large = d_out * d_in * (d_out + d_in) >= WORTH_ROUNDING
    return problem.H_in.bfloat16() if large and problem.W.dtype == torch.float32 and are_possible(problem.W.device) else None


def roughly_curved(problem: RoundingProblem, H_in: Tensor | None) -> Callable[[Tensor], Tensor]:
    """`X -> H_out X H_in`, of factors and values in bfloat16 where `H_in` is there so (`in_16_bits`), and of the problem's type."""
    if H_in is None:
        return lambda X: problem.H_out @ X @ problem.H_in
    H_out = problem.H_out.bfloat16()
    return lambda X: (H_out @ X.bfloat16() @ H_in).float()
