"""Weighted Grams of per-sequence weight gradients `G`: `E[G^T M_out G]` and `E[G M_in G^T]`, the later passes of several estimators.

Power iteration weights by the factors themselves (`sketch_b`, a `Symmetric` weight), the triangular flip-flop by inverses, of which a
triangular root is known (`triangular`, a `Rooted` weight `M = R^T R`). With the root each term is a Gram of `Y = R_out G` or
`Z = R_in G^T`, so positive semi-definite by construction; half of every product is known to be zero or by symmetry.

Cost per token, in sequences of `T`: `2 d_in d_out` flops for `G` and `c d_in d_out (d_in + d_out) / T` for its products, with `c = 2` for
weights with a root (two halves on each side) and 3 for others (of each side's two products only the outer by halves). For short sequences
and wide layers `G M G^T = g^T (x M x^T) g` and `G^T M G = x^T (g M g^T) x` never form `G`: `c (d_in^2 + d_out^2) + 4 T (d_in + d_out)`
flops per token, a quarter of the latter for the trace. Whichever is cheaper is taken; on a square weight these are, in units of
`d_in d_out`, at most `2 + 4 d / T` and `4 + 8 T / d` with roots. Memory `8 (d_in^2 + d_out^2)` bytes, sums and weights, plus two matrices
of the size of `G`, or of `(T, d)` and three of `(T, T)`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from roundel.curvature.sketches.base import Sketch, aligned
from roundel.linalg.gram import add_gram, add_symmetric_product, gram, lower_product, symmetrise
from roundel.types import KroneckerFactors, LayerGrad

__all__ = ["Rooted", "Symmetric", "Weight", "Weighted"]


class Weight(ABC):
    """A symmetric weight `M`, float32."""

    products: int
    """The `c` of the cost: products of half the flops that each side takes."""

    @abstractmethod
    def add_product(self, total: Float[Tensor, "n n"], A: Float[Tensor, "d n"]) -> None:
        """Adds `A^T M A`; only the lower triangle is promised."""

    def product(self, A: Float[Tensor, "d n"]) -> Float[Tensor, "n n"]:
        """`A^T M A`."""
        total = torch.zeros(A.shape[1], A.shape[1], dtype=torch.float32, device=A.device)
        self.add_product(total, A)
        return symmetrise(total)


@dataclass(frozen=True)
class Symmetric(Weight):
    """`M` itself."""

    M: Float[Tensor, "d d"]
    products = 3

    def add_product(self, total: Float[Tensor, "n n"], A: Float[Tensor, "d n"]) -> None:
        add_symmetric_product(total, A, self.M @ A)


@dataclass(frozen=True)
class Rooted(Weight):
    """`M = R^T R` with a lower triangular `R`."""

    R: Float[Tensor, "d d"]
    products = 2

    def add_product(self, total: Float[Tensor, "n n"], A: Float[Tensor, "d n"]) -> None:
        add_gram(total, lower_product(self.R, A))


def _factor_itself(H: Tensor) -> Weight:
    return Symmetric(H.float())


class Weighted(Sketch):
    """`H_out = E[G M_in G^T]`, `H_in = E[G^T M_out G]`; the trace is `E |G|^2`.

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
        weight: Callable[[Tensor], Weight] = _factor_itself,
    ) -> None:
        super().__init__(d_out, d_in, device, index)
        self.previous, self.weight = previous, weight
        self.start(GtMG=d_in, GMGt=d_out)

    def prepare(self) -> None:
        _ = self.M_out, self.M_in

    @cached_property
    def M_out(self) -> Weight:
        """The weight of the output side."""
        return self.weight(self.previous.H_out)

    @cached_property
    def M_in(self) -> Weight:
        """The weight of the input side."""
        return self.weight(self.previous.H_in)

    def add_sequence(self, grad: LayerGrad, sequence: int) -> None:
        tokens, sides, squares = grad.g.shape[1], self.d_in + self.d_out, self.d_in**2 + self.d_out**2
        product = 2 * tokens * self.d_in * self.d_out + self.M_in.products * self.d_in * self.d_out * sides
        trick = self.M_in.products * tokens * squares + 4 * tokens**2 * sides
        if product <= trick:
            G = grad.weight_gradient(sequence)
            self.add_gradient(G)
            self.sums["trace"] += torch.linalg.vector_norm(G).double().square()
        else:
            x, g = aligned(grad.input.x, sequence), aligned(grad.g, sequence)
            add_symmetric_product(self.sums["GtMG"], x, self.M_out.product(g.T) @ x)
            add_symmetric_product(self.sums["GMGt"], g, self.M_in.product(x.T) @ g)
            self.sums["trace"] += _inner(gram(x.T), gram(g.T))

    def add_gradient(self, G: Tensor) -> None:
        """Adds the two products of one gradient; its trace is the caller's."""
        self.M_out.add_product(self.sums["GtMG"], G)
        self.M_in.add_product(self.sums["GMGt"], G.T)

    def factors(self) -> KroneckerFactors:
        return self.normalised(symmetrise(self.sums["GMGt"]), symmetrise(self.sums["GtMG"]))


def _inner(one: Float[Tensor, "n n"], other: Float[Tensor, "n n"]) -> Float[Tensor, ""]:
    """The inner product of two symmetric matrices, of which only the lower triangles are read, in float64."""
    products = (one * other).double().tril()
    return 2 * products.sum() - products.diagonal().sum()
