"""Which factors each linear is rounded with.

An estimator may offer several candidates for each linear (`Auto.candidates`); each is rounded with all of them, with few sweeps and a
cheaper grid of the same kind where the real one is expensive (`Grid.draft`), and one is chosen by held-out gradients (`candidates`). Then
those gradients join the sums.
"""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext

from roundel.artifacts.source import Source
from roundel.curvature import Sketch, choose, parse_curvature
from roundel.errors import NumericalError
from roundel.grids import Grid
from roundel.recipes import Recipe
from roundel.stages.notes import Notes
from roundel.stages.rounding.candidates import predicted_losses, round_candidates
from roundel.types import RoundedWeight, TokenBatch

__all__ = ["choose_factors"]

DRAFT_SWEEPS = 1
"""Sweeps of a rounding that is made only to compare factors."""


def choose_factors(
    recipe: Recipe, grid: Grid, source: Source, sketches: dict[str, Sketch], unseen: TokenBatch, notes: Notes, *, batch_size: int
) -> tuple[dict[str, str], dict[str, dict[str, float]]]:
    """Which candidate of the estimator each linear is to be rounded with; a linear that no gradient reached is moved to `source.skipped`.

    The sketches have not seen `unseen`. Each linear is rounded, as cheaply as ranks candidates (`DRAFT_SWEEPS`, `Grid.draft`), with all of
    them, and one is chosen by the KL that gradients of `unseen` predict. Those gradients are then added to the sums: the final factors are
    those of all sequences.

    Returns:
        The candidate of each linear, and by what it was chosen: the predicted KL of each, in nats per token; nothing where there was no
        choice.

    Raises:
        NumericalError: no linear is left.
    """
    estimator = parse_curvature(recipe.curvature)
    labels: dict[str, str] = {}
    drafts: dict[str, dict[str, RoundedWeight]] = {}
    draft = dataclasses.replace(recipe, sweeps=min(recipe.sweeps, DRAFT_SWEEPS))
    with notes.progress.stage("rounding drafts", len(source.linears)) if len(unseen) else nullcontext(lambda _n: None) as advance:
        for name in source.linears:
            candidates = estimator.candidates(sketches[name])
            if any(candidate.factors.scale == 0 for candidate in candidates.values()):
                source.skipped[name] = "no usable gradient reached it"
                notes.warn(f"{name} stays in its precision: no usable gradient reached it")
                del sketches[name]
            else:
                labels[name] = next(iter(candidates))
                if len(unseen):
                    labelled = [(name, candidate) for candidate in candidates.values()]
                    tried = round_candidates(draft, grid.draft(), source, labelled, kept=False)
                    drafts[name] = {label: weight for label, (weight, _) in zip(candidates, tried, strict=True)}
            advance(1)
    if not labels:
        raise NumericalError("no linear could be quantized: no usable gradient reached any")
    if drafts:
        predicted = predicted_losses(recipe, source, drafts, unseen, notes, batch_size=batch_size, sketches=sketches)
        labels |= {name: choose(values) for name, values in predicted.items()}
        return labels, {name: {label: values.mean().item() for label, values in own.items()} for name, own in predicted.items()}
    return labels, {}
