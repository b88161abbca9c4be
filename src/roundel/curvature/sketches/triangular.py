"""The triangular flip-flop: factors whose feedback leaves the least loss.

Two-sided feedback with unit lower triangular `A` (rows) and `B` (columns) leaves `A^T E B = eta`, the grid's own error. Taking
that as white, the expected loss is proportional to

    J(A, B) = E |A^-1 G B^-T|_F^2

over per-sequence weight gradients `G`. For a fixed `B` its exact minimiser over unit lower `A` is the LDL factor of
`E[G (B B^T)^-1 G^T]`, and the same with the sides exchanged. Note the *inverse* weighting, where power iteration weights by the factors.
From the factors of `mean`, in each further pass over the same data and labels,

    H_out <- E[G (L_in L_in^T)^-1 G^T],    H_in <- E[G^T (L_out L_out^T)^-1 G]

with `L_in`, `L_out` of the damped factors of the pass before. In the end both are shrunk towards `kfac`, which has less variance
when sequences are few: `J` is lowered on the gradients that it is fitted on, and what that is worth on others is to be measured.

Both sides are updated at once, from the pass before. In exact arithmetic and without damping, updates of one side at a time never
raise `J`; updates at once are two such sequences interleaved, and a pair of factors from both can have a larger `J` than the pair
before. But passes are what costs, and on random problems one pass of both sides came as near to the common limit as two passes of
one side each.

Cost: `rounds + 1` passes; per token, in sequences of `T`, the first costs as `mean`, the others as `weighted`,
`2 d_in d_out + 3 d_in d_out (d_in + d_out) / T` flops or less, and the last also `kfac`, `d_in^2 + d_out^2` (the factors that go from
pass to pass carry no other sums); for each linear and later pass `d_in^3 + d_out^3` in float64 for factors and inverses. Memory: sums,
weights and previous factors, `12 (d_in^2 + d_out^2)` bytes, a third more in the last pass, and a few float64 matrices of one linear at
a time.

Reference: derived here; alternating inverse weights are the flip-flop algorithm for matrix-normal covariances (Dutilleul 1999).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from roundel.curvature.sketches.base import Estimator, Sketch
from roundel.curvature.sketches.kfac import KfacSums
from roundel.curvature.sketches.mean import Mean
from roundel.curvature.sketches.weighted import Rooted, Weight, Weighted
from roundel.errors import SchemeError
from roundel.linalg.gram import symmetrise
from roundel.linalg.ldl import damped_cholesky
from roundel.types import KroneckerFactors, LayerGrad

__all__ = ["ShrunkSums", "Triangular", "weight_of"]

DAMPING = 0.1
"""Relative, of the factors whose inverses are the weights."""
BLOCK = 128
"""Columns that are inverted together."""


def weight_of(previous: KroneckerFactors) -> Callable[[Tensor], Weight]:
    """What makes weights of these factors. With a scale of zero there is nothing to invert: it will be zero again, or weights are equal."""
    return inverse_weight if previous.scale > 0 else no_weight


def inverse_weight(H: Tensor) -> Rooted:
    """`(L L^T)^-1 = R^T R`, `R = L^-1`, `L` the unit lower LDL factor of the damped `H`; in float32, since weights need only be near."""
    L = damped_cholesky(H, DAMPING, torch.float32)[1]
    return Rooted(_unit_lower_inverse(L.div_(L.diagonal().clone())))


def no_weight(H: Tensor) -> Rooted:
    """The identity."""
    return Rooted(torch.eye(H.shape[0], device=H.device))


def _unit_lower_inverse(L: Tensor) -> Tensor:
    """Column blocks by forward substitution from their first row on, `d^3 / 3` flops: torch has no triangular inverse."""
    inverse = torch.zeros_like(L)
    for start in range(0, len(L), BLOCK):
        columns = torch.eye(len(L) - start, min(BLOCK, len(L) - start), dtype=L.dtype, device=L.device)
        below = torch.linalg.solve_triangular(L[start:, start:], columns, upper=False, unitriangular=True)
        inverse[start:, start : start + BLOCK] = below
    return inverse


class ShrunkSums(Sketch):
    """The last pass: the flip-flop's sums and those of `kfac`, to which `earlier` sums of `kfac` from other sequences are added."""

    def __init__(self, flip_flop: Weighted, shrinkage: float, earlier: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(flip_flop.d_out, flip_flop.d_in, flip_flop.device, flip_flop.index)
        self.flip_flop, self.kfac = flip_flop, KfacSums(self.d_out, self.d_in, self.device)
        self.shrinkage, self.earlier = shrinkage, earlier or {}
        self.sums = {**flip_flop.sums, **{f"kfac.{name}": total for name, total in self.kfac.sums.items()}}

    def prepare(self) -> None:
        self.flip_flop.prepare()

    def add_sequence(self, grad: LayerGrad, sequence: int) -> None:
        self.flip_flop.add_sequence(grad, sequence)
        self.kfac.add_sequence(grad, sequence)

    def kfac_factors(self) -> KroneckerFactors:
        """The factors of `kfac` alone, with the scale of the whole."""
        gg, xx = (self.kfac.sums[key] + self.earlier.get(key, 0.0) for key in ("gg", "xx"))
        return self.normalised(symmetrise(gg), symmetrise(xx))

    def factors(self) -> KroneckerFactors:
        fitted, kfac = self.flip_flop.factors(), self.kfac_factors()
        return self.normalised(torch.lerp(fitted.H_out, kfac.H_out, self.shrinkage), torch.lerp(fitted.H_in, kfac.H_in, self.shrinkage))

    def total_trace(self) -> Tensor:
        return self.flip_flop.total_trace()


@dataclass(frozen=True, kw_only=True)
class Triangular(Estimator):
    """`rounds` updates of both factors from those of `mean`; then `shrinkage * kfac + (1 - shrinkage) * flip-flop`, all normalised."""

    rounds: int = 2
    shrinkage: float = 0.5

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise SchemeError(f"triangular: rounds={self.rounds}, expected 1 or more")
        if not 0 <= self.shrinkage <= 1:
            raise SchemeError(f"triangular: shrinkage={self.shrinkage}, expected 0 (the flip-flop alone) to 1 (kfac alone)")

    @property
    def passes(self) -> int:
        return self.rounds + 1

    def sketch(self, d_out: int, d_in: int, device: torch.device, *, index: int = 0, previous: KroneckerFactors | None = None) -> Sketch:
        if previous is None:
            return Mean().sketch(d_out, d_in, device)
        flip_flop = Weighted(d_out, d_in, device, index, previous, weight_of(previous))
        return ShrunkSums(flip_flop, self.shrinkage) if index == self.passes - 1 and self.shrinkage > 0 else flip_flop
