"""Sketch A of YAQA (arXiv 2505.22988, section 3.2.1): power iteration on the token-independent Fisher `E_t[g g^T (x) x x^T]`.

Half rounds, each one pass over the same data and labels:

    H_in  <- E[x x^T]                          (pass 0, from H_out = I)
    H_out <- E[(x^T H_in x) g g^T]             (odd passes)
    H_in  <- E[(g^T H_out g) x x^T]            (even passes)

Cost per token: `d_in^2` flops in pass 0; then the quadratic form of one side and the Gram of the other, `2 d_in^2 + d_out^2` in odd
passes and `2 d_out^2 + d_in^2` in even ones. Memory `4 (d_in^2 + d_out^2)` bytes for the factors of the pass before, `4 d^2` for the sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from roundel.curvature.sketches.base import Estimator, Sketch
from roundel.errors import SchemeError
from roundel.linalg.gram import add_gram, symmetrise
from roundel.types import KroneckerFactors, LayerGrad

__all__ = ["SketchA"]


class _HalfRound(Sketch):
    """Updates one factor with the tokens weighted by the other; the first pass has no other and weights them equally."""

    def __init__(self, d_out: int, d_in: int, device: torch.device, index: int, previous: KroneckerFactors | None) -> None:
        super().__init__(d_out, d_in, device, index)
        self.updates_out = index % 2 == 1
        self.previous = previous
        self.start(weighted=d_out if self.updates_out else d_in)

    def add_sequence(self, grad: LayerGrad, sequence: int) -> None:
        x, g = grad.input.x[sequence].float(), grad.g[sequence].float()
        if self.previous is None:
            self.sums["weighted"] += grad.input.gram(sequence)
        else:
            target, source, H = (g, x, self.previous.H_in) if self.updates_out else (x, g, self.previous.H_out)
            weight = ((source @ H) * source).sum(-1).clamp(min=0)
            add_gram(self.sums["weighted"], target * weight.sqrt()[:, None])
        self.add_token_trace(grad, sequence)

    def factors(self) -> KroneckerFactors:
        updated = symmetrise(self.sums["weighted"])
        if self.previous is None:
            return self.normalised(torch.eye(self.d_out, device=self.device), updated)
        H_out, H_in = (updated, self.previous.H_in) if self.updates_out else (self.previous.H_out, updated)
        return self.normalised(H_out, H_in)


@dataclass(frozen=True, kw_only=True)
class SketchA(Estimator):
    """`rounds` full rounds: twice as many passes over the data."""

    rounds: int = 2

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise SchemeError(f"sketch-a: rounds={self.rounds}, expected 1 or more")

    @property
    def passes(self) -> int:
        return 2 * self.rounds

    def sketch(self, d_out: int, d_in: int, device: torch.device, *, index: int = 0, previous: KroneckerFactors | None = None) -> Sketch:
        return _HalfRound(d_out, d_in, device, index, previous)
