"""The triangular flip-flop in one pass over the data, each sequence seen once.

The weights `(L L^T)^-1` of `triangular` need not be good, only near: a pilot of one sequence in eight, whose `mean` factors give them,
and then one weighted pass over the *other* sequences. Both parts sum up `kfac`, towards which the result is shrunk.

    pilot:  H_out, H_in of `mean`
    rest:   H_out <- E[G (L_in L_in^T)^-1 G^T],    H_in <- E[G^T (L_out L_out^T)^-1 G]
    all:    shrinkage * kfac + (1 - shrinkage) * the rest's, all normalised

Weights are fixed before the sums that they weight begin, so those still resume, merge and add up over processes by addition, as long as
they share the pilot: collections of other sequences (`--part`) repeat it, and merging refuses sums with other weights.

Cost per token: in the pilot that of `mean`, after it, in sequences of `T`, `2 d_in d_out + 3 d_in d_out (d_in + d_out) / T` flops or less
(`weighted`) and `d_in^2 + d_out^2`; once, `d_in^3 + d_out^3` in float64. Memory: sums, weights and the pilot's factors and sums,
`24 (d_in^2 + d_out^2)` bytes at most.

Measured against full passes and against the mean: `docs/log.md`, 9.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from roundel.curvature.sketches.base import Estimator, Sketch
from roundel.curvature.sketches.mean import MeanSums
from roundel.curvature.sketches.triangular import ShrunkSums, weight_of
from roundel.curvature.sketches.weighted import Weighted
from roundel.errors import SchemeError
from roundel.linalg.gram import symmetrise
from roundel.types import KroneckerFactors

__all__ = ["Pilot"]

SHARE = 8
"""One sequence in so many is in the pilot, ..."""
FEWEST = 16
"""... but so many at least, if they are a quarter of all or less."""


class _PilotSums(MeanSums):
    """The mean over the pilot, which hands on the sums of its `kfac`."""

    def factors(self) -> KroneckerFactors:
        carry = {name: symmetrise(self.kfac.sums[name]) for name in ("xx", "gg")}
        return dataclasses.replace(super().factors(), carry=carry)


@dataclass(frozen=True, kw_only=True)
class Pilot(Estimator):
    """One round of the triangular flip-flop from a pilot's mean, `shrinkage` of the way towards `kfac`."""

    shrinkage: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.shrinkage <= 1:
            raise SchemeError(f"shrinkage={self.shrinkage}, expected more than 0 (nearly the flip-flop alone) to 1 (kfac alone)")

    @property
    def passes(self) -> int:
        return 2

    def pilot(self, sequences: int) -> int:
        return max(sequences // SHARE, min(FEWEST, sequences // 4))

    def sketch(self, d_out: int, d_in: int, device: torch.device, *, index: int = 0, previous: KroneckerFactors | None = None) -> Sketch:
        if previous is None:
            return _PilotSums(d_out, d_in, device)
        flip_flop = Weighted(d_out, d_in, device, index, previous, weight_of(previous))
        return ShrunkSums(flip_flop, self.shrinkage, previous.carry)
