"""No curvature: both factors are the identity, and feedback is nearest rounding.

Cost per token: two norms for the absolute scale, `2 (d_in + d_out)` flops. Memory 8 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from roundel.curvature.sketches.base import Estimator, Sketch
from roundel.types import KroneckerFactors, LayerGrad

__all__ = ["Identity"]


class _Sums(Sketch):
    def __init__(self, d_out: int, d_in: int, device: torch.device) -> None:
        super().__init__(d_out, d_in, device)
        self.start()

    def add_sequence(self, grad: LayerGrad, sequence: int) -> None:
        self.add_token_trace(grad, sequence)

    def factors(self) -> KroneckerFactors:
        eye_out, eye_in = torch.eye(self.d_out, device=self.device), torch.eye(self.d_in, device=self.device)
        return self.normalised(eye_out, eye_in)


@dataclass(frozen=True, kw_only=True)
class Identity(Estimator):
    """`H_out = I`, `H_in = I`."""

    def sketch(self, d_out: int, d_in: int, device: torch.device, *, index: int = 0, previous: KroneckerFactors | None = None) -> Sketch:
        return _Sums(d_out, d_in, device)
