"""The stages, from artifact to artifact: `quantize`, `tune`, `export`, `collect_factors` and `export_imatrix`.

    model, text -> tokens -> factors of every linear -> rounded weights -> staged checkpoint -> measured KL -> report,
    and only then the output directory

The reference model stays in memory throughout; factors of a linear are dropped as soon as it is rounded; the
checkpoint is written one shard at a time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

import roundel.factors as factor_files
from roundel.calibration import (
    Fingerprint,
    Split,
    data_hash,
    read_documents,
    sample_from_model,
    split_tokens,
    windows,
)
from roundel.checkpoints import Frame, Stored, load_written, read, write
from roundel.curvature import Sketch, collect, parse_curvature, predicted_kl
from roundel.curvature.collect import Collection, passes, pilot_first, safe_batch_size
from roundel.errors import DataError, FactorsError, ModelError, OutputError, SchemeError, in_layer
from roundel.evaluate import Divergence, compare_models
from roundel.evaluate.card import model_card
from roundel.evaluate.report import quantized_page
from roundel.factors import Header
from roundel.formats import FORMATS, gguf, imatrix
from roundel.grids import Grid, TileGrid, parse_scheme
from roundel.models import locate
from roundel.models.load import model_type
from roundel.progress import Progress, Silent
from roundel.recipes import TUNINGS, WRITTEN, Recipe, check_format
from roundel.rotation import Rotation
from roundel.round_model import round_all, round_allocated
from roundel.rounding.round import dequantized
from roundel.source import Notes, Source, device_of, load_source
from roundel.store import check_output, staged_directory, staged_file, storage, write_json, write_text
from roundel.tuning import Job, Tuned, tune_blocks, tune_end_to_end
from roundel.tuning.blocks import layers_of
from roundel.tuning.saved import Saved, packed, unpacked
from roundel.types import Factors, RoundedWeight, TokenBatch

__all__ = [
    "OpenFactors",
    "Quantized",
    "check_vocabulary",
    "collect_factors",
    "default_batch",
    "evaluation_tokens",
    "export",
    "export_imatrix",
    "open_factors",
    "positions",
    "quantize",
    "sequence_length",
    "split_text",
    "tune",
    "versions",
    "with_block_type",
]

SCHEMA_VERSION = 1
BATCH_TOKENS = 4096
BATCH_SEQUENCES = 16
FINGERPRINT_MODULUS = 256
OVERLAP_WARNING = 0.01

NEAR = 0.7
"""How far a tuned embedding is from its original at most, in units of that; two others are about 1.4 apart."""


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """What `quantize` returns: where the checkpoint is, what was measured, and the whole of roundel.json."""

    path: Path
    report: Divergence
    details: dict[str, Any]


def quantize(
    model: str | Path,
    *,
    output: str | Path,
    factors: str | Path | None = None,
    work: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Quantized:
    """Quantizes a causal language model into a directory that Transformers and vLLM load.

    Args:
        model: A local directory or a Hub id; `demo` is the embedded model.
        output: Directory to make; must not exist, or be empty.
        factors: A directory that `collect_factors` made of the same model: nothing is collected then, and its curvature, labels, text,
            sequences and seed take the place of the recipe's.
        work: A directory for what is finished or half done: factors, rounded weights, the state of tuning. The same call goes on from there
            after a crash, and ends with the same checkpoint. It may be removed afterwards.
        device: `auto`, `cpu`, `cuda`, ...
        dtype: In which the model runs: `auto`, `float32` or `bfloat16`.
        batch_size: Sequences per pass; by default about 4096 tokens. Changes speed and memory, never the result.
        progress: Where to report; silent by default.
        settings: The fields of `Recipe`.

    Returns:
        The output's path, the measured divergence and the contents of roundel.json.

    Raises:
        RoundelError: see `roundel.errors`; no output is left then.
    """
    recipe, notes, target = Recipe(**with_block_type(settings)), Notes(progress or Silent()), Path(output)
    progress = notes.progress
    check_output(target)
    kept = None if work is None else Path(work)
    if kept is not None and factors is None:
        factors = kept / "factors"
        shared = {name: getattr(recipe, name) for name in _COLLECTED} | {"rotate": "fused" if recipe.rotate == "fused" else "auto"}
        collect_factors(
            model,
            output=factors,
            resume=True,
            device=device,
            dtype=dtype,
            batch_size=batch_size,
            progress=progress,
            **shared,
        )
    stored = None
    if factors is not None:
        stored = factor_files.load(Path(factors))
        recipe = stored[0].applied_to(recipe)
    with notes.timed("load"):
        source = load_source(str(model), recipe, device, dtype)
        if source.fusion and source.fusion["untied"]:
            added = source.fusion["added_parameters"]
            notes.warn(f"the output head is no longer tied to the embedding, so that the rotation could be fused: {added} weights more")
        if stored is not None:
            _check_model(stored[0], source)
    length = sequence_length(source.model, recipe)
    with notes.timed("text"):
        split = split_text(recipe, source, length, progress, known=frozenset(stored[0].sequence_ids) if stored else None)
    check_vocabulary(source.model, split.used, split.heldout)
    with notes.timed("curvature"):
        wanted = batch_size or default_batch(length)
        estimator = parse_curvature(recipe.curvature)
        parts = passes(estimator, split.calibration)
        batch = _safe_batch(source.model, source.linears, parts, recipe, wanted)
        if stored is not None:
            sketches = factor_files.restore(*stored, torch.device("cpu")).sketches
        else:
            with progress.stage("curvature", sum(map(len, parts))) as advance:
                sketches = collect(
                    source.model,
                    source.linears,
                    split.calibration,
                    estimator,
                    seed=recipe.seed,
                    batch_size=batch,
                    labels=recipe.labels,
                    advance=advance,
                ).sketches
    before = Saved(path=kept and kept / "rounded.safetensors", digest=_rounding_digest(recipe, source, split))
    with notes.timed("rounding"):
        allocation = None
        if (found := before.load()) is not None:
            layers, allocation = found[1]["layers"], found[1]["allocation"]
            rounded = unpacked(found[0], {name: (row["scheme"], tuple(row["shape"])) for name, row in layers.items()})
            source.skipped.update(found[1]["skipped"])
        elif recipe.bits is None:
            correct_on = _apart(split) if recipe.corrects(split.used.ids.numel()) else None
            rounded, layers = round_all(
                recipe, parse_scheme(recipe.scheme), source, sketches, split.choice, notes, batch_size=batch, correct_on=correct_on
            )
        else:
            unseen = split.choice
            if not len(unseen):
                unseen = split.calibration
                notes.warn(
                    "bits are allocated by the calibration sequences themselves: none are held out (use --curvature auto, more --sequences)"
                )
            rounded, layers, allocation = round_allocated(recipe, source, sketches, unseen, notes, batch_size=batch)
        if found is None:
            before.save(lambda: packed(rounded), {"layers": layers, "allocation": allocation, "skipped": source.skipped})
    return _finish(target, source, recipe, split, rounded, layers, notes, batch_size=batch, work=kept, carried={"allocation": allocation})


_COLLECTED = ("curvature", "labels", "calibration", "sequences", "seq_len", "eval_sequences", "seed")
"""Settings of a recipe that factors depend on, fused rotations aside."""


def _rounding_digest(recipe: Recipe, source: Source, split: Split) -> str:
    """Of all that decides the codes before tuning."""
    decisive = {name: value for name, value in recipe.as_json().items() if not name.startswith(("tune", "eval_"))}
    decisive["error_aware"] = recipe.corrects(split.used.ids.numel())
    given = [decisive, factor_files.model_fingerprint(source.checkpoint), data_hash(split.used), str(source.model.dtype)]
    return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()


def tune(
    directory: str | Path,
    *,
    output: str | Path,
    model: str | Path | None = None,
    work: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Quantized:
    """Tunes the codes of a directory that `quantize` has written, and writes them in the same format.

    Args:
        directory: In a format that keeps codes: any but dense and gguf.
        output: Directory to make; must not exist, or be empty.
        model: The original, where it is not what roundel.json names.
        work: As for `quantize`.
        device: As for `quantize`.
        dtype: As for `quantize`.
        batch_size: As for `quantize`.
        progress: As for `quantize`.
        settings: Fields of `Recipe` that are to differ from those in roundel.json: of text, tuning and the seed.

    Returns:
        As `quantize`.

    Raises:
        RoundelError: see `roundel.errors`; no output is left then.
    """
    notes, target, path = Notes(progress or Silent()), Path(output), Path(directory)
    check_output(target)
    stored = read(path)
    try:
        old = {name: tuple(value) if isinstance(value, list) else value for name, value in stored.report["recipe"].items()}
        recipe = Recipe(**{**old, "tune": "end-to-end", "format": stored.form, **settings})
        name = str(model or stored.report["model"]["name"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}/roundel.json does not say how it was made: {error!r}; it is damaged or of another version") from error
    if recipe.tune == "none":
        raise SchemeError(f"nothing to do: expected tune {' or '.join(TUNINGS[1:])}")
    with notes.timed("load"):
        source = load_source(name, recipe, device, dtype)
    if not _is_original(source, stored):
        raise ModelError(f"{name} is not the original of {path}: its linears or its embeddings differ; give it by --model")
    length = sequence_length(source.model, recipe)
    with notes.timed("text"):
        split = split_text(recipe, source, length, notes.progress)
    check_vocabulary(source.model, split.used, split.heldout)
    batch = batch_size or default_batch(length)
    carried = {"allocation": stored.report.get("allocation"), "tuned_from": str(path)}
    layers = stored.report["layers"]
    source.skipped.update(stored.report.get("skipped", {}))
    kept = None if work is None else Path(work)
    moved = _moved(source, stored)
    return _finish(target, source, recipe, split, stored.rounded, layers, notes, batch_size=batch, work=kept, carried=carried, moved=moved)


def _is_original(source: Source, stored: Stored) -> bool:
    """Whether linears have the same names and shapes, and the first matrix that is not quantized is the same, or close to it if it was
    tuned."""
    shapes = {name: tuple(linear.weight.shape) for name, linear in source.linears.items()}
    if any(shapes.get(name) != weight.shape for name, weight in stored.rounded.items()):
        return False
    if stored.report["model"].get("parameters") != source.parameters:
        return False
    quantized = set(stored.frame.weights.values())
    for name in stored.frame.sizes:
        if name not in quantized and (tensor := stored.frame.reader(name)).ndim > 1:
            if name not in source.checkpoint.files:
                return False
            own = source.checkpoint.read(name)
            if _has_moved(stored) and own.shape == tensor.shape:
                return bool((tensor.float() - own.float()).norm() < NEAR * own.float().norm())
            return torch.equal(tensor, own)
    return True


def _rest(source: Source) -> dict[str, torch.dtype]:
    """Norms, biases, embedding and output head, if it is not quantized, and the types in which they are stored."""
    ends = {id(module.weight) for module in (source.model.get_input_embeddings(), source.model.get_output_embeddings()) if module}  # type: ignore[no-untyped-call]
    quantized = {id(linear.weight) for linear in source.linears.values()}
    names = [
        name
        for name, parameter in source.model.named_parameters()
        if (parameter.ndim == 1 or id(parameter) in ends - quantized) and name in source.checkpoint.files
    ]
    return {name: source.checkpoint.read(name).dtype for name in names}


def _has_moved(stored: Stored) -> bool:
    """Whether an earlier tuning has moved anything but quantized weights."""
    return bool((stored.report.get("tuning") or {}).get("other_parameters"))


def _moved(source: Source, stored: Stored) -> dict[str, Tensor]:
    """What of the rest an earlier tuning has moved, and where to."""
    if not _has_moved(stored):
        return {}
    found = {name: stored.frame.reader(name) for name in _rest(source) if name in stored.frame.sizes}
    return {name: value for name, value in found.items() if not torch.equal(value, source.checkpoint.read(name))}


def _tuned(
    source: Source,
    recipe: Recipe,
    split: Split,
    rounded: Mapping[str, RoundedWeight],
    moved: Mapping[str, Tensor],
    notes: Notes,
    *,
    batch_size: int,
    work: Path | None,
) -> Tuned:
    """As the recipe says."""
    steps_on, judged_by = _apart(split)
    method = tune_end_to_end if recipe.tune == "end-to-end" else tune_blocks
    turns = 1 if recipe.tune == "end-to-end" else sum(map(bool, layers_of(source.model, rounded).values()))
    codes_stay = all(isinstance(parse_scheme(weight.scheme), TileGrid) for weight in rounded.values())
    wanted = recipe.tune_rest if recipe.tune_rest is not None else codes_stay or recipe.tune == "end-to-end"
    others = _rest(source) if wanted else {}
    with notes.timed("tuning"), notes.progress.stage("tuning", turns * recipe.steps) as advance:
        job = Job(
            source=source,
            rounded=rounded,
            tokens=steps_on,
            unseen=judged_by,
            steps=recipe.steps,
            step_tokens=recipe.step_tokens,
            others=others,
            moved=moved,
            seed=recipe.seed,
            batch_size=batch_size,
            work=work,
            advance=advance,
        )
        tuned = method(job)
    if tuned.best_step == 0:
        notes.warn("tuning did not lower the KL on held-out calibration text: the codes are those of rounding")
    return tuned


def _finish(
    target: Path,
    source: Source,
    recipe: Recipe,
    split: Split,
    rounded: Mapping[str, RoundedWeight],
    layers: Mapping[str, dict[str, Any]],
    notes: Notes,
    *,
    batch_size: int,
    work: Path | None,
    carried: Mapping[str, Any],
    moved: Mapping[str, Tensor] | None = None,
) -> Quantized:
    """From rounded weights to the checkpoint and its report: tuning, prediction, writing, evaluation."""
    progress, length = notes.progress, split.heldout.ids.shape[1]
    fingerprint = Fingerprint.of(split.used)
    overlap = Fingerprint.of(split.heldout).overlap(fingerprint)
    if overlap > OVERLAP_WARNING:
        notes.warn(f"{100 * overlap:.1f} % of the evaluation text's 32-token windows occur in the calibration text: its KL is too good")
    tuning, others = None, dict[str, Tensor]()
    if recipe.tune != "none":
        tuned = _tuned(source, recipe, split, rounded, moved or {}, notes, batch_size=batch_size, work=work)
        rounded, others = tuned.rounded, tuned.parameters
        tuning = {
            "method": recipe.tune,
            "best_step": tuned.best_step,
            "held_out_kl": {"before": tuned.held_out_kl[0], "after": tuned.held_out_kl[1]},
            "other_parameters": len(others),
            "history": tuned.history,
        }
        layers = {name: {**row, **_bits_with_vectors(rounded[name], recipe)} for name, row in layers.items()}
    chosen = {name: source.linears[name] for name in rounded}
    with notes.timed("prediction"), progress.stage("prediction", len(split.heldout)) as advance:
        prediction = predicted_kl(
            source.model,
            chosen,
            lambda name: chosen[name].weight.float().cpu() - dequantized(rounded[name]),
            split.heldout,
            seed=recipe.seed,
            batch_size=batch_size,
            labels=recipe.labels,
            advance=advance,
        )
    # errors that make up for each other do not add up
    by = "joint" if tuning is not None or any("error_aware" in row for row in layers.values()) else "total"
    with staged_directory(target) as staging:
        with notes.timed("writing"), progress.stage("writing", len(source.checkpoint.files)) as advance:
            frame = _frame(source, {name: row["dtype"] for name, row in layers.items()}, others)
            written = write(staging, frame, rounded, recipe.written_format(), name=Path(source.name).name, advance=advance)
        with notes.timed("evaluation"), progress.stage("evaluation", len(split.heldout)) as advance:
            known = {"format": recipe.written_format(), "layers": layers}
            engine = load_written(staging, device=device_of(source.model), dtype=source.model.dtype, report=known)
            divergence = compare_models(engine, source.model, split.heldout, batch_size=batch_size, advance=advance)
            del engine
        weights = sum(linear.weight.numel() for linear in chosen.values())
        details: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "roundel": importlib.metadata.version("roundel"),
            "versions": versions(),
            "model": {"name": source.name, "revision": _revision(source.path), "parameters": source.parameters},
            "fused_rotation": source.fusion,
            "scheme": recipe.scheme if carried.get("allocation") is None else f"{recipe.bits:g} bits",
            **carried,
            "tuning": tuning,
            "format": recipe.written_format(),
            "curvature": recipe.curvature,
            "seed": recipe.seed,
            "recipe": recipe.as_json(),
            "calibration": {
                "source": recipe.calibration,
                "sequences": len(split.calibration),
                "sequences_to_choose_by": len(split.choice),
                "seq_len": length,
                "tokens": split.calibration.ids.numel(),
                "sha256": data_hash(split.calibration),
                "fingerprint": fingerprint.thinned(FINGERPRINT_MODULUS).as_json(),
            },
            "bits_per_weight": {
                "quantized": sum(layers[name]["bits_per_weight"] * linear.weight.numel() for name, linear in chosen.items()) / weights,
                "model": 8 * written / source.parameters,
                "quantized_fraction": weights / source.parameters,
            },
            "predicted_kl": {
                "total": prediction.total,
                "total_stderr": _finite(prediction.total_stderr),
                "joint": prediction.joint,
                "joint_stderr": _finite(prediction.joint_stderr),
                "by": by,
                "predicted_over_measured": getattr(prediction, by) / divergence.kl_mean if divergence.kl_mean > 0 else None,
            },
            "evaluation": {
                "source": recipe.eval_data or f"{recipe.calibration} (held out)",
                "sha256": data_hash(split.heldout),
                "overlap_with_calibration": overlap,
                **divergence.as_json(),
            },
            "layers": {name: {**row, "predicted_kl": prediction.layers[name]} for name, row in layers.items()},
            "skipped": source.skipped,
            "warnings": notes.warnings,
            "seconds": notes.seconds,
        }
        write_json(staging / "roundel.json", details)
        write_text(staging / "README.md", model_card(details))
        write_text(staging / "report.html", quantized_page(details))
    return Quantized(path=target, report=divergence, details=details)


def with_block_type(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in which the format `gguf:q4_k` is the format `gguf` and the scheme `q4_k`.

    Raises:
        SchemeError: the settings name another scheme.
    """
    form, colon, scheme = str(settings.get("format", "auto")).partition(":")
    if not colon:
        return dict(settings)
    given = settings.get("scheme", Recipe.scheme)
    if form != "gguf" or given not in (scheme, Recipe.scheme):
        raise SchemeError(f"format {form}:{scheme} with scheme {given}: expected gguf:TYPE, and the scheme TYPE or none")
    return {**settings, "format": form, "scheme": scheme}


