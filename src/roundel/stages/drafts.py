"""Roundings that are made to be compared: of one linear under other factors or with other schemes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from roundel.artifacts.source import Source, device_of
from roundel.curvature import Candidate
from roundel.grids import Grid
from roundel.recipes import Recipe
from roundel.stages.linears import Linear, round_linears
from roundel.types import RoundedWeight

__all__ = ["DRAFT_SWEEPS", "Draft", "draft_rounding"]

DRAFT_SWEEPS = 0
"""Sweeps of a rounding that is made only to compare: feedback alone ranks candidates as well, at a fifth of the cost."""


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A rounding and its row of the report."""

    weight: RoundedWeight
    row: dict[str, Any]


def draft_rounding(
    recipe: Recipe, grid: Grid, source: Source, name: str, candidates: Mapping[str, Candidate], *, kept: bool
) -> dict[str, Draft]:
    """A linear rounded with each of some factors, by label; where they are not `kept` the recipe's format need not hold them."""
    asked = [
        Linear.of(source, name, factors=candidate.factors, damping=min(10.0, recipe.damping * candidate.damping))
        for candidate in candidates.values()
    ]
    found = round_linears(recipe, grid, asked, device_of(source.model), kept=kept)
    return {label: Draft(weight=weight, row=row) for label, (weight, row) in zip(candidates, found, strict=True)}
