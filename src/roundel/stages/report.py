"""roundel.json, and the pages made of it: the report that makes a written directory complete."""

from __future__ import annotations

import importlib.metadata
import math
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roundel.artifacts.source import Source
from roundel.calibration import Fingerprint, Split, data_hash, opening_of
from roundel.curvature.collect import Prediction
from roundel.evaluate import Divergence
from roundel.evaluate.card import model_card
from roundel.evaluate.report import quantized_page
from roundel.models.load import auto_class
from roundel.recipes import Recipe
from roundel.stages.notes import Notes
from roundel.stages.rounding import Rounded
from roundel.store import write_json, write_text

__all__ = ["Quantized", "report_details", "versions", "write_report"]

SCHEMA_VERSION = 1
FINGERPRINT_MODULUS = 256


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """What `quantize` and `tune` return: where the checkpoint is, what was measured, and the whole of roundel.json."""

    path: Path
    report: Divergence
    details: dict[str, Any]


def versions() -> dict[str, str]:
    """Of what the numbers depend on, beside Roundel itself."""
    return {name: importlib.metadata.version(name) for name in ("torch", "transformers", "compressed-tensors", "numba")}


def write_report(staging: Path, details: dict[str, Any]) -> None:
    """All files that tell of a directory's making: roundel.json, README.md and report.html."""
    write_json(staging / "roundel.json", details)
    write_text(staging / "README.md", model_card(details))
    write_text(staging / "report.html", quantized_page(details))


def report_details(
    recipe: Recipe,
    source: Source,
    split: Split,
    rounded: Rounded,
    notes: Notes,
    *,
    prediction: Prediction,
    divergence: Divergence,
    continuations: list[dict[str, Any]],
    written: int,
    seen: tuple[Fingerprint, float],
) -> dict[str, Any]:
    """The contents of roundel.json.

    Args:
        recipe: As asked for.
        source: The original.
        split: The text.
        rounded: What was written.
        notes: Warnings and seconds of all stages.
        prediction: Of the KL.
        divergence: As measured.
        continuations: Of beginnings of the held-out text.
        written: Bytes of all tensors.
        seen: Of the calibration text, and how much of the evaluation text is in it.
    """
    fingerprint, overlap = seen
    chosen = {name: source.linears[name] for name in rounded.weights}
    weights = sum(linear.weight.numel() for linear in chosen.values())
    # errors that make up for each other do not add up
    by = "joint" if rounded.tuning is not None or any("prefix_aware" in row for row in rounded.layers.values()) else "total"
    return {
        "schema_version": SCHEMA_VERSION,
        "roundel": importlib.metadata.version("roundel"),
        "versions": versions(),
        "model": {
            "name": source.name,
            "repository": source.repository,
            "revision": source.revision,
            "parameters": source.parameters,
            "quantized": source.quantized,
            "terms": source.terms,
            "auto_class": auto_class(source.model.config).__name__,
        },
        "fused_rotation": source.fusion,
        "scheme": recipe.mix or recipe.scheme if rounded.carried.get("allocation") is None else f"{recipe.bits:g} bits",
        **rounded.carried,
        "tuning": rounded.tuning,
        "format": recipe.written_format(),
        "curvature": recipe.curvature,
        "seed": recipe.seed,
        "recipe": recipe.as_json(),
        "calibration": {
            "source": recipe.calibration,
            "sequences": len(split.calibration),
            "sequences_to_choose_by": len(split.choice),
            "opening": opening_of(source.tokenizer),
            "seq_len": split.heldout.ids.shape[1],
            "tokens": split.calibration.ids.numel(),
            "sha256": data_hash(split.calibration),
            **({"sequences_tried": notes.tried} if notes.tried else {}),
            "fingerprint": fingerprint.thinned(FINGERPRINT_MODULUS).as_json(),
        },
        "bits_per_weight": {
            "quantized": sum(rounded.layers[name]["bits_per_weight"] * linear.weight.numel() for name, linear in chosen.items()) / weights,
            "model": 8 * written / source.parameters,
            "quantized_fraction": weights / source.parameters,
        },
        "coverage": source.coverage(chosen).as_json(),
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
        "continuations": continuations,
        "layers": {name: {**row, "predicted_kl": prediction.layers[name]} for name, row in rounded.layers.items()}
        | dict(rounded.ends.rows),
        "skipped": source.skipped,
        "warnings": notes.warnings,
        "seconds": notes.seconds,
        "resources": {"peak_memory": _peak_memory(), "processes": notes.processes, "planned": notes.planned},
    }


def _peak_memory() -> int:
    """Bytes of main memory that this process has had at most."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