def export(
    source: str | Path, *, output: str | Path, to: str, model: str | Path | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Writes a directory that `quantize` has written in another format, with the same codes: nothing is rounded again.

    Args:
        source: In a format that keeps codes: any but dense and gguf.
        output: Directory to make; must not exist, or be empty.
        to: A format: `compressed-tensors`, `native`, `gptq`, `exl3`, `gguf` (or `gguf:TYPE`, which must be the scheme) or `dense`.
        model: Another copy of the original, for the tokenizer; by default that in `source`.
        progress: Where to report; silent by default.

    Returns:
        The contents of the new roundel.json.

    Raises:
        RoundelError: see `roundel.errors`; no output is left then.
    """
    progress, path, target = progress or Silent(), Path(source), Path(output)
    check_output(target)
    form, _, kind = to.partition(":")
    if form not in WRITTEN:
        raise SchemeError(f"format {to!r}: expected one of {', '.join(WRITTEN)}, or gguf:TYPE")
    stored = read(path)
    frame = stored.frame if model is None else dataclasses.replace(stored.frame, directory=locate(str(model)))
    for name, weight in stored.rounded.items():
        rotation = getattr(weight.rotation, "kind", None)
        with in_layer(name):
            grid = parse_scheme(weight.scheme)
            check_format(form, grid, rotation)
            if form in FORMATS:
                FORMATS[form].check_shape(grid, *weight.shape)
            if kind not in ("", weight.scheme):
                raise SchemeError(
                    f"rounded to {weight.scheme}, not to {kind}: export carries codes over; quantize again with --scheme {kind}"
                )
    if form == "gguf":
        gguf.check_architecture(frame.config)
        gguf.check_tokenizer(frame.directory)
    with staged_directory(target) as staging, progress.stage("writing", len(frame.sizes)) as advance:
        written = write(staging, frame, stored.rounded, form, name=Path(stored.report["model"]["name"]).name, advance=advance)
        details = {**stored.report, "format": form, "exported_from": stored.form}
        details["recipe"] = {**stored.report["recipe"], "format": form}
        parameters = stored.report["model"]["parameters"]
        details["bits_per_weight"] = {**stored.report["bits_per_weight"], "model": 8 * written / parameters}
        write_json(staging / "roundel.json", details)
        write_text(staging / "README.md", model_card(details))
        write_text(staging / "report.html", quantized_page(details))
    return details


def _apart(split: Split) -> tuple[TokenBatch, TokenBatch]:
    """Calibration text to tune on, and to choose by: the sequences that factors are chosen by, if there are any, else the last eighth."""
    if len(split.choice):
        return split.calibration, split.choice
    kept = max(1, len(split.calibration) // 8)
    if len(split.calibration) <= kept:
        raise DataError("tuning needs two calibration sequences at least: one of them to choose by")
    return split.calibration[: len(split.calibration) - kept], split.calibration[len(split.calibration) - kept :]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def versions() -> dict[str, str]:
    """Of what the numbers depend on, beside Roundel itself."""
    return {name: importlib.metadata.version(name) for name in ("torch", "transformers", "compressed-tensors", "numba")}


def sequence_length(model: PreTrainedModel, recipe: Recipe) -> int:
    """Tokens in a sequence: as asked for, at most the model's positions."""
    return min(recipe.seq_len, positions(model.config))


def default_batch(length: int) -> int:
    """Sequences per pass that make about `BATCH_TOKENS` tokens, but not many: the first batch is also run one by one, to compare."""
    return max(1, min(BATCH_TOKENS // length, BATCH_SEQUENCES))


def positions(config: PretrainedConfig) -> int:
    """How many tokens a model can take."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 30)


def _revision(source: Path) -> str | None:
    """The Hub's commit, when the directory is one of its snapshots."""
    return source.name if source.parent.name == "snapshots" else None


def _check_model(header: Header, source: Source) -> None:
    """Refuses incomplete factors and those of another model; linears that they do not hold are skipped."""
    _check_complete(header)
    if header.model_fingerprint != factor_files.model_fingerprint(source.checkpoint):
        raise FactorsError(
            f"the factors are of another model than {source.name}, or of another --rotate or --seed with fused rotation; collect them again"
        )
    for name in set(source.linears) - set(header.layers):
        source.skipped[name] = "not in the factors directory"
        del source.linears[name]
    if not source.linears:
        raise FactorsError("the factors hold none of the linears to be quantized")


def _check_complete(header: Header) -> None:
    if not header.complete:
        raise FactorsError("the factors are not complete; finish them with roundel collect --resume")


def collect_factors(
    model: str | Path,
    *,
    output: str | Path,
    resume: bool = False,
    part: tuple[int, int] = (1, 1),
    layers: tuple[int, int] | None = None,
    save_every: float = 120.0,
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Header:
    """Collects curvature into a factors directory, for `quantize(factors=...)`.

    Under `torchrun` the sequences are split over the processes and their sums added; only the first process writes, at the end.

    Args:
        model: As for `quantize`.
        output: The factors directory.
        resume: Go on with what `output` holds of the same collection, if anything.
        part: `(k, n)`: only the k-th of n parts of the sequences; `factors.merge` adds the parts up.
        layers: `(a, b)`: only decoder layers `a .. b - 1`, to bound memory; `factors.merge` joins the windows.
        save_every: Seconds between saved states.
        device: As for `quantize`.
        dtype: As for `quantize`.
        batch_size: As for `quantize`.
        progress: As for `quantize`.
        settings: The fields of `Recipe` that concern curvature and text.

    Raises:
        RoundelError: see `roundel.errors`.
    """
    recipe, target = Recipe(**{**settings, "scheme": "int8-channel"}), Path(output)
    rank, world = _processes()
    progress = progress if progress is not None and rank == 0 else Silent()
    going_on = resume and (target / "header.json").exists()
    if not going_on and rank == 0:
        check_output(target)
    source = load_source(str(model), recipe, device, dtype)
    linears = {name: linear for name, linear in source.linears.items() if layers is None or layers[0] <= _layer_of(name) < layers[1]}
    if not linears:
        raise SchemeError(f"--layers {layers}: the model has no linear in these decoder layers")
    length = sequence_length(source.model, recipe)
    tokens = split_text(recipe, source, length, progress).calibration
    check_vocabulary(source.model, tokens)
    estimator = parse_curvature(recipe.curvature)
    pilot = estimator.pilot(len(tokens))
    rest = range(pilot, len(tokens))[part[0] - 1 :: part[1]]
    parts = [tokens.select(range(pilot)), tokens.select(rest)] if pilot else [tokens.select(rest)] * estimator.passes
    tokens = tokens.select([*range(pilot), *rest])
    header = Header(
        model=str(model),
        revision=_revision(source.path),
        model_fingerprint=factor_files.model_fingerprint(source.checkpoint),
        curvature=recipe.curvature,
        labels=recipe.labels,
        seed=recipe.seed,
        calibration=recipe.calibration,
        sequences=recipe.sequences,
        seq_len=length,
        tokens_sha256=data_hash(tokens),
        sequence_ids=tokens.sequence_ids,
        pilot=pilot,
        layers={name: (linear.out_features, linear.in_features) for name, linear in linears.items()},
    )
    start = None
    if going_on:
        found, tensors = factor_files.load(target)
        found.check_same(header, "index", "done", "sums")
        if found.complete:
            return found
        start = factor_files.restore(found, tensors, device_of(source.model))
    shares = [_share(each, estimator.together, rank, world) for each in parts]
    batch = _safe_batch(source.model, linears, shares, recipe, batch_size or default_batch(length))
    saved = time.monotonic()

    def each_batch(state: Collection) -> None:
        nonlocal saved
        if world == 1 and time.monotonic() - saved >= save_every:
            factor_files.save(target, header, state)
            saved = time.monotonic()

    with _joined(world), progress.stage("curvature", sum(map(len, shares))) as advance:
        state = collect(
            source.model,
            linears,
            tokens,
            estimator,
            parts=shares,
            seed=recipe.seed,
            batch_size=batch,
            labels=recipe.labels,
            advance=advance,
            start=start if world == 1 else None,
            each_batch=each_batch,
            each_pass=lambda state: _add_processes(state, world),
        )
    state.done = len(parts[-1])
    return factor_files.save(target, header, state) if rank == 0 else header


def export_imatrix(
    factors: str | Path, *, output: str | Path, model: str | Path | None = None, progress: Progress | None = None
) -> imatrix.Imatrix:
    """Writes the curvature of each linear's input columns as llama.cpp's importance matrix.

    Args:
        factors: A complete directory that `collect_factors` made.
        output: The GGUF file to write.
        model: Whose config.json tells the architecture, and so the tensors' names; by default the one that the factors name.
        progress: Where to warn of linears that are left out; silent by default.

    Returns:
        What was written.

    Raises:
        RoundelError: see `roundel.errors`.
    """
    progress, target = progress or Silent(), Path(output)
    if target.is_dir():
        raise OutputError(f"{target} is a directory: expected the name of a file to write")
    check_output(target)
    header, sums = factor_files.load(Path(factors))
    _check_complete(header)
    try:
        kind = model_type(str(model or header.model))
    except ModelError as error:
        if model is not None:
            raise
        raise ModelError(f"{error}; the factors name this model: give another copy with --model") from error
    architecture = imatrix.architecture(kind)
    names = imatrix.tensor_names(architecture, header.layers)
    values: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    for module, shape in header.layers.items():
        if module not in names:
            progress.warn(f"{module} is left out: llama.cpp has no matrix with its columns")
            continue
        one = dataclasses.replace(header, layers={module: shape})  # one at a time: the sums of all of them are large
        sketch = factor_files.restore(one, sums, torch.device("cpu")).sketches[module]
        weights = _column_weights(sketch)
        if weights is None:
            progress.warn(f"{module} is left out: no usable gradient reached it")
            continue
        values[names[module]], counts[names[module]] = weights, sketch.tokens
    if not values:
        raise FactorsError(f"none of the factors' linears has a matrix in llama.cpp's {architecture}")
    matrix = imatrix.Imatrix(
        architecture=architecture,
        dataset=header.calibration,
        sequences=len(header.sequence_ids),
        seq_len=header.seq_len,
        values=values,
        counts=counts,
    )
    with storage(target):
        target.absolute().parent.mkdir(parents=True, exist_ok=True)
    with staged_file(target) as temporary:
        imatrix.write(temporary, matrix)
    return matrix


@dataclass(frozen=True, kw_only=True)
class OpenFactors:
    """A factors directory with its model, and text that the factors have not seen."""

    header: Header
    recipe: Recipe
    grid: Grid
    source: Source
    factors: dict[str, Factors]
    heldout: TokenBatch


def open_factors(
    factors: str | Path,
    *,
    model: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress | None = None,
    **settings: Any,
) -> OpenFactors:
    """Loads complete factors, their model and held-out text, as `quantize(factors=...)` does.

    Args:
        factors: A directory that `collect_factors` made.
        model: By default the one that the factors name.
        device: As for `quantize`.
        dtype: As for `quantize`.
        progress: As for `quantize`.
        settings: The fields of `Recipe` that concern rounding and held-out text; the others are the factors'.

    Raises:
        RoundelError: see `roundel.errors`.
    """
    header, sums = factor_files.load(Path(factors))
    _check_complete(header)
    recipe = header.applied_to(Recipe(**settings))
    if recipe.eval_data == "self":
        raise DataError("held-out text of its own must be a file, a directory or a Hub dataset; by default it is that of the factors")
    grid = parse_scheme(recipe.scheme)
    source = load_source(str(model or header.model), recipe, device, dtype)
    _check_model(header, source)
    known = frozenset(header.sequence_ids)
    if recipe.eval_data:
        heldout = evaluation_tokens(recipe.eval_data, source.tokenizer, header.seq_len, recipe.eval_sequences)
        unseen = [row for row, sequence in enumerate(heldout.sequence_ids) if sequence not in known]
        heldout = TokenBatch(ids=heldout.ids[unseen], sequence_ids=tuple(heldout.sequence_ids[row] for row in unseen))
    else:
        heldout = split_text(recipe, source, header.seq_len, progress or Silent(), known=known).heldout
    if len(heldout):
        check_vocabulary(source.model, heldout)
    measured = factor_files.restore(header, sums, torch.device("cpu")).factors()
    return OpenFactors(header=header, recipe=recipe, grid=grid, source=source, factors=measured, heldout=heldout)


def _column_weights(sketch: Sketch) -> Tensor | None:
    """`sum_i F_ij,ij` of the estimated Fisher for each column `j`, `(d_in,)`, scaled; None where the factors are not usable.

    Readers use only ratios of weights. Where the estimator has summed up `x x^T` the mean is that of `E[x_j^2]`, so that the
    weights of `activation` are exactly those of llama-imatrix; else it is 1.
    """
    total = torch.zeros(sketch.d_in, dtype=torch.float64)
    for _, group in sketch.factors().row_groups():
        total += group.scale * group.H_out.diagonal().sum(dtype=torch.float64) * group.H_in.diagonal().double()
    if not (torch.isfinite(total).all() and total.sum() > 0):
        return None
    squares = [total.diagonal().double().mean() for name, total in sketch.sums.items() if name.rpartition(".")[2] == "xx"]
    return total * (squares[0] / sketch.tokens if squares else 1.0) / total.mean()


def _safe_batch(model: nn.Module, linears: dict[str, nn.Linear], parts: Sequence[TokenBatch], recipe: Recipe, wanted: int) -> int:
    """A batch size that is safe for each of these texts."""
    sizes = [
        safe_batch_size(model, linears, part, seed=recipe.seed, batch_size=wanted, labels=recipe.labels) for part in parts if len(part) > 0
    ]
    return min(sizes, default=1)


def _share(tokens: TokenBatch, together: int, rank: int, world: int) -> TokenBatch:
    """The sequences of one of `world` processes: every `world`-th run of `together`."""
    rows = [
        row for start in range(rank * together, len(tokens), world * together) for row in range(start, min(start + together, len(tokens)))
    ]
    return TokenBatch(ids=tokens.ids[rows], sequence_ids=tuple(tokens.sequence_ids[row] for row in rows))


def _layer_of(name: str) -> int:
    """Index of the decoder layer in a module's name."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), -1)


def _processes() -> tuple[int, int]:
    """This process's rank and the number of processes that torchrun started."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    return (int(os.environ["RANK"]), world) if world > 1 else (0, 1)


@contextmanager
def _joined(world: int) -> Iterator[None]:
    """The processes connected for as long as it lasts.

    gloo sometimes aborts a process that exits with its group open, upon which torchrun ends the first process, that may still be writing.
    """
    own = world > 1 and not distributed.is_initialized()
    if own:
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        if own:
            distributed.destroy_process_group()


def _add_processes(state: Collection, world: int) -> None:
    """Adds up the sums of all processes, in each of them."""
    if world == 1:
        return
    for sketch in state.sketches.values():
        for total in sketch.sums.values():
            distributed.all_reduce(total)
        tokens = torch.tensor(sketch.tokens, device=sketch.device)
        distributed.all_reduce(tokens)
        sketch.tokens = int(tokens)


def split_text(recipe: Recipe, source: Source, length: int, progress: Progress, known: frozenset[int] | None = None) -> Split:
    """Calibration and evaluation sequences; `known` are the ids of those that factors have seen."""
    heldout = 0 if recipe.eval_data else recipe.eval_sequences
    wanted = recipe.sequences + heldout
    if recipe.calibration == "self":
        with progress.stage("sampling text from the model", wanted) as advance:
            available = sample_from_model(source.model, source.tokenizer, wanted, length, seed=recipe.seed, advance=advance)
    else:
        # Up to four times what is needed, so that the seed has something to choose from.
        available = windows(read_documents(recipe.calibration), source.tokenizer, length, most=4 * wanted)
    choice = parse_curvature(recipe.curvature).held_out(recipe.sequences)
    split = split_tokens(
        available, calibration=recipe.sequences, heldout=heldout, choice=choice, seed=recipe.seed, source=recipe.calibration, known=known
    )
    split = dataclasses.replace(split, calibration=pilot_first(parse_curvature(recipe.curvature), split.calibration))
    if recipe.eval_data:
        other = evaluation_tokens(recipe.eval_data, source.tokenizer, length, recipe.eval_sequences)
        split = dataclasses.replace(split, heldout=other)
    return split


def evaluation_tokens(source: str, tokenizer: PreTrainedTokenizerBase, length: int, most: int) -> TokenBatch:
    """Up to `most` sequences, as many as the text has."""
    available = windows(read_documents(source), tokenizer, length, most=most)
    if not len(available):
        raise DataError(f"too little text in {source}: not one sequence of {length} tokens; give more text or a smaller --seq-len")
    return TokenBatch.of(available)


def check_vocabulary(model: PreTrainedModel, *texts: TokenBatch) -> None:
    """Refuses text with tokens that the model does not have."""
    largest, size = max(int(tokens.ids.max()) for tokens in texts), int(model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
    if largest >= size:
        raise ModelError(f"the text has token {largest}, but the model's vocabulary has {size} tokens: the tokenizer is another model's")


def _bits_with_vectors(weight: RoundedWeight, recipe: Recipe) -> dict[str, float]:
    """Bits per weight where tuning has put vectors in place of signs, which may take more."""
    form = FORMATS.get(recipe.written_format())
    if form is None or not (isinstance(weight.rotation, Rotation) and weight.rotation.has_vectors):
        return {}
    return {"bits_per_weight": 8 * sum(tensor.nbytes for tensor in form.pack(weight).values()) / math.prod(weight.shape)}


def _frame(source: Source, dtypes: Mapping[str, str], moved: Mapping[str, Tensor]) -> Frame:
    """The original without the weights of its quantized linears, given by their types, and with `moved` for parameters that were tuned;
    experts stored one by one become the parameters that the model has."""
    checkpoint = source.checkpoint
    names = {id(source.model.get_parameter(name)): name for name in moved}
    aliases = {  # a tied head may be stored once more
        name: moved[names[id(parameter)]]
        for name, parameter in source.model.named_parameters(remove_duplicate=False)
        if id(parameter) in names
    }
    fused = checkpoint.fused_in(source.model)
    pieces = {piece for stored in fused.values() for piece in stored}
    kinds = {tensor: checkpoint.read(stored[0]).dtype for tensor, stored in fused.items()}
    weights = {name: stored for name in dtypes if (stored := checkpoint.weight_of(name)) is not None}

    def read(tensor: str) -> Tensor:
        if tensor in aliases:
            return aliases[tensor]
        if tensor not in fused:
            return checkpoint.read(tensor)
        return source.model.get_parameter(tensor).detach().cpu().to(kinds[tensor]).contiguous()

    sizes = {tensor: checkpoint.sizes[tensor] for tensor in checkpoint if tensor not in pieces}
    sizes |= {tensor: source.model.get_parameter(tensor).numel() * kind.itemsize for tensor, kind in kinds.items()}
    return Frame(
        directory=source.path,
        config=source.config,
        sizes=sizes,
        reader=read,
        weights=weights,
        dtypes={name: getattr(torch, dtypes[name]) for name in weights},
        linears=frozenset(name for name, module in source.model.named_modules() if isinstance(module, nn.Linear)),
    )
