"""All linears with one scheme, decoder layer after decoder layer."""

from __future__ import annotations

from roundel.artifacts.source import Source
from roundel.curvature import Sketch, parse_curvature
from roundel.grids import Grid
from roundel.recipes import Recipe
from roundel.stages.notes import Notes
from roundel.stages.rounding.candidates import Rows, fitted, round_candidates
from roundel.stages.rounding.choice import choose_factors
from roundel.stages.rounding.error_aware import Targets
from roundel.stages.rounding.linears import decoder_layers
from roundel.types import RoundedWeight, TokenBatch

__all__ = ["round_all"]


def round_all(
    recipe: Recipe,
    grid: Grid,
    source: Source,
    sketches: dict[str, Sketch],
    unseen: TokenBatch,
    notes: Notes,
    *,
    batch_size: int,
    correct_on: tuple[TokenBatch, TokenBatch] | None = None,
) -> tuple[dict[str, RoundedWeight], Rows]:
    """Rounds every linear and empties `sketches`; a linear that no gradient reached is moved to `source.skipped`.

    With sequences in `unseen`, each linear's factors are chosen by them, and then they are added to the sums (`choose_factors`). With text
    to `correct_on`, and to judge that by, later linears make up for the errors of earlier ones (`error_aware`): the rows of each decoder
    layer then tell what that has brought after it.
    """
    labels, predicted = choose_factors(recipe, grid, source, sketches, unseen, notes, batch_size=batch_size)
    rounded: dict[str, RoundedWeight] = {}
    rows: Rows = {}
    targets = None
    if correct_on is not None:
        factors = {name: parse_curvature(recipe.curvature).candidates(sketches[name])[label].factors for name, label in labels.items()}
        targets = Targets(source.model, factors, *correct_on, seed=recipe.seed, batch_size=batch_size)
        del factors
    with notes.progress.stage("rounding", len(labels)) as advance:
        for names in decoder_layers(labels):
            chosen = {name: parse_curvature(recipe.curvature).candidates(sketches.pop(name))[labels[name]] for name in names}
            found = round_candidates(recipe, grid, source, list(chosen.items()), targets.values if targets else {})
            for name, (weight, row) in zip(names, found, strict=True):
                rounded[name], rows[name] = weight, row
                if name in predicted:
                    row |= {"candidate": labels[name], "candidates_predicted_kl": predicted[name]}
                if row.pop("damping_raised"):
                    notes.warn(f"{name}: damping raised to {row['damping']:g}, its factors were not positive definite")
            rounded |= fitted(recipe, {name: rounded[name] for name in names})
            if targets and (moved := targets.follow({name: rounded[name] for name in names})):
                for name in names:
                    rows[name]["error_aware"] = moved
                if not moved["taken"]:
                    notes.warn(f"what follows {names[-1]} does not make up for its errors: that raised the KL on held-out calibration text")
            advance(len(names))
    return rounded, rows
