"""Another estimator's factors reduced to their diagonals: FastKron's ablation OnlyDiag.

    H_out <- diag(H_out),    H_in <- diag(H_in)

The diagonals keep their mean of 1, and the absolute scale is the other estimator's. Without a rotation diagonal factors make
feedback a no-op (their `L` is the identity): the result then differs from `identity` only through the weights of the scale
search and of the descent and refit that follow. What is lost against `of` is what the off-diagonal curvature is worth.

Cost per token in flops and memory in bytes: those of `of` (see there), whose passes run unchanged; only the factors of the last one are
reduced, `d_in + d_out` numbers. Not done: summing only the diagonals, which would be cheaper for `kfac` but is no use for the comparison.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from roundel.curvature.sketches.base import Estimator, Sketch
from roundel.types import Factors, GroupedFactors, KroneckerFactors, LayerGrad

__all__ = ["Diagonal"]


class _Diagonals(Sketch):
    """Wraps the last pass of another sketch, whose sums are also its own."""

    def __init__(self, full: Sketch) -> None:
        super().__init__(full.d_out, full.d_in, full.device, full.index)
        self.full, self.sums = full, full.sums

    def add_sequence(self, grad: LayerGrad, sequence: int) -> None:
        self.full.add_sequence(grad, sequence)

    def merge(self, other: Sketch) -> None:
        if isinstance(other, _Diagonals):
            self.full.merge(other.full)
            self.tokens += other.tokens
            self.rows += other.rows
        else:
            super().merge(other)  # which refuses

    def finish(self) -> None:
        self.full.finish()

    def factors(self) -> Factors:
        self.full.tokens = self.tokens
        full = self.full.factors()
        if isinstance(full, GroupedFactors):
            return GroupedFactors(groups=tuple(map(_diagonal, full.groups)))
        return _diagonal(full)


def _diagonal(full: KroneckerFactors) -> KroneckerFactors:
    H_out, H_in = torch.diag(full.H_out.diagonal()), torch.diag(full.H_in.diagonal())
    return KroneckerFactors(H_out=H_out, H_in=H_in, scale=full.scale)


@dataclass(frozen=True, kw_only=True)
class Diagonal(Estimator):
    """The diagonals of the factors of the estimator named `of`."""

    of: str = "mean"

    def __post_init__(self) -> None:
        self.full()

    def full(self) -> Estimator:
        """The estimator whose factors are reduced."""
        from roundel.curvature.sketches import parse_curvature  # the table there holds this class too

        return parse_curvature(self.of)

    @property
    def passes(self) -> int:
        return self.full().passes

    @property
    def row_groups(self) -> int:
        return self.full().row_groups

    def pilot(self, sequences: int) -> int:
        return self.full().pilot(sequences)

    def sketch(self, d_out: int, d_in: int, device: torch.device, *, index: int = 0, previous: KroneckerFactors | None = None) -> Sketch:
        full = self.full().sketch(d_out, d_in, device, index=index, previous=previous)
        return _Diagonals(full) if index == self.passes - 1 else full
