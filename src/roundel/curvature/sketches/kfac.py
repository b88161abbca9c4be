"""KFAC: `H_in = E[x x^T]`, `H_out = E[g g^T]`, tokens independent and inputs independent of gradients (Martens and Grosse 2015).

Exact for a deep linear network with one token per sequence. Cost per token: `d_in^2 + d_out^2` flops (Grams by
halves, the input's shared by linears that read the same tensor). Memory `4 (d_in^2 + d_out^2)` bytes, and `4 d_in^2` for the
Gram of a sequence that is shared.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from roundel.curvature.sketches.base import Estimator, Sketch
from roundel.linalg.gram import add_gram, symmetrise
from roundel.types import KroneckerFactors, LayerGrad

__all__ = ["Kfac", "KfacSums"]


class KfacSums(Sketch):
    """Running sums of the (first) pass."""

    def __init__(self, d_out: int, d_in: int, device: torch.device) -> None:
        super().__init__(d_out, d_in, device)
        self.start(xx=d_in, gg=d_out)

    def add_sequence(self, grad: LayerGrad, sequence: int) -> None:
        self.sums["xx"] += grad.input.gram(sequence)
        add_gram(self.sums["gg"], grad.g[sequence])
        self.add_token_trace(grad, sequence)

    def factors(self) -> KroneckerFactors:
        return self.normalised(symmetrise(self.sums["gg"]), symmetrise(self.sums["xx"]))


@dataclass(frozen=True, kw_only=True)
class Kfac(Estimator):
    """`H_out = E[g g^T]`, `H_in = E[x x^T]`."""

    def sketch(self, d_out: int, d_in: int, device: torch.device, *, index: int = 0, previous: KroneckerFactors | None = None) -> Sketch:
        return KfacSums(d_out, d_in, device)
