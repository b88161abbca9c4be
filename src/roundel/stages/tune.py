"""`tune`: the last stages of `quantize`, from a directory that it has written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from roundel import processes
from roundel.artifacts.checkpoints import Stored, read
from roundel.artifacts.source import Source, load_source
from roundel.artifacts.work import open_work
from roundel.errors import ModelError, SchemeError, damaged
from roundel.progress import Progress, Silent
from roundel.recipes import TUNINGS, Recipe
from roundel.stages.ends import Ends
from roundel.stages.finish import finish
from roundel.stages.notes import Notes
from roundel.stages.report import Quantized
from roundel.stages.rounding import Rounded
from roundel.stages.text import default_batch, fingerprinted, fresh, read_text
from roundel.stages.tuning import rest_of, tune_model
from roundel.store import check_output

__all__ = ["tune"]

NEAR = 0.7
"""How far a tuned embedding is from its original at most, in units of that; two others are about 1.4 apart."""


@processes.together
def tune(
    directory: str | Path,
    *,
    output: str | Path,
    model: str | Path | None = None,
    work: str | Path | None = None,
    memory: str | int | None = None,
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
        memory: As for `quantize`.
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
    with damaged(ModelError, path / "roundel.json", "it does not say how this was made"):
        old = {name: tuple(value) if isinstance(value, list) else value for name, value in stored.report["recipe"].items()}
        recipe = Recipe(**{**old, "tune": "end-to-end", "format": stored.form, **settings})
        name = str(model or stored.report["model"]["name"])
        if (allocation := stored.report.get("allocation")) is not None and recipe.bits is None:
            raise ValueError("it has an allocation of bits and no number of them")
        layers, skipped = _rows(stored.report), _reasons(stored.report)
    if recipe.tune == "none":
        raise SchemeError(f"nothing to do: expected tune {' or '.join(TUNINGS[1:])}")

    with open_work(None if work is None else Path(work), beside=target, memory=memory) as place:
        with notes.timed("load"):
            source = load_source(name, recipe, device, dtype, work=place, warn=notes.warn)
            source.whole("tuning")
        with damaged(ModelError, path):
            original = _is_original(source, stored)
        if not original:
            raise ModelError(f"{name} is not the original of {path}: its linears or its embeddings differ; give it by --model")
        split = read_text(recipe, source, notes)
        batch = batch_size or default_batch(source.length)
        source.skipped.update(skipped)
        rows = {name: row for name, row in layers.items() if "end" in row}
        ends = Ends(weights={name: stored.rounded[name] for name in rows}, rows=rows)
        rounded = Rounded(
            weights={name: weight for name, weight in stored.rounded.items() if name not in ends.rows},
            layers={name: row for name, row in layers.items() if name not in ends.rows},
            ends=ends,
            carried={"allocation": allocation, "tuned_from": str(path)},
            others=_moved(source, stored),
        )
        seen = fingerprinted(split, notes)
        unseen = fresh(recipe, source, split)
        if not len(unseen):
            notes.warn("all of the calibration text has been rounded on: steps that would help on other text may be refused (give more)")
        rounded = tune_model(recipe, source, split, rounded, notes, batch_size=batch, work=place, judged_by=unseen if len(unseen) else None)
        return finish(target, recipe, source, split, rounded, notes, seen=seen, batch_size=batch, work=place)


def _rows(report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Of all linears, as the next report will have them.

    Raises:
        ValueError: what it computes with is no number.
    """
    rows: dict[str, dict[str, Any]] = report["layers"]
    for name, row in rows.items():
        for key in ("bits_per_weight", "predicted_kl", "proxy_loss", "damping"):
            if not isinstance(row.get(key), int | float) or not math.isfinite(row[key]):
                raise ValueError(f"{key} of {name} is no number")
    return rows


def _reasons(report: Mapping[str, Any]) -> dict[str, str]:
    """Why linears were left as they were.

    Raises:
        ValueError: it does not say.
    """
    skipped: dict[str, str] = report.get("skipped", {})
    if not all(isinstance(reason, str) for reason in skipped.values()):
        raise ValueError("skipped has no reasons")
    return skipped


def _is_original(source: Source, stored: Stored) -> bool:
    """Whether linears have the same names and shapes, and the first matrix that is not quantized is the same, or close to it if it was
    tuned."""
    shapes = {name: tuple(parameter.shape) for name, parameter in source.model.named_parameters()}
    if any(shapes.get(f"{name}.weight") != weight.shape for name, weight in stored.rounded.items()):
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


def _has_moved(stored: Stored) -> bool:
    """Whether an earlier tuning has moved anything but quantized weights."""
    return bool((stored.report.get("tuning") or {}).get("other_parameters"))


def _moved(source: Source, stored: Stored) -> dict[str, Tensor]:
    """What of the rest an earlier tuning has moved, and where to."""
    if not _has_moved(stored):
        return {}
    found = {name: stored.frame.reader(name) for name in rest_of(source) if name in stored.frame.sizes}
    return {name: value for name, value in found.items() if not torch.equal(value, source.checkpoint.read(name))}
