"""Curvature estimators side by side, under one rounding and one measure: `roundel compare`.

For each seed and number of sequences all estimators collect from one gradient stream (`curvature.together`). Then each linear is rounded
with each estimator's factors to each scheme, exactly as `quantize` does it, and the KL of the whole model is measured on held-out text,
the same for all seeds and numbers of sequences: what `quantize` holds out with seed 0 and the largest number. Beside it: the held-out J and
cosine of the factors (`curvature.diagnose`), tokens, passes, seconds and memory.

Cost: a collection, then for each method and scheme a rounding and a forward pass of both models over the held-out text. Each seed and
number of sequences is saved when it is done, and `resume` goes on after it.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from roundel.artifacts.source import Source, load_source
from roundel.calibration import Fingerprint, Split, data_hash
from roundel.curvature import parse_curvature
from roundel.curvature.collect import safe_batch_size
from roundel.curvature.diagnose import Diagnosis, diagnose, total
from roundel.curvature.together import Measured, collect_together, segments
from roundel.errors import OutputError, SchemeError
from roundel.evaluate import compare_models
from roundel.evaluate.comparison import summary_rows, write_comparison
from roundel.grids import parse_scheme
from roundel.models import select_linears
from roundel.models.load import pick_device, pick_dtype
from roundel.progress import Progress, Silent
from roundel.recipes import GPTQ, NEAREST, Recipe
from roundel.rounding.round import dequantized
from roundel.stages.notes import Notes
from roundel.stages.report import versions
from roundel.stages.rounding.round_all import round_all
from roundel.stages.text import OVERLAP_WARNING, check_vocabulary, default_batch, sequence_length, split_text
from roundel.store import check_output, storage, write_json
from roundel.types import TokenBatch

__all__ = ["ABLATION", "compare"]

SCHEMA_VERSION = 1

NAMED: dict[str, dict[str, Any]] = {"nearest": NEAREST, "gptq": GPTQ}
"""Methods that are more than a curvature."""

ABLATION = (
    "auto",
    "pilot",
    "mean",
    "kfac",
    "sketch-b",
    "sketch-a",
    "triangular",
    "power",
    "fastkron",
    "fastkron:batch=16",
    "fastkron:batch=128",
    "guided",
    "diagonal:of=mean",
    "activation",
    "gptq",
    "nearest",
)
"""All rows of the papers' ablations, and ours."""

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
        "dtype": str(pick_dtype(dtype, pick_device(device))).removeprefix("torch."),
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
            rows += _one_setting(source, linears, twin, these, split, notes, batch_size)
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
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
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
    split = split_text(recipe, source, sequence_length(source.model, recipe), notes.progress)
    check_vocabulary(source.model, split.used, split.heldout)
    return split


