"""Roundings that are made to be compared: of one linear under other factors or with other schemes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from roundel import processes
from roundel.artifacts.rounded import shared
from roundel.artifacts.source import Source, device_of
from roundel.curvature import Candidate
from roundel.grids import Grid
from roundel.recipes import Recipe
from roundel.stages.linears import Linear, round_linears
from roundel.types import RoundedWeight

__all__ = ["DRAFT_SWEEPS", "Draft", "draft_rounding", "drafts_of"]

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


def drafts_of(source: Source, names: Sequence[str], make: Callable[[str], dict[str, Draft]]) -> dict[str, dict[str, Draft]]:
    """Drafts of linears by name and label; each of several processes makes those of some linears."""
    cost = {name: float(source.linears[name].weight.numel() * sum(source.linears[name].weight.shape)) for name in names}
    own = {f"{name}\t{label}": draft for name in processes.shared_out(cost) for label, draft in make(name).items()}
    weights, rows = shared({key: draft.weight for key, draft in own.items()}, {key: draft.row for key, draft in own.items()})
    found: dict[str, dict[str, Draft]] = {name: {} for name in names}
    for key, weight in weights.items():
        name, _, label = key.partition("\t")
        found[name][label] = Draft(weight=weight, row=rows[key])
    return found
