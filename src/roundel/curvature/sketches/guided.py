"""GuidedQuant (arXiv 2505.07004): input factors of their own for groups of output channels, no coupling between channels.

The Fisher block of output channel `j`, without its cross-token terms, is `E_t[g_tj^2 x_t x_t^T]`. Blocks are averaged over groups of
consecutive channels,

    H_in_k = E_t[s_tk x_t x_t^T],    s_tk = mean of g_tj^2 over the channels j of group k,    H_out_k = I,

so rounding feeds back along a row only, with curvature that knows which tokens matter to the group. One group is the first weighted
half round of Sketch A; as many groups as channels have each channel's own block. The scale of a group is the mean diagonal of
its channels' Fisher, in nats per token.

The paper takes the labels of the data (the empirical Fisher): `--labels data` is its version. By default they are sampled from the model,
as for every estimator here. Groups differ by at most one channel where they do not divide `d_out`.

Cost per token: `groups d_in^2` flops (Grams by halves) and `2 d_out + groups d_in` for the weights. Memory `4 groups d_in^2` bytes.
Not done: the paper's non-uniform grids.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from roundel.curvature.sketches.base import Estimator, Sketch
from roundel.errors import SchemeError
from roundel.linalg.gram import add_gram, symmetrise
from roundel.types import GroupedFactors, KroneckerFactors, LayerGrad

__all__ = ["Guided"]


class _Sums(Sketch):
    """`xsx.k`: the sum of `s_tk x_t x_t^T`."""

    def __init__(self, d_out: int, d_in: int, device: torch.device, groups: int) -> None:
        super().__init__(d_out, d_in, device)
        self.channels = [len(part) for part in torch.arange(d_out).tensor_split(min(groups, d_out))]
        self.sums = {f"xsx.{k}": torch.zeros(d_in, d_in, dtype=torch.float32, device=device) for k in range(len(self.channels))}

    def add_sequence(self, grad: LayerGrad, sequence: int) -> None:
        x, g = grad.input.x[sequence].float(), grad.g[sequence].float()
        for total, part in zip(self.sums.values(), g.split(self.channels, dim=1), strict=True):
            root = torch.linalg.vector_norm(part, dim=1, keepdim=True) / part.shape[1] ** 0.5
            add_gram(total, x * root)

    def factors(self) -> GroupedFactors:
        groups = []
        for total, channels in zip(self.sums.values(), self.channels, strict=True):
            trace = channels * total.diagonal().sum(dtype=torch.float64).item() / max(self.tokens, 1)
            groups.append(KroneckerFactors.normalised(torch.eye(channels, device=self.device), symmetrise(total), trace=trace))
        return GroupedFactors(groups=tuple(groups))


@dataclass(frozen=True, kw_only=True)
class Guided(Estimator):
    """`groups` groups of consecutive output channels, each with its own `H_in`; with fewer channels than groups, one for each."""

    groups: int = 4

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise SchemeError(f"guided: groups={self.groups}, expected 1 or more")

    @property
    def row_groups(self) -> int:
        return self.groups

    def sketch(self, d_out: int, d_in: int, device: torch.device, *, index: int = 0, previous: KroneckerFactors | None = None) -> Sketch:
        return _Sums(d_out, d_in, device, self.groups)
