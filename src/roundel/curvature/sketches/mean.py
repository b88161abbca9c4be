"""The mean of normalised KFAC and Sketch B, both from one backward pass: the simplest estimator that is hard to beat.

Sketch B sees the cross-token terms but is noisy with few sequences; KFAC is smooth but blind to them. Their mean
beats both at every width that we measured (`docs/log.md`).

Cost per token, in sequences of `T`: the sum of the two, `d_in^2 + d_out^2` flops and
`2 d_in d_out + d_in d_out (d_in + d_out) / T` or less. Memory `8 (d_in^2 + d_out^2)` bytes, and one `G`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from roundel.curvature.sketches.base import Estimator, Sketch
from roundel.curvature.sketches.kfac import KfacSums
from roundel.curvature.sketches.sketch_b import SketchBSums
from roundel.types import KroneckerFactors, LayerGrad

__all__ = ["Mean", "MeanSums"]


class MeanSums(Sketch):
    """The sums of both."""

    def __init__(self, d_out: int, d_in: int, device: torch.device) -> None:
        super().__init__(d_out, d_in, device)
        self.kfac, self.sketch_b = KfacSums(d_out, d_in, device), SketchBSums(d_out, d_in, device)
        self.sums = {**self.sketch_b.sums, **self.kfac.sums}

    def add_sequence(self, grad: LayerGrad, sequence: int) -> None:
        self.kfac.add_sequence(grad, sequence)
        self.sketch_b.add_sequence(grad, sequence)

    def factors(self) -> KroneckerFactors:
        kfac, sketch_b = self.kfac.factors(), self.sketch_b.factors()
        return self.normalised(kfac.H_out + sketch_b.H_out, kfac.H_in + sketch_b.H_in)

    def total_trace(self) -> Tensor:
        return self.sketch_b.total_trace()


@dataclass(frozen=True, kw_only=True)
class Mean(Estimator):
    """Mean of the normalised factors of `kfac` and `sketch-b`."""

    def sketch(self, d_out: int, d_in: int, device: torch.device, *, index: int = 0, previous: KroneckerFactors | None = None) -> Sketch:
        return MeanSums(d_out, d_in, device)