def _one_setting(
    source: Source,
    linears: dict[str, dict[str, nn.Linear]],
    twin: nn.Module,
    recipes: dict[str, Recipe],
    split: Split,
    notes: Notes,
    batch_size: int | None,
) -> list[dict[str, Any]]:
    """All methods and schemes with one seed and number of sequences."""
    some, tokens = next(iter(recipes.values())), split.used
    overlap = Fingerprint.of(split.heldout).overlap(Fingerprint.of(tokens))
    if overlap > OVERLAP_WARNING:
        notes.warn(f"{100 * overlap:.1f} % of the evaluation text's 32-token windows occur in the calibration text: every KL is too good")
    wanted = batch_size or default_batch(tokens.ids.shape[1])
    estimators = {recipe.curvature: parse_curvature(recipe.curvature) for recipe in recipes.values()}
    batch = _safe_batch(source, segments(tokens, estimators.values()), some, wanted)
    with notes.progress.stage("curvature", len(tokens) * max(estimator.passes for estimator in estimators.values())) as advance:
        measured = collect_together(
            source.model, source.linears, tokens, estimators, seed=some.seed, batch_size=batch, labels=some.labels, advance=advance
        )
    diagnoses = _diagnosed(source, measured, split, some, notes)
    rows = []
    work = [(scheme, label) for scheme in linears for label in recipes]
    for scheme, label in work:
        recipe = dataclasses.replace(recipes[label], scheme=scheme)
        own, grid = measured[recipe.curvature], parse_scheme(scheme)
        seen = len(tokens) - estimators[recipe.curvature].held_out(len(tokens))
        within = dataclasses.replace(source, linears=linears[scheme], skipped={})
        began = time.monotonic()
        rounded, layers = round_all(recipe, grid, within, copy.deepcopy(own.sketches), tokens[seen:], notes, batch_size=batch)
        seconds = time.monotonic() - began
        modules = dict(twin.named_modules())
        for name, result in rounded.items():
            modules[name].weight.data.copy_(dequantized(result))
        divergence = compare_models(twin, source.model, split.heldout, batch_size=wanted)
        for name in rounded:
            modules[name].weight.data.copy_(source.linears[name].weight.data)
        diagnosis = diagnoses.get(recipe.curvature)
        rows.append(
            {
                "method": label,
                "scheme": scheme,
                "sequences": recipe.sequences,
                "seed": recipe.seed,
                "kl": divergence.kl_mean,
                "kl_stderr": divergence.as_json()["kl"]["stderr"],
                "top1_agreement": divergence.top1_agreement,
                "perplexity": divergence.perplexity_model,
                "perplexity_reference": divergence.perplexity_reference,
                "proxy_kl": sum(row["proxy_loss"] for row in layers.values()),
                **({} if diagnosis is None else diagnosis.as_json()),
                "tokens": tokens.ids.numel(),
                "passes": own.passes,
                "collect_seconds": round(own.seconds, 3),
                "rounding_seconds": round(seconds, 3),
                "state_bytes": own.state_bytes,
                "bits_per_weight": _bits(source, layers),
                "quantized_linears": len(rounded),
                "tokens_sha256": data_hash(tokens),
                "heldout_sha256": data_hash(split.heldout),
                "sequence_kl": [float(f"{value:.6g}") for value in divergence.sequence_kl],
            }
        )
        notes.progress.say(f"{scheme} {label}: KL {divergence.kl_mean:.5f}")
    return rows


def _bits(source: Source, layers: dict[str, dict[str, Any]]) -> float:
    """Mean over all weights of the rounded linears."""
    sizes = {name: source.linears[name].weight.numel() for name in layers}
    total: float = sum(layers[name]["bits_per_weight"] * size for name, size in sizes.items())
    return total / sum(sizes.values())


def _safe_batch(source: Source, parts: Sequence[TokenBatch], recipe: Recipe, wanted: int) -> int:
    """`wanted`, if batches of all the sizes that occur in `parts` give the same bits as single sequences; else 1."""
    for part in parts:
        found = safe_batch_size(source.model, source.linears, part, seed=recipe.seed, batch_size=wanted, labels=recipe.labels)
        if found < min(wanted, len(part)):
            return 1
    return wanted


def _diagnosed(source: Source, measured: dict[str, Measured], split: Split, recipe: Recipe, notes: Notes) -> dict[str, Diagnosis]:
    """Held-out J and cosine of each curvature, all linears together; nothing with fewer than two held-out sequences."""
    heldout: TokenBatch = split.heldout[:DIAGNOSED]
    if len(heldout) < 2:
        return {}
    factors = {label: {name: sketch.factors() for name, sketch in own.sketches.items()} for label, own in measured.items()}
    batch = max(2, default_batch(heldout.ids.shape[1]))
    with notes.progress.stage("held-out gradients", len(heldout)) as advance:
        found = diagnose(
            source.model,
            source.linears,
            factors,
            heldout,
            seed=recipe.seed,
            batch_size=batch,
            damping=recipe.damping,
            advance=advance,
        )
    return {label: total(own.values()) for label, own in found.items() if own}
