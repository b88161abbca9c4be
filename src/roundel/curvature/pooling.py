"""Experts that saw too little text borrow from the others of their layer.

Problem: a router sends most tokens to some experts, and some get hardly any, or none in all of the calibration text. The curvature of a
matrix of width `d_in` needs more rows than that has columns; with fewer it knows a few directions only, without any there is nothing to
round by. Experts of a layer read the same hidden state and write to the same stream, so what their curvature has in common is known from
the others. With `n` rows, `m = ENOUGH d_in` and the mean `H` of the experts' factors, each weighted with its curvature,

    H_e <- (n H_e + (m - n) H) / m   if n < m,    on both sides

while the absolute size `scale_e`, how much the expert matters to the KL of the text, stays its own; that of one without a row is what the
mean of the others would be with half a row.

Cost: two passes over the factors of a layer's experts, of which one is made at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from roundel.curvature.sketches.base import Candidate, Estimator, Sketch
from roundel.types import KroneckerFactors

__all__ = ["ENOUGH", "Pooled"]

ENOUGH = 4
"""Rows for each column from which on an expert needs no others."""


class Pooled:
    """Candidates of a layer's linears, among them families of experts' that have the same part in each."""

    def __init__(self, estimator: Estimator, sketches: Mapping[str, Sketch], family_of: Callable[[str], str | None]) -> None:
        """Of these sums; `family_of` gives an expert's linear the name of its family."""
        self._estimator, self._sketches = estimator, sketches
        self._families: dict[str, list[str]] = {}
        for name in sketches:
            if (family := family_of(name)) is not None:
                self._families.setdefault(family, []).append(name)
        self._family = {name: family for family, names in self._families.items() for name in names}
        self._means: dict[str, dict[str, KroneckerFactors]] = {}
        for family, names in self._families.items():
            if any(self.borrowed(name) for name in names):
                self._means[family] = self._mean(names)

    def borrowed(self, name: str) -> float:
        """What part of a linear's factors is that of its family."""
        if name not in self._family:
            return 0.0
        sketch = self._sketches[name]
        return max(0.0, 1 - sketch.rows / (ENOUGH * sketch.d_in))

    def candidates(self, name: str) -> dict[str, Candidate]:
        """As the estimator's, by label."""
        own: dict[str, Candidate] = self._estimator.candidates(self._sketches[name])
        part = self.borrowed(name)
        means = self._means.get(self._family.get(name, ""), {})
        return {label: self._blended(candidate, means.get(label), part) for label, candidate in own.items()} if part else own

    def _blended(self, own: Candidate, mean: KroneckerFactors | None, part: float) -> Candidate:
        if mean is None or not isinstance(own.factors, KroneckerFactors):
            return own
        if own.factors.scale == 0:
            return dataclasses.replace(own, factors=dataclasses.replace(mean, carry={}))
        H_out, H_in = (torch.lerp(ours, theirs, part) for ours, theirs in ((own.factors.H_out, mean.H_out), (own.factors.H_in, mean.H_in)))
        return dataclasses.replace(own, factors=KroneckerFactors(H_out=H_out, H_in=H_in, scale=own.factors.scale))

    def _mean(self, names: list[str]) -> dict[str, KroneckerFactors]:
        """By label the mean over a family; its scale is that of half a row."""
        sums: dict[str, tuple[Tensor, Tensor]] = {}
        scales: dict[str, float] = {}
        rows = 0
        for name in names:
            rows += self._sketches[name].rows
            for label, candidate in self._estimator.candidates(self._sketches[name]).items():
                factors = candidate.factors
                if not isinstance(factors, KroneckerFactors) or factors.scale == 0:
                    continue
                if label not in sums:
                    sums[label] = (torch.zeros_like(factors.H_out), torch.zeros_like(factors.H_in))
                for total, H in zip(sums[label], (factors.H_out, factors.H_in), strict=True):
                    total.add_(H, alpha=factors.scale)
                scales[label] = scales.get(label, 0.0) + factors.scale
        return {
            label: KroneckerFactors(H_out=H_out / scales[label], H_in=H_in / scales[label], scale=scales[label] / max(1, 2 * rows))
            for label, (H_out, H_in) in sums.items()
        }
