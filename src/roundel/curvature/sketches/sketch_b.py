"""Sketch B of YAQA (arXiv 2505.22988, section 3.2.2): `H_in = E[G^T G]`, `H_out = E[G G^T]` of per-sequence weight gradients `G`.

One step of power iteration on the Fisher from the identity, cross-token terms included: the two partial traces of the
Fisher. Always positive semi-definite. Each further round is one more pass over the same data and labels, with both factors
of the pass before; no gradient is stored:

    H_in  <- E[G^T H_out G],    H_out <- E[G H_in G^T]

Cost of the first pass per token, in sequences of `T`: `2 d_in d_out` flops for `G` and `d_in d_out (d_in + d_out) / T` for its two Grams by
halves. For short sequences and wide layers the Gram trick `G G^T = g^T (x x^T) g`, `G^T G = x^T (g g^T) x` never
forms `G`: `d_in^2 + d_out^2 + 3 T (d_in + d_out)` flops per token (all by halves but the products with a Gram). Whichever is cheaper is
taken. Memory `4 (d_in^2 + d_out^2)` bytes,
plus one `G`, `4 d_in d_out`, or one sequence's `4 T (T + d_in + d_out)`. Later passes: `weighted`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from roundel.curvature.sketches.base import Estimator, Sketch, aligned
from roundel.curvature.sketches.weighted import Weighted
from roundel.errors import SchemeError
from roundel.linalg.gram import add_gram, add_symmetric_product, gram, symmetrise
from roundel.types import KroneckerFactors, LayerGrad

__all__ = ["SketchB", "SketchBSums"]


class SketchBSums(Sketch):
    """Running sums of the (first) pass."""

    def __init__(self, d_out: int, d_in: int, device: torch.device) -> None:
        super().__init__(d_out, d_in, device)
        self.start(GtG=d_in, GGt=d_out)

    def add_sequence(self, grad: LayerGrad, sequence: int) -> None:
        tokens = grad.g.shape[1]
        product = 2 * tokens * self.d_in * self.d_out + self.d_in * self.d_out * (self.d_in + self.d_out)
        trick = 3 * tokens**2 * (self.d_in + self.d_out) + tokens * (self.d_in**2 + self.d_out**2)
        if product <= trick:
            self.add_gradient(grad.weight_gradient(sequence))
        else:
            x, g = aligned(grad.input.x, sequence), aligned(grad.g, sequence)
            add_symmetric_product(self.sums["GtG"], x, symmetrise(gram(g.T)) @ x)
            add_symmetric_product(self.sums["GGt"], g, symmetrise(gram(x.T)) @ g)

    def add_gradient(self, G: Tensor) -> None:
        """Adds the two Grams of one gradient."""
        add_gram(self.sums["GtG"], G)
        add_gram(self.sums["GGt"], G.T)

    def factors(self) -> KroneckerFactors:
        return self.normalised(symmetrise(self.sums["GGt"]), symmetrise(self.sums["GtG"]))

    def total_trace(self) -> Tensor:
        return self.sums["GtG"].diagonal().sum(dtype=torch.float64)  # the sum of |G_s|^2: cross-token terms included


@dataclass(frozen=True, kw_only=True)
class SketchB(Estimator):
    """`H_out = E[G G^T]`, `H_in = E[G^T G]`, then `rounds - 1` more passes of power iteration from there."""

    rounds: int = 1

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise SchemeError(f"rounds={self.rounds}, expected 1 or more")

    @property
    def passes(self) -> int:
        return self.rounds

    def sketch(self, d_out: int, d_in: int, device: torch.device, *, index: int = 0, previous: KroneckerFactors | None = None) -> Sketch:
        if previous is None:
            return SketchBSums(d_out, d_in, device)
        return Weighted(d_out, d_in, device, index, previous)
