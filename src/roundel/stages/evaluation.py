"""What the rounded model costs: predicted from held-out gradients, and measured on the written directory as engines load it."""

from __future__ import annotations

from pathlib import Path

from roundel.artifacts.checkpoints import load_written
from roundel.artifacts.source import Source, device_of
from roundel.calibration import Split
from roundel.curvature import predicted_kl
from roundel.curvature.collect import Prediction
from roundel.evaluate import Divergence, compare_models
from roundel.recipes import Recipe
from roundel.rounding.round import dequantized
from roundel.stages.notes import Notes
from roundel.stages.rounding import Rounded

__all__ = ["evaluate_written", "predict"]


def predict(recipe: Recipe, source: Source, split: Split, rounded: Rounded, notes: Notes, *, batch_size: int) -> Prediction:
    """The KL that gradients on held-out text predict for the errors of all linears."""
    chosen = {name: source.linears[name] for name in rounded.weights}
    with notes.timed("prediction"), notes.progress.stage("prediction", len(split.heldout)) as advance:
        return predicted_kl(
            source.model,
            chosen,
            lambda name: chosen[name].weight.float().cpu() - dequantized(rounded.weights[name]),
            split.heldout,
            seed=recipe.seed,
            batch_size=batch_size,
            labels=recipe.labels,
            advance=advance,
        )


def evaluate_written(
    staging: Path, recipe: Recipe, source: Source, split: Split, rounded: Rounded, notes: Notes, *, batch_size: int
) -> Divergence:
    """The KL on held-out text of the model that a directory holds."""
    with notes.timed("evaluation"), notes.progress.stage("evaluation", len(split.heldout)) as advance:
        known = {"format": recipe.written_format(), "layers": rounded.layers}
        engine = load_written(staging, device=device_of(source.model), dtype=source.model.dtype, report=known)
        return compare_models(engine, source.model, split.heldout, batch_size=batch_size, advance=advance)
