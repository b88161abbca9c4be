"""Embedding and output head in few bits: `--embedding` and `--head`.

They are rounded before everything else, so that the decoder layers are rounded on what the rounded embedding gives. A tied matrix is both
and has the head's scheme. What stands for each is chosen here: as the format's own tools do (`auto`), `none`, or any scheme that the format
holds.

Cost: as a linear of that size with one-sided feedback, `curvature.ends.ROWS` rows at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from roundel import processes
from roundel.artifacts.rounded import RoundedFiles
from roundel.artifacts.source import Source, device_of
from roundel.artifacts.work import Work, readable
from roundel.calibration import Split
from roundel.curvature.ends import EndMoments, end_moments
from roundel.errors import SchemeError
from roundel.grids import parse_scheme
from roundel.models.ends import End, ends_of
from roundel.recipes import Recipe
from roundel.rounding.round import dequantized, stacked
from roundel.stages.linears import Linear, round_linears
from roundel.stages.notes import Notes
from roundel.store import staged_file, storage
from roundel.sweeps import Visit
from roundel.types import RoundedWeight

__all__ = ["Ends", "ends_measured", "measure_ends", "round_ends", "schemes_of_ends", "wants_ends"]

FILE = "moments.safetensors"


@dataclass(frozen=True, kw_only=True)
class Ends:
    """Their codes."""

    weights: Mapping[str, RoundedWeight] = field(default_factory=dict)
    """By module."""
    rows: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    """Of the report."""
    fixed: Callable[[], Mapping[str, Tensor]] = dict
    """Makes other parameters outside of the layers that are not the original's, by name."""

    def values(self) -> dict[str, Tensor]:
        """What the model's parameters become, by name."""
        return dict(self.fixed()) | {f"{name}.weight": dequantized(weight) for name, weight in self.weights.items()}


def schemes_of_ends(recipe: Recipe, source: Source) -> dict[str, tuple[End, str]]:
    """The scheme of each that is to be rounded, by module.

    Raises:
        SchemeError: what is asked for cannot be.
    """
    found: dict[str, tuple[End, str]] = {}
    ends = ends_of(source.model, source.checkpoint) if recipe.rotate != "fused" else []
    for role in ("embedding", "head"):
        if getattr(recipe, role) not in ("auto", "none") and not any(_asked(recipe, end, role) for end in ends):
            raise SchemeError(
                f"--{role} {getattr(recipe, role)}: this model has none that could be quantized (or --rotate fused has changed it)"
            )
    for end in ends:
        if end.name in source.linears:
            continue  # asked for as one of the linears
        given = next((scheme for role in ("head", "embedding") if (scheme := _asked(recipe, end, role)) not in (None, "auto")), "auto")
        if end.embeds and end.heads and len({recipe.embedding, recipe.head} - {"auto"}) > 1:
            raise SchemeError(
                f"--embedding {recipe.embedding} and --head {recipe.head}: they are one matrix in this model; give one of them"
            )
        shape = tuple(source.model.get_parameter(f"{end.name}.weight").shape)
        scheme = recipe.usual_end(end.role, shape[0], shape[1]) if given == "auto" else given
        if scheme == "none" or scheme is None:
            continue
        recipe.check_shape(scheme, shape[0], shape[1])
        found[end.name] = (end, scheme)
    return found


def _asked(recipe: Recipe, end: End, role: str) -> str | None:
    """What is asked for an end in one of its roles."""
    plays = end.embeds if role == "embedding" else end.heads
    return str(getattr(recipe, role)) if plays else None


def wants_ends(recipe: Recipe, source: Source) -> bool:
    """Whether any is to be rounded."""
    return bool(schemes_of_ends(recipe, source))


def ends_measured(work: Work) -> bool:
    """Whether an earlier process has left their curvature."""
    return (work.ends / FILE).is_file()


def measure_ends(visit: Visit, recipe: Recipe, source: Source, split: Split, work: Work) -> None:
    """Their curvature, in their visit, to a file."""
    rows = range(len(split.calibration))
    found = end_moments(visit, source.layers, split.used, rows, seed=recipe.seed)
    if processes.first():
        with storage(work.ends):
            work.ends.mkdir(parents=True, exist_ok=True)
        with staged_file(work.ends / FILE) as temporary:
            save_file({"embedding": found.embedding, "head": found.head, "share": found.share}, temporary)
    processes.wait()


def round_ends(recipe: Recipe, source: Source, notes: Notes, *, work: Work) -> Ends:
    """Rounds them, in the first process."""
    chosen = schemes_of_ends(recipe, source)
    if not chosen:
        return Ends()
    files = RoundedFiles(path=work.ends)
    with notes.timed("embedding"), notes.progress.stage("embedding and head", len(chosen)) as advance:
        if processes.first() and not files.has(0):
            with readable(work.ends / FILE):
                moments = EndMoments(**load_file(work.ends / FILE))
            weights, rows = {}, {}
            for name, (end, scheme) in chosen.items():
                weights[name], rows[name] = _rounded(recipe, source, end, scheme, moments)
                advance(1)
            files.save(0, weights, rows)
        processes.wait()
        files.has(0)
    return Ends(weights={name: files[name] for name in chosen}, rows={name: files.rows[name] for name in chosen})


def _rounded(recipe: Recipe, source: Source, end: End, scheme: str, moments: EndMoments) -> tuple[RoundedWeight, dict[str, Any]]:
    """One of them, some rows after the other."""
    began = time.monotonic()
    whole = Linear.of(source, end.name, factors=next(moments.factors(embeds=end.embeds, heads=end.heads))[1], damping=recipe.damping)
    parts: list[RoundedWeight] = []
    own: list[dict[str, Any]] = []
    for rows, factors in moments.factors(embeds=end.embeds, heads=end.heads):
        linear = replace(whole, stored=whole.stored[rows], factors=factors)
        ((weight, row),) = round_linears(recipe, parse_scheme(scheme), [linear], device_of(source.model))
        parts.append(weight)
        own.append(row)
    loss = sum(row["proxy_loss"] for row in own)
    row = {
        **own[0],
        "shape": list(whole.stored.shape),
        "damping": max(row["damping"] for row in own),
        "proxy_loss": loss,
        "predicted_kl": loss,
        "end": "tied" if end.embeds and end.heads else end.role,
        "seconds": round(time.monotonic() - began, 3),
    }
    return stacked(parts), row
