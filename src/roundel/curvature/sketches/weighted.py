"""Weighted Grams of per-sequence weight gradients `G`: `E[G^T M_out G]` and `E[G M_in G^T]`, the later passes of several estimators.

Power iteration weights by the factors themselves (`sketch_b`), the triangular flip-flop by inverses (`triangular`).

Cost per token, in sequences of `T`: `2 d_in d_out` flops for `G`, then `3 d_in d_out (d_in + d_out) / T` (the outer of each side's two
products by halves). For short sequences and wide layers `G M G^T = g^T (x M x^T) g` and `G^T M G = x^T (g M g^T) x` never form `G`:
`6 T (d_in + d_out) + 3 (d_in^2 + d_out^2)` flops per token. Whichever is cheaper is taken. Memory `8 (d_in^2 + d_out^2)` bytes, sums and
weights, plus two matrices of the size of `G` or `(T, d)`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from roundel.curvature.sketches.base import Sketch, aligned
from roundel.linalg.gram import add_symmetric_product, symmetrise
from roundel.types import KroneckerFactors, LayerGrad

__all__ = ["Weighted"]


class Weighted(Sketch):
    """`H_out = E[G M_in G^T]`, `H_in = E[G^T M_out G]` with symmetric positive semi-definite weights; the trace is `E |G|^2`.

    The weights are `weight` of the previous factors, formed when the first sequence comes: who restores sums only to read their factors
    does not pay for them.
    """

    def __init__(
        self,
        d_out: int,
        d_in: int,
        device: torch.device,
        index: int,
        previous: KroneckerFactors,
        weight: Callable[[Tensor], Tensor] = Tensor.float,
    ) -> None:
        super().__init__(d_out, d_in, device, index)
        self.previous, self.weight = previous, weight
        self.start(GtMG=d_in, GMGt=d_out)

    @cached_property
    def M_out(self) -> Tensor:
        """The weight of the output side."""
        return self.weight(self.previous.H_out).float()

    @cached_property
    def M_in(self) -> Tensor:
        """The weight of the input side."""
        return self.weight(self.previous.H_in).float()

    def add_sequence(self, grad: LayerGrad, sequence: int) -> None:
        tokens, sides, squares = grad.g.shape[1], self.d_in + self.d_out, self.d_in**2 + self.d_out**2
        product = 2 * tokens * self.d_in * self.d_out + 3 * self.d_in * self.d_out * sides
        trick = 6 * tokens**2 * sides + 3 * tokens * squares
        if product <= trick:
            G = grad.weight_gradient(sequence)
            self.add_gradient(G)
            self.sums["trace"] += G.square().sum(dtype=torch.float64)
        else:
            x, g = aligned(grad.input.x, sequence), aligned(grad.g, sequence)
            add_symmetric_product(self.sums["GtMG"], x, (g @ self.M_out @ g.T) @ x)
            add_symmetric_product(self.sums["GMGt"], g, (x @ self.M_in @ x.T) @ g)
            self.sums["trace"] += ((x @ x.T) * (g @ g.T)).sum(dtype=torch.float64)

    def add_gradient(self, G: Tensor) -> None:
        """Adds the two products of one gradient; its trace is the caller's."""
        add_symmetric_product(self.sums["GtMG"], G, self.M_out @ G)
        add_symmetric_product(self.sums["GMGt"], G.T, self.M_in @ G.T)

    def factors(self) -> KroneckerFactors:
        return self.normalised(symmetrise(self.sums["GMGt"]), symmetrise(self.sums["GtMG"]))
