"""Embedding and output head in few bits: `--embedding` and `--head`.

They are rounded before everything else, so that the decoder layers are rounded on what the rounded embedding gives. A tied matrix is both
and has the head's scheme. What stands for each: as the format's own tools do (`auto`), `none`, or any scheme that the format holds. With a
target size `auto` leaves several to choose from: then each is tried, as a draft, when the curvature is there.

Cost: as a linear of that size with one-sided feedback, `curvature.ends.ROWS` rows at a time; for each draft the same without sweeps.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from safetensors import safe_open
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
from roundel.recipes import HOLD_ENDS, ROLES, Recipe
from roundel.rounding.round import dequantized, stacked
from roundel.stages.drafts import DRAFT_SWEEPS
from roundel.stages.linears import Linear, round_linears
from roundel.stages.notes import Notes
from roundel.store import staged_file, storage
from roundel.sweeps import Visit
from roundel.types import RoundedWeight

__all__ = ["Ends", "drafts_of_ends", "ends_measured", "measure_ends", "round_ends", "schemes_of_ends", "wants_ends"]

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


def schemes_of_ends(recipe: Recipe, source: Source) -> dict[str, tuple[End, tuple[str, ...]]]:
    """Of each that is to be rounded, by module, the schemes that it may get: one, or several to choose from by what they cost.

    Raises:
        SchemeError: what is asked for cannot be.
    """
    found: dict[str, tuple[End, tuple[str, ...]]] = {}
    ends = ends_of(source.model, source.checkpoint) if recipe.rotate != "fused" else []
    if source.given_schemes:
        return {end.name: (end, (source.given_schemes[end.name],)) for end in ends if end.name in source.given_schemes}
    for role in ROLES:
        if getattr(recipe, role) not in ("auto", "none") and not any(_asked(recipe, end, role) for end in ends):
            raise SchemeError(
                f"--{role} {getattr(recipe, role)}: this model has none that could be quantized (or --rotate fused has changed it)"
            )
    for end in ends:
        if end.name in source.linears:
            continue  # asked for as one of the linears
        given = next((scheme for role in reversed(ROLES) if (scheme := _asked(recipe, end, role)) not in (None, "auto")), "auto")
        if end.embeds and end.heads and len({recipe.embedding, recipe.head} - {"auto"}) > 1:
            raise SchemeError(
                f"--embedding {recipe.embedding} and --head {recipe.head}: they are one matrix in this model; give one of them"
            )
        if given == "none":
            continue
        if given != "auto" and end.embeds and recipe.written_format() not in HOLD_ENDS["embedding"]:
            raise SchemeError(
                f"--head {given}: it is the embedding, too, in this model, and readers of {recipe.written_format()} take no packed one; "
                f"try --format {' or '.join(HOLD_ENDS['embedding'])}"
            )
        shape = tuple(source.model.get_parameter(f"{end.name}.weight").shape)
        schemes = recipe.usual_ends(end.role, shape[0], shape[1]) if given == "auto" else (given,)
        for scheme in schemes:
            recipe.check_shape(scheme, shape[0], shape[1])
        if schemes:
            found[end.name] = (end, schemes)
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
    """Their curvature, in their visit, to a file, and with it what each scheme that there is to choose from would take and cost."""
    rows = range(len(split.calibration))
    found = end_moments(visit, source.layers, split.used, rows, seed=recipe.seed)
    if processes.first():
        draft = replace(recipe, sweeps=min(recipe.sweeps, DRAFT_SWEEPS))
        drafts: dict[str, dict[str, dict[str, float]]] = {}
        for name, (end, schemes) in schemes_of_ends(recipe, source).items():
            if len(schemes) > 1:
                own = {scheme: _rounded(draft, source, end, scheme, found)[1] for scheme in schemes}
                drafts[name] = {scheme: {part: row[part] for part in ("bits_per_weight", "predicted_kl")} for scheme, row in own.items()}
        with storage(work.ends):
            work.ends.mkdir(parents=True, exist_ok=True)
        with staged_file(work.ends / FILE) as temporary:
            tensors = {"embedding": found.embedding, "head": found.head, "share": found.share}
            save_file(tensors, temporary, metadata={"drafts": json.dumps(drafts)})
    processes.wait()


def drafts_of_ends(work: Work) -> dict[str, dict[str, dict[str, float]]]:
    """Of each end and scheme that there is to choose from `bits_per_weight` and `predicted_kl`."""
    with readable(work.ends / FILE), safe_open(work.ends / FILE, framework="pt") as stored:
        found: dict[str, dict[str, dict[str, float]]] = json.loads(stored.metadata()["drafts"])
        return found


def round_ends(recipe: Recipe, source: Source, schemes: Mapping[str, str], notes: Notes, *, work: Work) -> Ends:
    """Rounds them to their schemes, in the first process."""
    if not schemes:
        return Ends()
    files = RoundedFiles(path=work.ends)
    with notes.timed("embedding"), notes.progress.stage("embedding and head", len(schemes)) as advance:
        if processes.first() and not files.has(0):
            with readable(work.ends / FILE):
                moments = EndMoments(**load_file(work.ends / FILE))
            ends, drafts = schemes_of_ends(recipe, source), drafts_of_ends(work)
            weights, rows = {}, {}
            for name, scheme in schemes.items():
                weights[name], rows[name] = _rounded(recipe, source, ends[name][0], scheme, moments)
                rows[name] |= {"schemes": drafts[name]} if name in drafts else {}
                advance(1)
            files.save(0, weights, rows)
        processes.wait()
        files.has(0)
    return Ends(weights={name: files[name] for name in schemes}, rows={name: files.rows[name] for name in schemes})


def _some_rows(weight: RoundedWeight, rows: slice) -> RoundedWeight:
    codes = weight.codes[rows]
    scales = {name: scale[rows] if len(scale) == weight.shape[0] else scale for name, scale in weight.scales.items()}
    return replace(weight, codes=codes, scales=scales, shape=(len(codes), weight.shape[1]))


def _rounded(recipe: Recipe, source: Source, end: End, scheme: str, moments: EndMoments) -> tuple[RoundedWeight, dict[str, Any]]:
    """One of them, some rows after the other."""
    began = time.monotonic()
    whole = Linear.of(source, end.name, factors=next(moments.factors(embeds=end.embeds, heads=end.heads))[1], damping=recipe.damping)
    parts: list[RoundedWeight] = []
    own: list[dict[str, Any]] = []
    given = source.given.get(end.name)
    for rows, factors in moments.factors(embeds=end.embeds, heads=end.heads):
        linear = replace(whole, stored=whole.stored[rows], factors=factors, start=given and _some_rows(given, rows))
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
