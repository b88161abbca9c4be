"""Curvature estimators side by side, under one rounding and one measure: `roundel compare`.

For each seed and number of sequences all estimators collect in one sweep over the decoder layers. Then each linear is rounded with each
estimator's factors to each scheme, exactly as `quantize` does it, and the KL of the whole model is measured on held-out text, the same for
all seeds and numbers of sequences: what `quantize` holds out with seed 0 and the largest number. Beside it: the held-out J and cosine of
the factors (`curvature.diagnose`), tokens, passes, seconds and memory.

Cost: a collection, then for each method and scheme a rounding and a forward pass of both models over the held-out text. Memory: two models,
the sums of all estimators for one group of layers, the factors of all. Each seed and number of sequences is saved when it is done, and
`resume` goes on after it.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from roundel.artifacts.curvatures import Curvatures
from roundel.artifacts.source import Source, load_source
from roundel.artifacts.work import Work, open_work
from roundel.calibration import Fingerprint, Split, data_hash
from roundel.curvature import Estimator, Sketch, parse_curvature
from roundel.curvature.collect import Measured, collect_visit, factors_of, passes, runs_of
from roundel.curvature.diagnose import Diagnosis, diagnose, total
from roundel.errors import OutputError, SchemeError
from roundel.evaluate import compare_models
from roundel.evaluate.comparison import PRINTED, compared_rows, summary_rows, write_comparison
from roundel.grids import parse_scheme
from roundel.models import select_linears
from roundel.models.experts import experts_of
from roundel.models.load import pick_device, pick_dtype
from roundel.progress import Progress, Silent
from roundel.recipes import GPTQ, NEAREST, Recipe
from roundel.rounding.round import dequantized
from roundel.settings import ABLATION
from roundel.stages.curvature import Measured as Collected
from roundel.stages.curvature import Settled, measured_in, settle
from roundel.stages.ends import Ends
from roundel.stages.notes import Notes
from roundel.stages.report import versions
from roundel.stages.rounding import choose_schemes, round_model
from roundel.stages.text import OVERLAP_WARNING, check_vocabulary, default_batch, split_text
from roundel.store import check_output, storage, write_json
from roundel.sweeps import Visit, gradient_visits, safe_batch_size
from roundel.sweeps.gradients import steps
from roundel.types import Factors, TokenBatch

__all__ = ["ABLATION", "PRINTED", "compare", "compared_rows"]

SCHEMA_VERSION = 1

NAMED: dict[str, dict[str, Any]] = {"nearest": NEAREST, "gptq": GPTQ}
"""Methods that are more than a curvature."""

DIAGNOSED = 32
"""Held-out sequences for J and the cosine."""


def compare(
    model: str | Path,
    *,
    output: str | Path,
    curvatures: Sequence[str] = ABLATION,
    schemes: Sequence[str] = ("int3-g32", "int4-g32"),
    sequences: Sequence[int] = (512,),
    seeds: int = 3,
    resume: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Quantizes one model by all methods and measures them on the same held-out text.

    Args:
        model: As for `quantize`.
        output: Directory to make: `compare.json`, `summary.csv`, `summary.md`, `index.html` and plots.
        curvatures: Estimators with settings; `gptq` and `nearest` are those recipes (no sweeps). The others are compared with the first.
        schemes: As for `quantize`.
        sequences: Numbers of calibration sequences; several give the calibration-size curve.
        seeds: So many seeds, from 0: of the choice of sequences and of the labels.
        resume: Keep what an interrupted comparison of the same settings has finished.
        device: As for `quantize`.
        dtype: As for `quantize`.
        batch_size: As for `quantize`.
        progress: Where to report; silent by default.
        settings: The other fields of `Recipe` but `scheme`, `curvature` and `seed`, common to all methods.

    Returns:
        The contents of compare.json.

    Raises:
        RoundelError: see `roundel.errors`.
    """
    for name, values in (("curvatures", curvatures), ("schemes", schemes), ("sequences", sequences)):
        if not values or len(set(values)) < len(values):
            raise SchemeError(f"{name} is {', '.join(map(str, values)) or 'empty'}: expected one or more, each once")
    if seeds < 1:
        raise SchemeError(f"seeds is {seeds}: expected 1 or more")
    if own := {"scheme", "curvature", "seed"} & settings.keys():
        raise SchemeError(f"{', '.join(sorted(own))}: a comparison takes several; give schemes, curvatures and the number of seeds")
    base = Recipe(**{**settings, "scheme": schemes[0], "curvature": "auto", "sequences": min(sequences)})
    recipes = {label: dataclasses.replace(base, **NAMED.get(label, {"curvature": label})) for label in curvatures}
    for scheme in schemes:
        if parse_scheme(scheme).inputs:
            raise SchemeError(f"{scheme}: methods are compared by their weights alone; give {scheme.rpartition('-')[0]}")
        for recipe in recipes.values():
            dataclasses.replace(recipe, scheme=scheme)  # refused here rather than after the first collection
    notes, target = Notes(progress or Silent()), Path(output)
    details: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "kind": "comparison",
        "model": str(model),
        "methods": {label: {key: recipe.as_json()[key] for key in ("curvature", "sweeps", "damping")} for label, recipe in recipes.items()},
        "schemes": list(schemes),
        "sequences": list(sequences),
        "seeds": seeds,
        "recipe": {
            key: value for key, value in base.as_json().items() if key not in ("scheme", "curvature", "sequences", "seed", "sweeps")
        },
        "dtype": str(pick_dtype(dtype, pick_device(device), notes.warn)).removeprefix("torch."),
        "versions": versions(),
    }
    rows: list[dict[str, Any]] = []
    if resume and (target / "compare.json").exists():
        rows, notes.warnings = _finished(target, details)
    else:
        check_output(target)
        with storage(target):
            target.mkdir(parents=True, exist_ok=True)
    known = {(row["seed"], row["sequences"]) for row in rows}
    missing = [(seed, count) for seed in range(seeds) for count in sequences if (seed, count) not in known]
    if missing:
        source, linears = _load(model, base, schemes, device, dtype)
        twin = copy.deepcopy(source.model)
        most = max(sequences)
        first = _split(source, dataclasses.replace(base, seed=0, sequences=most), notes)
        for seed, count in missing:
            notes.progress.say(f"--- seed {seed}, {count} sequences")
            these = {label: dataclasses.replace(recipe, seed=seed, sequences=count) for label, recipe in recipes.items()}
            split = first
            if (seed, count) != (0, most):
                split = _split(source, dataclasses.replace(base, seed=seed, sequences=count), notes)
                split = dataclasses.replace(split, heldout=first.heldout)  # lies behind what any of them calibrates on
            with open_work(None, beside=target, memory=None) as work:
                rows += _one_setting(source, linears, twin, these, split, notes, batch_size, work)
            write_json(target / "compare.json", _details(details, rows, notes))
    details = _details(details, rows, notes)
    with storage(target):
        write_comparison(target, details)
    return details


