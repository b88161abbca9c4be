"""Rounding of a model: with one scheme or with allocated bits, or what a crashed call has left of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from roundel.artifacts.factors import model_fingerprint
from roundel.artifacts.source import Source
from roundel.calibration import Split, data_hash
from roundel.curvature import Sketch
from roundel.grids import parse_scheme
from roundel.recipes import Recipe
from roundel.stages.notes import Notes
from roundel.stages.rounding.allocation import round_allocated
from roundel.stages.rounding.round_all import round_all
from roundel.stages.text import set_apart
from roundel.tuning.saved import Saved, packed, unpacked
from roundel.types import RoundedWeight

__all__ = ["Rounded", "round_model"]


@dataclass(frozen=True, kw_only=True)
class Rounded:
    """A model's codes on their way from rounding over tuning to the checkpoint."""

    weights: Mapping[str, RoundedWeight]
    """By module."""
    layers: Mapping[str, dict[str, Any]]
    """Their rows of the report."""
    carried: Mapping[str, Any]
    """What else the report says of their making."""
    others: Mapping[str, Tensor] = field(default_factory=dict)
    """Parameters that tuning has moved, by name."""
    tuning: Mapping[str, Any] | None = None
    """What the report says of tuning."""


def round_model(
    recipe: Recipe, source: Source, split: Split, sketches: dict[str, Sketch], notes: Notes, *, batch_size: int, work: Path | None
) -> Rounded:
    """Rounds every linear and empties `sketches`; with `work`, the codes are kept there, and taken from there if they are the same's.

    Linears that cannot be rounded are moved to `source.skipped`.
    """
    before = Saved(path=work and work / "rounded.safetensors", digest=_digest(recipe, source, split))
    with notes.timed("rounding"):
        allocation = None
        if (found := before.load()) is not None:
            layers, allocation = found[1]["layers"], found[1]["allocation"]
            weights = unpacked(found[0], {name: (row["scheme"], tuple(row["shape"])) for name, row in layers.items()})
            source.skipped.update(found[1]["skipped"])
        elif recipe.bits is None:
            correct_on = set_apart(split) if recipe.corrects(split.used.ids.numel()) else None
            weights, layers = round_all(
                recipe, parse_scheme(recipe.scheme), source, sketches, split.choice, notes, batch_size=batch_size, correct_on=correct_on
            )
        else:
            unseen = split.choice
            if not len(unseen):
                unseen = split.calibration
                notes.warn(
                    "bits are allocated by the calibration sequences themselves: none are held out (use --curvature auto, more --sequences)"
                )
            weights, layers, allocation = round_allocated(recipe, source, sketches, unseen, notes, batch_size=batch_size)
        if found is None:
            before.save(lambda: packed(weights), {"layers": layers, "allocation": allocation, "skipped": source.skipped})
    return Rounded(weights=weights, layers=layers, carried={"allocation": allocation})


def _digest(recipe: Recipe, source: Source, split: Split) -> str:
    """Of all that decides the codes before tuning."""
    decisive = {name: value for name, value in recipe.as_json().items() if not name.startswith(("tune", "eval_"))}
    decisive["error_aware"] = recipe.corrects(split.used.ids.numel())
    given = [decisive, model_fingerprint(source.checkpoint), data_hash(split.used), str(source.model.dtype)]
    return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()
