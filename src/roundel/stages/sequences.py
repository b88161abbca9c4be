"""How many calibration sequences are enough: `--sequences auto`.

Problem: the more sequences, the less a linear's factors owe to chance, and the longer collecting them takes; where the one is no longer
worth the other depends on the widths and the text. Here the factors of the linears of one decoder layer, that in the middle, are collected
from `LEAST` sequences, twice as many, and so on. At each number the linears are rounded with them, by feedback alone, to errors `E`, and
other sequences judge those by their own K-FAC loss (Martens and Grosse 2015, arXiv 1503.05671),

    1/2 mean over tokens t, u of (g_t^T E x_u)^2,    in nats per token.

It is enough when twice as many have not lowered that by more than the standard error of the difference, over the judging sequences. The
prediction `1/2 <G, E>^2` of the KL, by which factors are chosen, is of one gradient for each sequence and far too noisy for this.

Cost: a forward pass of what is tried in all and of the `JUDGES` for each number, a backward pass down to the middle, `kfac`'s sums of one
layer (estimators that need one pass are tried themselves), and a draft for each number. Memory: hidden states of one doubling.

Not done: numbers beyond those whose sequences are in no way held out by any number (256 with the default settings).
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from roundel.artifacts.source import Source
from roundel.artifacts.work import Work, readable
from roundel.calibration import read_documents, windows
from roundel.curvature import Estimator, Sketch, parse_curvature
from roundel.errors import DataError, NumericalError
from roundel.grids import parse_scheme
from roundel.linalg.fast import fast_products
from roundel.recipes import Recipe
from roundel.rounding.round import dequantized
from roundel.stages.drafts import DRAFT_SWEEPS, draft_rounding
from roundel.stages.linears import schemes_of
from roundel.stages.notes import Notes
from roundel.stages.opening import settle_opening
from roundel.stages.text import check_vocabulary
from roundel.store import write_json
from roundel.sweeps import Visit, gradient_visits
from roundel.sweeps.gradients import steps
from roundel.types import LayerGrad, TokenBatch

__all__ = ["enough_sequences", "without_auto"]

AUTO = "auto"
"""In the place of a number."""

LEAST = 32
"""Sequences to begin with."""

JUDGES = 16
"""Sequences that have no part in the sums."""


def without_auto(settings: Mapping[str, Any]) -> tuple[bool, dict[str, Any]]:
    """Whether the number of sequences is to be found out, and the settings without that."""
    searched = settings.get("sequences") == AUTO
    return searched, {name: value for name, value in settings.items() if not (searched and name == "sequences")}


def enough_sequences(recipe: Recipe, source: Source, notes: Notes, *, work: Work) -> int:
    """The number to calibrate on; `notes.tried` is told of what was tried.

    Raises:
        DataError: there is no text to try numbers on.
        StorageError: what a work directory knows of it is damaged.
    """
    if recipe.calibration == "self":
        raise DataError("--sequences auto needs calibration text (--calibration): sampling it from the model takes longer than its sums")
    found = work.path / "sequences.json"
    if work.kept and found.is_file():
        with readable(found):
            notes.tried = json.loads(found.read_text(encoding="utf-8"))
            number = _chosen(notes.tried)
    else:
        with notes.timed("sequences"):
            notes.tried = _tried(recipe, source, notes, work=work)
            number = _chosen(notes.tried)
        if work.kept:
            write_json(found, notes.tried)
    if not any(row["enough"] for row in notes.tried):
        notes.warn(f"--sequences auto: {number} sequences, the most that were tried, are still better than half of them")
    return number


def _chosen(tried: Sequence[Mapping[str, Any]]) -> int:
    return int(next((row["sequences"] for row in tried if row["enough"]), tried[-1]["sequences"]))


def _tried(recipe: Recipe, source: Source, notes: Notes, *, work: Work) -> list[dict[str, Any]]:
    """Each number with its loss on other sequences, and whether it is enough."""
    judges, tokens = _text(recipe, source, notes)
    layers = source.layers
    inside = [index for index in range(len(layers)) if layers.inside(index, source.linears)]
    if not inside:
        raise DataError("--sequences auto tries numbers on the linears of a decoder layer, and none is to be quantized: give a number")
    names = layers.inside(inside[len(inside) // 2], source.linears)
    linears = {name: source.linears[name] for name in names}
    estimator = _estimator(recipe)
    sketches = {name: estimator.sketch(linear.out_features, linear.in_features, layers.device) for name, linear in linears.items()}
    numbers = [LEAST << power for power in range((len(tokens) // LEAST).bit_length())]
    rows: list[dict[str, Any]] = []
    before: Tensor | None = None
    weight = steps(layers, linears)
    with notes.progress.stage("number of sequences", weight * (len(numbers) * JUDGES + len(tokens))) as advance:
        for done, number in itertools.pairwise((0, *numbers)):
            text = TokenBatch.of(torch.cat([judges.ids, tokens.ids[done:number]]))
            visits = gradient_visits(
                layers,
                linears,
                text,
                seed=recipe.seed,
                labels="sampled",
                batch_size=1,  # the result must not depend on it
                store=work.passing("sequences"),
                advance=advance,
                quickly=True,
            )
            for visit in visits:
                _add(visit, range(JUDGES, len(text)), sketches)
                losses = _losses(recipe, source, visit, estimator, sketches)
            rows.append({"sequences": number, "held_out_loss": losses.mean().item(), "enough": False})
            if before is not None:
                gain = before - losses
                fall, error = gain.mean().item(), gain.std().item() / math.sqrt(JUDGES)
                rows[-2] |= {"fall": fall, "fall_stderr": error, "enough": fall <= error}
                if rows[-2]["enough"]:
                    advance(weight * sum(JUDGES + other // 2 for other in numbers if other > number))
                    break
            before = losses
    return rows


def _text(recipe: Recipe, source: Source, notes: Notes) -> tuple[TokenBatch, TokenBatch]:
    """Sequences to judge by and to calibrate on, none of which is ever held out."""
    settle_opening(source, recipe.calibration, notes)
    most = 4 * (LEAST + recipe.eval_sequences)  # of which the last are held out, if no fewer than `LEAST` calibrate (`split_text`)
    found = windows(read_documents(recipe.calibration, source.tokenizer), source.tokenizer, source.length, most=most)
    count = len(found) - recipe.eval_sequences
    if count < JUDGES + LEAST:
        raise DataError(
            f"too little text in {recipe.calibration} for --sequences auto: {len(found)} sequences of {source.length} tokens, needed are "
            f"{JUDGES + LEAST + recipe.eval_sequences}; give a number, or more text"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(recipe.seed))
    number = LEAST << int(math.log2((count - JUDGES) / LEAST))
    judges, tokens = TokenBatch.of(found[order[:JUDGES]]), TokenBatch.of(found[order[JUDGES : JUDGES + number]])
    check_vocabulary(source.model, judges, tokens)
    return judges, tokens


def _estimator(recipe: Recipe) -> Estimator:
    """The recipe's, if it needs one pass over sequences that are all alike, else `kfac`."""
    wanted = parse_curvature(recipe.curvature)
    return wanted if wanted.passes == 1 and not wanted.held_out(LEAST) and not wanted.pilot(LEAST) else parse_curvature("kfac")


