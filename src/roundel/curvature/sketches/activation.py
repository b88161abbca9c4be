"""Activation curvature: `H_in = E[x x^T]`, `H_out = I`. Rounding with it is LDLQ, which is GPTQ.

Cost per token: `d_in^2` flops (Gram by halves, shared by linears with the same input). Memory `4 d_in^2` bytes, and as much for
the Gram of a sequence that is shared. The gradient enters only the scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from roundel.curvature.sketches.base import Estimator, Sketch
from roundel.linalg.gram import symmetrise
from roundel.types import KroneckerFactors, LayerGrad

__all__ = ["Activation"]


class _Sums(Sketch):
    def __init__(self, d_out: int, d_in: int, device: torch.device) -> None:
        super().__init__(d_out, d_in, device)
        self.start(xx=d_in)

    def add_sequence(self, grad: LayerGrad, sequence: int) -> None:
        self.sums["xx"] += grad.input.gram(sequence)
        self.add_token_trace(grad, sequence)

    def factors(self) -> KroneckerFactors:
        H_out = torch.eye(self.d_out, device=self.device)
        return self.normalised(H_out, symmetrise(self.sums["xx"]))


@dataclass(frozen=True, kw_only=True)
class Activation(Estimator):
    """`H_out = I`, `H_in = E[x x^T]`."""

    def sketch(self, d_out: int, d_in: int, device: torch.device, *, index: int = 0, previous: KroneckerFactors | None = None) -> Sketch:
        return _Sums(d_out, d_in, device)