def _details(settings: dict[str, Any], rows: list[dict[str, Any]], notes: Notes) -> dict[str, Any]:
    """The contents of compare.json."""
    return {**settings, "summary": summary_rows(rows), "warnings": sorted(set(notes.warnings)), "rows": rows}


def _finished(target: Path, settings: dict[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows and warnings of an interrupted comparison, if it had the same settings."""
    try:
        stored = json.loads((target / "compare.json").read_text(encoding="utf-8"))
        rows, warnings = stored["rows"], stored.get("warnings", [])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise OutputError(f"{target}/compare.json cannot be read ({error}); start again in a new directory") from error
    for key, value in settings.items():
        # as text, since the order of the methods counts: the others are compared with the first
        if key in stored and json.dumps(stored[key]) != json.dumps(value):
            raise OutputError(f"{target} holds a comparison with other {key}; give the same settings, or a new directory without --resume")
    return rows, warnings


def _load(
    model: str | Path, recipe: Recipe, schemes: Sequence[str], device: str, dtype: str
) -> tuple[Source, dict[str, dict[str, nn.Linear]]]:
    """The model with the linears of all schemes, and those of each."""
    source = load_source(str(model), recipe, device, dtype)
    linears: dict[str, dict[str, nn.Linear]] = {}
    for scheme in schemes:
        selection = select_linears(source.model, partial(recipe.check_shape, scheme), include=recipe.include, exclude=recipe.exclude)
        linears[scheme] = {name: linear for name, linear in selection.linears.items() if source.checkpoint.weight_of(name)}
    every = {name: linear for own in linears.values() for name, linear in own.items()}
    return dataclasses.replace(source, linears=every), linears


def _split(source: Source, recipe: Recipe, notes: Notes) -> Split:
    """The sequences of a recipe whose curvature is `auto`: what others hold nothing out of, in the same order."""
    split = split_text(recipe, source, notes, given=recipe.as_json())
    check_vocabulary(source.model, split.everything, split.heldout)
    return split


def _one_setting(
    source: Source,
    linears: dict[str, dict[str, nn.Linear]],
    twin: nn.Module,
    recipes: dict[str, Recipe],
    split: Split,
    notes: Notes,
    batch_size: int | None,
    work: Work,
) -> list[dict[str, Any]]:
    """All methods and schemes with one seed and number of sequences."""
    some, tokens = next(iter(recipes.values())), split.used
    overlap = Fingerprint.of(split.heldout).overlap(Fingerprint.of(tokens))
    if overlap > OVERLAP_WARNING:
        notes.warn(f"{100 * overlap:.1f} % of the evaluation text's 32-token windows occur in the calibration text: every KL is too good")
    wanted = batch_size or default_batch(tokens.ids.shape[1])
    estimators = {recipe.curvature: parse_curvature(recipe.curvature) for recipe in recipes.values()}
    batch = _safe_batch(source, tokens, estimators.values(), wanted)
    rounded = [
        _Rounding(
            label=label,
            recipe=dataclasses.replace(recipe, scheme=scheme),
            source=dataclasses.replace(source, linears=own, skipped={}),
            work=dataclasses.replace(work, path=work.path / f"{some.seed}-{some.sequences}" / f"{scheme}-{place}"),
        )
        for scheme, own in linears.items()
        for place, (label, recipe) in enumerate(recipes.items())
    ]
    measured, factors = _collected(source, estimators, rounded, tokens, notes, batch)
    diagnoses = _diagnosed(source, factors, split, some, notes)
    rows = []
    for one in rounded:
        recipe, label = one.recipe, one.label
        own, began = measured[recipe.curvature], time.monotonic()
        seen = len(tokens) - estimators[recipe.curvature].held_out(len(tokens))
        parts = dataclasses.replace(split, calibration=tokens[:seen], choice=tokens[seen:])
        found = one.measured(notes)
        chosen = choose_schemes(recipe, one.source, found)
        result = round_model(recipe, one.source, parts, found, chosen, Ends(), notes, batch_size=batch, work=one.work)
        one.seconds += time.monotonic() - began
        modules = dict(twin.named_modules())
        for name, weight in result.weights.items():
            modules[name].weight.data.copy_(dequantized(weight))
        divergence = compare_models(twin, source.model, split.heldout, batch_size=wanted)
        for name in result.weights:
            modules[name].weight.data.copy_(source.linears[name].weight.data)
        shutil.rmtree(one.work.path, ignore_errors=True)
        diagnosis = diagnoses.get(recipe.curvature)
        rows.append(
            {
                "method": label,
                "scheme": recipe.scheme,
                "sequences": recipe.sequences,
                "seed": recipe.seed,
                "kl": divergence.kl_mean,
                "kl_stderr": divergence.as_json()["kl"]["stderr"],
                "top1_agreement": divergence.top1_agreement,
                "perplexity": divergence.perplexity_model,
                "perplexity_reference": divergence.perplexity_reference,
                "proxy_kl": sum(row["proxy_loss"] for row in result.layers.values()),
                **({} if diagnosis is None else diagnosis.as_json()),
                "tokens": tokens.ids.numel(),
                "passes": own.passes,
                "collect_seconds": round(own.seconds, 3),
                "rounding_seconds": round(one.seconds, 3),
                "state_bytes": own.state_bytes,
                "bits_per_weight": _bits(source, result.layers),
                "quantized_linears": len(result.weights),
                "tokens_sha256": data_hash(tokens),
                "heldout_sha256": data_hash(split.heldout),
                "sequence_kl": [float(f"{value:.6g}") for value in divergence.sequence_kl],
            }
        )
        notes.progress.say(f"{recipe.scheme} {label}: KL {divergence.kl_mean:.5f}")
    return rows


@dataclass(kw_only=True)
class _Rounding:
    """One method with one scheme."""

    label: str
    recipe: Recipe
    source: Source
    work: Work
    seconds: float = 0.0
    """Of the choice of factors and of rounding."""

    def settle(self, visit: Visit, sketches: Mapping[str, Sketch], rows: tuple[int, range], batch_size: int) -> None:
        """Keeps what linears of a visit are rounded with; `rows`: how many sequences calibrate, and those to choose by."""
        began = time.monotonic()
        own = {name: copy.deepcopy(sketch) for name, sketch in sketches.items() if name in self.source.linears}  # others join the sums
        if own:
            curvatures, found = Curvatures(path=self.work.curvature), Settled()
            settle(visit, self.recipe, self.source, own, *rows, batch_size, found)
            found.put(curvatures, visit.index, 0)
            found.finish(curvatures, visit.index)
        self.seconds += time.monotonic() - began

    def measured(self, notes: Notes) -> Collected:
        """Of all visits."""
        return measured_in(Curvatures(path=self.work.curvature), self.source, notes)


def _collected(
    source: Source,
    estimators: Mapping[str, Estimator],
    roundings: Sequence[_Rounding],
    tokens: TokenBatch,
    notes: Notes,
    batch_size: int,
) -> tuple[dict[str, Measured], dict[str, dict[str, Factors]]]:
    """What each curvature has cost, and its factors; the sums of one group of layers are in memory at a time."""
    recipe, layers, count = roundings[0].recipe, source.layers, len(tokens)
    held = {label: estimator.held_out(count) for label, estimator in estimators.items()}
    parts = {label: passes(estimator, count - held[label]) for label, estimator in estimators.items()}
    kinds, text = [recipe.labels] * count, tokens
    if recipe.labels == "data":  # sequences to choose by have the model's own labels: once more, behind all others
        again = max(held.values())
        kinds, text = kinds + ["sampled"] * again, tokens.select([*range(count), *range(count - again, count)])
    choice = {label: (count - own, range(len(text) - own, len(text))) for label, own in held.items()}
    found = {label: Measured() for label in estimators}
    factors: dict[str, dict[str, Factors]] = {label: {} for label in estimators}
    with notes.progress.stage("curvature", steps(layers, source.linears) * len(text)) as advance:
        visits = gradient_visits(
            layers,
            source.linears,
            text,
            seed=recipe.seed,
            labels=kinds,
            batch_size=batch_size,
            store=roundings[0].work.passing("gradients"),
            advance=advance,
            quickly=True,
        )
        for visit in visits:
            measured = collect_visit(visit, source.linears, estimators, parts, batch_size=batch_size, device=layers.device, fast=True)
            for rounding in roundings:
                label = rounding.recipe.curvature
                rounding.settle(visit, measured[label].sketches, choice[label], batch_size)
            for label, own in measured.items():
                factors[label] |= factors_of(own.sketches)
                own.sketches = {}
                found[label].join(own, parts[label])
    return found, factors


def _bits(source: Source, layers: Mapping[str, dict[str, Any]]) -> float:
    """Mean over all weights of the rounded linears."""
    sizes = {name: source.linears[name].weight.numel() for name in layers}
    total: float = sum(layers[name]["bits_per_weight"] * size for name, size in sizes.items())
    return total / sum(sizes.values())


def _safe_batch(source: Source, tokens: TokenBatch, estimators: Iterable[Estimator], wanted: int) -> int:
    """`wanted`, if batches of all the sizes that occur give the same bits as single sequences; else 1."""
    parts = [*map(len, runs_of(len(tokens), estimators)), len(tokens)]
    return safe_batch_size(source.layers, source.linears, tokens, batch_size=wanted, parts=parts, quickly=True)


def _diagnosed(source: Source, factors: dict[str, dict[str, Factors]], split: Split, recipe: Recipe, notes: Notes) -> dict[str, Diagnosis]:
    """Held-out J and cosine of each curvature, all linears but experts together; nothing with fewer than two held-out sequences.

    Experts' rows of several sequences, of which the Fisher's norm needs pairs, cannot be told apart.
    """
    heldout: TokenBatch = split.heldout[:DIAGNOSED]
    linears = {name: linear for name, linear in source.linears.items() if experts_of(source.model, name) is None}
    if len(heldout) < 2 or not linears:
        return {}
    batch = max(2, default_batch(heldout.ids.shape[1]))
    with notes.progress.stage("held-out gradients", steps(source.layers, linears) * len(heldout)) as advance:
        found = diagnose(
            source.layers,
            linears,
            factors,
            heldout,
            seed=recipe.seed,
            batch_size=batch,
            damping=recipe.damping,
            advance=advance,
        )
    return {label: total(own.values()) for label, own in found.items() if own}
