"""llama.cpp's curvature: the mean square of each input column, `H_in = diag(E[x_j^2])`, `H_out = I`.

What its quantizer rounds under (`formats.imatrix`), for comparisons, and for users who have an importance matrix and no time to collect
more: `imatrix:FILE` takes the sums of a file (`artifacts.imatrix_sums`), and no gradient is needed. Without a rotation a diagonal
`H_in` makes feedback a no-op; scales, sweeps and prefix-aware targets still use it.

Cost per token: `2 d_in` flops. Memory `4 d_in` bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from roundel.curvature.sketches.base import Estimator, Sketch, aligned
from roundel.errors import SchemeError
from roundel.types import KroneckerFactors, LayerGrad

__all__ = ["Imatrix"]


class _Sums(Sketch):
    def __init__(self, d_out: int, d_in: int, device: torch.device) -> None:
        super().__init__(d_out, d_in, device)
        self.start()
        self.sums["squares"] = torch.zeros(d_in, dtype=torch.float32, device=device)

    def add_sequence(self, grad: LayerGrad, sequence: int) -> None:
        self.sums["squares"] += aligned(grad.input.x, sequence).square().sum(0)
        self.add_token_trace(grad, sequence)

    def factors(self) -> KroneckerFactors:
        return self.normalised(torch.eye(self.d_out, device=self.device), torch.diag(self.sums["squares"]))


@dataclass(frozen=True, kw_only=True)
class Imatrix(Estimator):
    """`H_out = I`, `H_in = diag(E[x_j^2])`, of the text or, with a `file`, of an importance matrix."""

    file: str = ""

    def sketch(self, d_out: int, d_in: int, device: torch.device, *, index: int = 0, previous: KroneckerFactors | None = None) -> Sketch:
        if self.file:
            raise SchemeError(f"imatrix:{self.file} is for quantize and refine; here imatrix, without a file, collects its sums from text")
        return _Sums(d_out, d_in, device)
