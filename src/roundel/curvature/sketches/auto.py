"""The default: the factors of `pilot`, and per linear something more careful where gradients that the factors have not seen ask for it.

One sequence in `holdout` is left out of the sums at first. Each linear is rounded under every candidate (`Auto.candidates`), and on the
sequences that were left out the KL of the actual errors is predicted, `1/2 E_s <G_s, E>^2`. The first candidate stands unless another's
prediction is significantly lower (`curvature.choose`): the prediction of one linear from a few dozen sequences has a standard error of
10-20 %, while good candidates differ by a few per cent, so taking the lowest outright only picks noise (`docs/log.md`, 8). What it is for
are the linears where the measured curvature misleads: few sequences, first blocks. The gradients that were chosen by join the sums in the
same backward pass (`stages.rounding.choice`).

The candidates: `pilot`; the same with four times the damping; `kfac`, towards which noise is shrunk; and `H_out = I`, which is LDLQ and
cannot be misled by gradients.

Cost: one pass over the data, each sequence seen once. Per token of all sequences the flops of `pilot`, per token of one that is held out
`8 d_in d_out` more; memory of the sums that of `pilot`. Then four short roundings of each linear before the final one, whose codes,
`4 d_in d_out` bytes, are kept until the choice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from roundel.curvature.sketches.base import Candidate, Sketch
from roundel.curvature.sketches.pilot import Pilot
from roundel.curvature.sketches.triangular import ShrunkSums
from roundel.errors import SchemeError
from roundel.types import KroneckerFactors

__all__ = ["Auto"]

FEWEST = 8
"""With fewer held-out sequences nothing could be significant: all go into the factors then."""


@dataclass(frozen=True, kw_only=True)
class Auto(Pilot):
    """`pilot`, with one sequence in `holdout` kept to choose by."""

    holdout: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.holdout < 2:
            raise SchemeError(f"auto: holdout={self.holdout}, expected 2 or more: one sequence in so many is held out")

    def held_out(self, sequences: int) -> int:
        count = sequences // self.holdout
        return count if count >= FEWEST else 0

    def candidates(self, sketch: Sketch) -> dict[str, Candidate]:
        assert isinstance(sketch, ShrunkSums)
        pilot, kfac = sketch.factors(), sketch.kfac_factors()
        input_only = KroneckerFactors(H_out=torch.eye(sketch.d_out, device=sketch.device), H_in=kfac.H_in, scale=pilot.scale)
        return {
            "pilot": Candidate(factors=pilot),
            "pilot, damped": Candidate(factors=pilot, damping=4.0),
            "kfac": Candidate(factors=kfac),
            "input only": Candidate(factors=input_only),
        }
