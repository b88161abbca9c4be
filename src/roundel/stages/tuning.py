"""Tuning of a rounded model's codes and scales, and of what is not quantized: the stage that chooses the method and its text.

The methods themselves are in `roundel.tuning`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from roundel import processes
from roundel.artifacts.rounded import shared
from roundel.artifacts.source import Source
from roundel.artifacts.work import Work
from roundel.calibration import Split
from roundel.formats import FORMATS
from roundel.grids import TileGrid, parse_scheme
from roundel.recipes import Recipe
from roundel.rotation import Rotation
from roundel.stages.notes import Notes
from roundel.stages.rounding import Rounded
from roundel.stages.text import set_apart
from roundel.tuning import Job, Tuned, tune_blocks, tune_end_to_end
from roundel.types import RoundedWeight, TokenBatch

__all__ = ["rest_of", "tune_model"]


def tune_model(
    recipe: Recipe,
    source: Source,
    split: Split,
    rounded: Rounded,
    notes: Notes,
    *,
    batch_size: int,
    work: Work,
    judged_by: TokenBatch | None = None,
) -> Rounded:
    """As the recipe says, from the codes and other parameters in `rounded`; `work` keeps the state of unfinished steps.

    The best state is chosen on `judged_by`, or on a part of the calibration text (`set_apart`), which rounding should not have fitted.
    """
    if recipe.tune == "none":
        return rounded
    source.whole("tuning")
    steps_on, judged_by = set_apart(split) if judged_by is None else (split.used, judged_by)
    groups = range(len(source.layers))
    turns = 1 if recipe.tune == "end-to-end" else sum(bool(source.layers.inside(index, source.linears)) for index in groups)
    codes_stay = all(isinstance(parse_scheme(weight.scheme), TileGrid) for weight in rounded.weights.values())
    stays = rounded.ends.values() | {name: value() for name, value in source.fixed.items()}
    wanted = recipe.tune_rest if recipe.tune_rest is not None else codes_stay or recipe.tune == "end-to-end"
    with notes.timed("tuning"), notes.progress.stage("tuning", turns * recipe.steps) as advance:
        job = Job(
            source=source,
            rounded=rounded.weights,
            tokens=steps_on,
            unseen=judged_by,
            steps=recipe.steps,
            step_tokens=recipe.step_tokens,
            others={name: kind for name, kind in rest_of(source).items() if name not in stays} if wanted else {},
            moved={**rounded.others, **stays},
            seed=recipe.seed,
            batch_size=batch_size,
            work=work.path if work.kept else None,
            advance=advance,
        )
        tuned = tune_end_to_end(job) if recipe.tune == "end-to-end" else tuned_by_first(job)
    if tuned.best_step == 0:
        notes.warn("tuning did not lower the KL on held-out calibration text: the codes are those of rounding")
    moved = {name: value for name, value in tuned.parameters.items() if name not in stays}
    report = {
        "method": recipe.tune,
        "best_step": tuned.best_step,
        "held_out_kl": {"before": tuned.held_out_kl[0], "after": tuned.held_out_kl[1]},
        "other_parameters": len(moved),
        "history": tuned.history,
    }
    layers = {name: {**row, **_bits_with_vectors(tuned.rounded[name], recipe)} for name, row in rounded.layers.items()}
    return dataclasses.replace(rounded, weights=tuned.rounded, layers=layers, others=moved, tuning=report)


def tuned_by_first(job: Job) -> Tuned:
    """Blocks, which one process tunes while others wait."""
    if processes.world() == 1:
        return tune_blocks(job)
    found: list[Tuned] = []

    def made() -> dict[str, Any]:
        found.append(tune_blocks(job))
        return {"history": found[0].history, "best_step": found[0].best_step, "held_out_kl": list(found[0].held_out_kl)}

    notes = processes.from_first(made)
    weights, _ = shared(found[0].rounded if found else {}, {name: {} for name in found[0].rounded} if found else {})
    parameters, _ = processes.exchanged(found[0].parameters if found else {})
    return Tuned(
        rounded=weights,
        parameters=parameters,
        history=notes["history"],
        best_step=notes["best_step"],
        held_out_kl=(notes["held_out_kl"][0], notes["held_out_kl"][1]),
    )


def rest_of(source: Source) -> dict[str, torch.dtype]:
    """Norms, biases, embedding and output head, if it is not quantized, and the types in which they are stored."""
    ends = {id(module.weight) for module in (source.model.get_input_embeddings(), source.model.get_output_embeddings()) if module}  # type: ignore[no-untyped-call]
    quantized = {id(linear.weight) for linear in source.linears.values()}
    stored = {
        name: source.checkpoint.stored(name)
        for name, parameter in source.model.named_parameters()
        if parameter.ndim == 1 or id(parameter) in ends - quantized
    }
    return {name: source.checkpoint.read(tensor).dtype for name, tensor in stored.items() if tensor is not None}


def _bits_with_vectors(weight: RoundedWeight, recipe: Recipe) -> dict[str, float]:
    """Bits per weight where tuning has put vectors in place of signs, which may take more."""
    form = FORMATS.get(recipe.written_format())
    if form is None or not (isinstance(weight.rotation, Rotation) and weight.rotation.has_vectors):
        return {}
    return {"bits_per_weight": 8 * sum(tensor.nbytes for tensor in form.pack(weight).values()) / math.prod(weight.shape)}
