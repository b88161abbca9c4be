"""What a linear is rounded to when the layers before it are rounded already: prefix-aware targets.

Problem: each linear could be rounded to the original's weight as if all others were exact. But its input is then `xq`, not the `x` that the
original's has, and a linear that is added to the residual stream could also take back the error that is in the stream by then. The weight
that does both best, on average over tokens, is a regression on the inputs that it will really have:

    min E |W x + (r - rq) - V xq|^2    ->    V = W + (W E (x - xq) xq^T + E (r - rq) xq^T) (E xq xq^T)^-1

`r` and `rq` are what the output is added to on the original's path and on the quantized one. It is fitted to some sequences, so it is
damped, and its two parts are taken with strengths below 1:

    V = W + (s W Delta + t D) (Hq + c mean(diag Hq) I)^-1

What is rounded meets `xq` as well: the input side of the curvature is the mean of its own and of `Hq`, both of mean diagonal 1.

Cost, for each token: `d_in^2` flops for `Hq`, of which half is formed, `2 d_in^2` for `Delta`, both shared by linears that read the same
tensor; of one that is added to the stream `W Delta` and `D` are one sum, of `4 d_out d_in`. Once `d_in^3 / 3 + 2 d_out d_in^2`, in float64.
Memory: two matrices of the inputs, one of each weight. Measured, also what was left out (tokens weighted by their gradients, strengths by
cross-validation): `docs/log.md`, 20.

References: GPTAQ (Li et al. 2025, arXiv 2504.02692) and Qronos (arXiv 2505.11695) for targets that know the quantized prefix; the stream's
error as a second target and the strengths are measured here. CoreQ (arXiv 2602.05902) has a closed form for a strength.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from roundel.linalg.gram import add_gram, add_product, mirror
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


class Moments:
    """Sums over tokens for linears that read the same tensor."""

    def __init__(self, weights: Mapping[str, Float[Tensor, "d_out d_in"]], added: Collection[str], strengths: Strengths) -> None:
        """Without any token; of linears with these weights, by name, some of which are `added` to the stream."""
        W = next(iter(weights.values()))
        self._weights, self._strengths = {name: own.float() for name, own in weights.items()}, strengths
        self._second = torch.zeros(W.shape[1], W.shape[1], device=W.device)
        """`sum xq xq^T`; only its lower triangle until `settle`."""
        self._wanted = {name: torch.zeros(own.shape, device=own.device) for name, own in weights.items() if name in added}
        """`sum (s W (x - xq) + t (r - rq)) xq^T`, `(d_out, d_in)`, by name."""
        self._difference = torch.zeros_like(self._second) if len(self._wanted) < len(weights) else None
        """`sum (x - xq) xq^T`, for all others."""

    def add(
        self,
        x: Float[Tensor, "tokens d_in"],
        xq: Float[Tensor, "tokens d_in"],
        streams: Mapping[str, Float[Tensor, "tokens d_out"]],
    ) -> None:
        """Adds tokens; `streams` are `r - rq`, divided by what the linear's output is multiplied by before it is added."""
        change = x - xq
        add_gram(self._second, xq)
        if self._difference is not None:
            add_product(self._difference, change, xq)
        for name, total in self._wanted.items():
            error = self._strengths.prefix * (change @ self._weights[name].T) + self._strengths.stream * streams[name]
            add_product(total, error, xq)

    def sums(self) -> list[Tensor]:
        """All of them."""
        return [self._second, *([] if self._difference is None else [self._difference]), *self._wanted.values()]

    def settle(self) -> None:
        """All tokens are there."""
        mirror(self._second)

    def targets(self, names: Sequence[str]) -> dict[str, Float[Tensor, "d_out d_in"]]:
        """What linears are to be rounded to, in float32, by name; all that are asked for at once: what they are made of is let go of.

        Raises:
            NumericalError: the moments are not finite.
        """
        root = damped_cholesky(self._second, self._strengths.damping)[1]
        found = {}
        for name in names:
            W, wanted = self._weights[name], self._wanted.get(name)
            if wanted is None:
                assert self._difference is not None
                wanted = self._strengths.prefix * (W @ self._difference)
            found[name] = W + torch.cholesky_solve(wanted.double().T, root).T.float()
        self._difference = None
        self._weights, self._wanted = {}, {}
        return found

    def met(self, factors: Factors) -> Factors:
        """Curvature whose input side is the mean of its own and of what the rounded layers give."""
        mean = self._second.diagonal().mean()
        if not (torch.isfinite(mean) and mean > 0):
            return factors
        groups = [replace(own, H_in=(own.H_in + (self._second / mean).to(own.H_in)) / 2) for _, own in factors.row_groups()]
        return groups[0] if len(groups) == 1 else GroupedFactors(groups=tuple(groups))
