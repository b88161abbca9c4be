"""Candidates of a linear - other factors, other schemes - and the measure that chooses among them.

It is the KL that gradients which the factors have not seen predict for the actual errors, `1/2 E_s <G_s, E>^2`, all candidates of all
linears in one backward pass over them (`curvature.inner_products`): `2 d_in d_out` flops per token, linear and candidate. The codes of all
candidates are in memory until the choice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from roundel.artifacts.source import Source, device_of
from roundel.curvature import Sketch, inner_products
from roundel.curvature.collect import safe_batch_size
from roundel.curvature.sketches.base import Candidate
from roundel.formats import FORMATS
from roundel.grids import Grid
from roundel.recipes import Recipe
from roundel.rounding import allocate
from roundel.rounding.round import dequantized
from roundel.stages.notes import Notes
from roundel.stages.rounding.linears import Linear, round_linears
from roundel.types import RoundedWeight, TokenBatch

__all__ = ["Rows", "fitted", "predicted_losses", "round_candidates"]

Rows = dict[str, dict[str, Any]]
"""Of the report, by linear."""


def round_candidates(
    recipe: Recipe,
    grid: Grid,
    source: Source,
    candidates: Sequence[tuple[str, Candidate]],
    targets: Mapping[str, Tensor] | None = None,
    *,
    kept: bool = True,
) -> list[tuple[RoundedWeight, dict[str, Any]]]:
    """Linears by name, each with factors to be rounded with, all at once; to `targets`, where they are not the weights themselves."""
    asked = []
    for name, candidate in candidates:
        stored = source.checkpoint.weight_of(name)
        assert stored is not None
        damping = min(10.0, recipe.damping * candidate.damping)
        target = (targets or {}).get(name)
        asked.append(Linear(name=name, stored=source.checkpoint.read(stored), target=target, factors=candidate.factors, damping=damping))
    results = round_linears(recipe, grid, asked, device_of(source.model), kept=kept)
    for linear, (_, row) in zip(asked, results, strict=True):
        row["damping_raised"] = row["damping"] > linear.damping
    return results


def predicted_losses(
    recipe: Recipe,
    source: Source,
    rounded: Mapping[str, Mapping[str, RoundedWeight]],
    unseen: TokenBatch,
    notes: Notes,
    *,
    batch_size: int,
    sketches: Mapping[str, Sketch] | None = None,
) -> dict[str, dict[str, Tensor]]:
    """For each linear and label the predicted KL of each sequence, in nats per token; the gradients are added to the sketches."""
    linears = {name: source.linears[name] for name in rounded}

    def error_of(label: str) -> Callable[[str], Tensor]:
        return lambda name: linears[name].weight.float().cpu() - dequantized(rounded[name][label])

    labels = list(next(iter(rounded.values())))
    # its last batch has another size than those of the calibration, for which `batch_size` was found safe
    batch_size = safe_batch_size(source.model, linears, unseen, seed=recipe.seed, batch_size=batch_size, labels=recipe.labels)
    with notes.progress.stage("choice", len(unseen)) as advance:
        inner = inner_products(
            source.model,
            linears,
            {label: error_of(label) for label in labels},
            unseen,
            seed=recipe.seed,
            batch_size=batch_size,
            labels=recipe.labels,
            advance=advance,
            sketches=sketches if recipe.labels != "data" else None,  # the prediction's labels are the model's own, those sums have others
        )
    return {name: {label: 0.5 * inner[label][name].square() / unseen.ids.shape[1] for label in labels} for name in rounded}


def fitted(recipe: Recipe, rounded: dict[str, RoundedWeight]) -> dict[str, RoundedWeight]:
    """With what linears must share that the format's engines run as one product."""
    if recipe.fuses:
        for unit in allocate.fused_units(list(rounded)).values():
            rounded |= FORMATS[recipe.written_format()].together({name: rounded[name] for name in unit})
    return rounded
