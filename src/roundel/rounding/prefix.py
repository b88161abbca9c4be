"""What a linear is rounded to when the layers before it are rounded already: prefix-aware targets.

Problem: each linear could be rounded to the original's weight as if all others were exact. But its input is then `xq`, not the `x` that the
original's has, and a linear that is added to the residual stream could also take back the error that is in the stream by then. The weight
that does both best, on average over tokens, is a regression on the inputs that it will really have:

    min E |W x + (r - rq) - V xq|^2    ->    V = W + (W E (x - xq) xq^T + E (r - rq) xq^T) (E xq xq^T)^-1

`r` and `rq` are what the output is added to on the original's path and on the quantized one. It is fitted to some sequences, so it is
damped, and its two parts are taken with strengths below 1:

    V = W + (s W Delta + t D) (Hq + c mean(diag Hq) I)^-1

What is rounded meets `xq` as well: the input side of the curvature is the mean of its own and of `Hq`, both of mean diagonal 1.

Cost, for each linear and token: `4 d_in^2` flops for the moments, which linears that read the same tensor share, and `2 d_out d_in` for the
stream's; once `d_in^3 / 3 + 2 d_out d_in^2`, in float64. Memory: three matrices. Measured, also what was left out (tokens weighted by their
gradients, strengths by cross-validation): `docs/log.md`, 20.

References: GPTAQ (Li et al. 2025, arXiv 2504.02692) and Qronos (arXiv 2505.11695) for targets that know the quantized prefix; the stream's
error as a second target and the strengths are measured here. CoreQ (arXiv 2602.05902) has a closed form for a strength.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from roundel.linalg.gram import add_product
from roundel.linalg.ldl import damped_cholesky
from roundel.types import Factors, GroupedFactors

__all__ = ["Moments", "Strengths"]


@dataclass(frozen=True, kw_only=True)
class Strengths:
    """How much of the two corrections is taken."""

    prefix: float
    """`s`, of the quantized prefix's."""
    stream: float
    """`t`, of the residual stream's error."""
    damping: float
    """`c`."""


@dataclass(kw_only=True)
class Moments:
    """Sums over tokens for linears that read the same tensor."""

    difference: Float[Tensor, "d_in d_in"]
    """`sum (x - xq) xq^T`."""
    second: Float[Tensor, "d_in d_in"]
    """`sum xq xq^T`."""
    stream: dict[str, Tensor] = field(default_factory=dict)
    """`sum (r - rq) xq^T`, `(d_out, d_in)`, for those that are added to the stream, by name."""
    _roots: dict[float, Tensor] = field(default_factory=dict)
    """Cholesky factors of the damped `second`, once all tokens are there."""

    @classmethod
    def empty(cls, d_in: int, device: torch.device, added: Mapping[str, int]) -> Moments:
        """Without any token; `added`: the outputs of those that are added to the stream."""
        return cls(
            difference=torch.zeros(d_in, d_in, device=device),
            second=torch.zeros(d_in, d_in, device=device),
            stream={name: torch.zeros(d_out, d_in, device=device) for name, d_out in added.items()},
        )

    def add(
        self,
        x: Float[Tensor, "tokens d_in"],
        xq: Float[Tensor, "tokens d_in"],
        streams: Mapping[str, Float[Tensor, "tokens d_out"]],
    ) -> None:
        """Adds tokens; `streams` are `r - rq`, divided by what the linear's output is multiplied by before it is added."""
        add_product(self.difference, x - xq, xq)
        add_product(self.second, xq, xq)
        for name, error in streams.items():
            add_product(self.stream[name], error, xq)

    def sums(self) -> list[Tensor]:
        """All of them."""
        return [self.difference, self.second, *self.stream.values()]

    def targets(
        self, weights: Mapping[str, Float[Tensor, "d_out d_in"]], strengths: Mapping[str, Strengths]
    ) -> dict[str, Float[Tensor, "d_out d_in"]]:
        """What linears of these inputs are to be rounded to, in float32, by name.

        Raises:
            NumericalError: the moments are not finite.
        """
        found = {}
        for name, W in weights.items():
            own = strengths[name]
            if own.damping not in self._roots:
                self._roots[own.damping] = damped_cholesky(self.second, own.damping)[1]
            wanted = own.prefix * (W.float() @ self.difference)
            if name in self.stream:
                wanted += own.stream * self.stream[name]
            found[name] = W.float() + torch.cholesky_solve(wanted.double().T, self._roots[own.damping]).T.float()
        return found

    def met(self, factors: Factors) -> Factors:
        """Curvature whose input side is the mean of its own and of what the rounded layers give."""
        mean = self.second.diagonal().mean()
        if not (torch.isfinite(mean) and mean > 0):
            return factors
        groups = [replace(own, H_in=(own.H_in + (self.second / mean).to(own.H_in)) / 2) for _, own in factors.row_groups()]
        return groups[0] if len(groups) == 1 else GroupedFactors(groups=tuple(groups))