def _add(visit: Visit, rows: Sequence[int], sketches: Mapping[str, Sketch]) -> None:
    """Adds the sums of these sequences."""

    def consume(name: str, grad: LayerGrad) -> None:
        with fast_products(grad.g.device):
            sketches[name].update(grad)

    for row in rows:
        visit.replay([row], consume)


def _losses(recipe: Recipe, source: Source, visit: Visit, estimator: Estimator, sketches: Mapping[str, Sketch]) -> Tensor:
    """Of each judging sequence, if the linears were rounded with what has been summed up, in nats per token."""
    draft = dataclasses.replace(recipe, sweeps=min(recipe.sweeps, DRAFT_SWEEPS))
    schemes = schemes_of(recipe, source)
    errors: dict[str, Tensor] = {}
    for name, sketch in sketches.items():
        summed = copy.deepcopy(sketch)
        summed.finish()
        candidates = estimator.candidates(summed)
        if all(candidate.factors.scale > 0 for candidate in candidates.values()):
            rounded = draft_rounding(draft, parse_scheme(schemes[name]).draft(), source, name, candidates, kept=False)
            weight = next(iter(rounded.values())).weight
            errors[name] = source.linears[name].weight.float().cpu() - dequantized(weight)
    if not errors:
        raise NumericalError("--sequences auto: no usable gradient reached the linears that numbers are tried on; give a number")
    losses = torch.zeros(JUDGES, dtype=torch.float64)

    def consume(name: str, grad: LayerGrad) -> None:
        if name in errors:
            x, g = grad.input.x[0].float(), grad.g[0].float()
            with fast_products(g.device):
                losses[judge] += 0.5 * float((g @ errors[name].to(g.device) @ x.T).square().mean(dtype=torch.float64))

    for judge in range(JUDGES):
        visit.replay([judge], consume)
    return losses
