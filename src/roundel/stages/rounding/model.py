"""Rounding of a model: with one scheme or with allocated bits, group after group of decoder layers, going on after a crash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from roundel import processes
from roundel.artifacts.curvatures import LinearCurvature
from roundel.artifacts.factors import model_fingerprint
from roundel.artifacts.imatrix_sums import digest, imatrix_file
from roundel.artifacts.rounded import RoundedFiles, shared
from roundel.artifacts.source import Source, device_of
from roundel.artifacts.work import Work
from roundel.calibration import Split, data_hash
from roundel.formats import FORMATS
from roundel.grids import TileGrid, parse_scheme
from roundel.recipes import Recipe
from roundel.rounding import allocate
from roundel.rounding.prefix import Moments, Strengths
from roundel.stages.curvature import Measured
from roundel.stages.ends import Ends
from roundel.stages.inputs import RoundedInputs
from roundel.stages.judge import Judge
from roundel.stages.linears import Linear, round_linears
from roundel.stages.notes import Notes
from roundel.stages.rounding.allocation import Chosen
from roundel.stages.rounding.sweep import Prefix, Steps, Targets, rounding_sweep, steps_taken
from roundel.stages.text import along
from roundel.types import RoundedWeight

__all__ = ["Rounded", "round_model", "rounding_digest"]

COARSE = 4.5
"""Bits of codes whose errors are far larger than bfloat16's."""


@dataclass(frozen=True, kw_only=True)
class Rounded:
    """A model's codes on their way from rounding over tuning to the checkpoint."""

    weights: Mapping[str, RoundedWeight]
    """By module."""
    layers: Mapping[str, dict[str, Any]]
    """Their rows of the report."""
    ends: Ends = field(default_factory=Ends)
    """Embedding and output head."""
    carried: Mapping[str, Any]
    """What else the report says of their making."""
    cache: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Scales of keys and values, by attention, where engines keep them in fp8."""
    others: Mapping[str, Tensor] = field(default_factory=dict)
    """Parameters that tuning has moved, by name."""
    tuning: Mapping[str, Any] | None = None
    """What the report says of tuning."""


def round_model(
    recipe: Recipe,
    source: Source,
    split: Split,
    measured: Measured,
    chosen: Chosen,
    ends: Ends,
    notes: Notes,
    *,
    batch_size: int,
    work: Work,
    judge: Judge | None = None,
) -> Rounded:
    """Rounds every linear; a group's curvature is removed when its codes are on disk, unless the directory is kept.

    Where linears are quantized already (`Source.given`) those of the groups after which `judge` finds the least KL stay as they were.
    """
    files, schemes = RoundedFiles(path=work.rounded), chosen.linears
    with notes.timed("rounding"):
        own = {name: schemes[name] for name in measured.rows}
        inputs = RoundedInputs(source, own, split, keeps_fp8=recipe.kv_cache == "fp8", batch_size=batch_size, work=work)
        linears = {name: source.linears[name] for name in measured.rows}
        corrects = recipe.corrects(split.calibration.ids.numel())
        rows: dict[str, dict[str, Any]] = {}

        def round_together(index: int, names: list[str], targets: Targets, moments: Moments | None) -> dict[str, RoundedWeight]:
            mine: dict[str, RoundedWeight] = {}
            own_rows: dict[str, dict[str, Any]] = {}
            sizes = {name: float(linears[name].weight.numel() * sum(linears[name].weight.shape)) for name in names}
            here = processes.shared_out(sizes)
            wanted = dict(targets(here)) if here else {}
            for own in _at_a_time(here, schemes):
                known = measured.curvatures.load(index, own)
                asked = [_asked(recipe, source, name, known[name], wanted.pop(name, None), moments) for name in own]
                known_rows = {name: dict(each.row) for name, each in known.items()}
                del known  # its factors, of which each linear has its own
                for linear, (weight, row) in zip(
                    asked, round_linears(recipe, parse_scheme(schemes[own[0]]), asked, device_of(source.model)), strict=True
                ):
                    mine[linear.name] = inputs.stored_with(linear.name, weight)
                    aware = {} if linear.target is None else {"prefix_aware": True}
                    raised = {"damping_raised": True} if row["damping"] > linear.damping else {}
                    own_rows[linear.name] = row | known_rows[linear.name] | aware | raised
            found, all_rows = shared(mine, own_rows)
            for name in names:
                row = all_rows[name]
                if row.pop("damping_raised", False):
                    notes.warn(f"{name}: damping raised to {row['damping']:g}, its factors were not positive definite")
                rows[name] = row
            return _fitted(recipe, {name: found[name] for name in names})

        def judged(index: int, found: dict[str, RoundedWeight]) -> None:
            if judge is not None and found:
                kl = judge(index, files, found)
                for name in found:
                    rows[name]["judged_kl"] = kl

        prefix = None
        if corrects:
            natural = recipe.natural_steps(*split.calibration.ids.shape, weights=sum(linear.weight.numel() for linear in linears.values()))
            prefix = Prefix(
                tokens=along(recipe, split),
                outside=ends.values,
                inside=source.fixed_in,
                quickly=max(parse_scheme(scheme).bits for scheme in schemes.values()) <= COARSE,
                strengths=Strengths(prefix=recipe.prefix_strength, stream=recipe.stream_strength, damping=recipe.prefix_damping),
                steps=None
                if not natural[0]
                else Steps(
                    places=natural[0],
                    steps=natural[1],
                    factors=lambda index: {name: own.factors for name, own in measured.curvatures.load(index).items()},
                    original=lambda name: _stored(source, name),
                    seed=recipe.seed,
                    moved=work.rounded,
                    resident=source.weights is None,
                    kept=work.kept,
                ),
            )
        finished = processes.from_first(lambda: [index for index in range(len(source.layers) + 1) if files.has(index)])
        for index in finished:
            files.has(index)
        with notes.progress.stage("rounding", len(linears)) as advance:
            sweep = rounding_sweep(
                source.layers,
                linears,
                round_together,
                prefix,
                batch_size=batch_size,
                store=work.store("rounding"),
                advance=advance,
                finished=finished.__contains__,
                judged=judged,
            )
            for index, weights in sweep:
                if processes.first():
                    files.save(index, weights, {name: rows[name] for name in weights})
                    if not work.kept:
                        measured.curvatures.remove(index)
                processes.wait()
                files.has(index)  # and its rows are known
                for name in weights:
                    del rows[name]
        if judge is not None and processes.first():
            _take_back(files, source, judge.start)
    carried = {"allocation": chosen.report, "natural_steps": steps_taken(work.rounded)}
    return Rounded(weights=files, layers={name: files.rows[name] for name in linears}, ends=ends, carried=carried, cache=inputs.cache)


def _take_back(files: RoundedFiles, source: Source, start: float) -> None:
    """Groups after the one with which the KL is least, below that at the start, become what they were."""
    known = {index: source.layers.inside(index, source.linears) for index in range(len(source.layers))}
    groups = {index: own for index, names in known.items() if (own := [name for name in names if name in files.rows])}
    curve = {-1: start} | {index: float(files.rows[names[0]]["judged_kl"]) for index, names in groups.items()}
    last = min(curve, key=curve.__getitem__)
    for index, names in groups.items():
        if index > last and "taken" not in files.rows[names[0]]:  # an earlier process has not done so
            files.save(index, {name: source.given[name] for name in names}, {name: {**files.rows[name], "taken": False} for name in names})
        for name in names:
            files.rows[name].setdefault("taken", True)


def _at_a_time(names: Sequence[str], schemes: Mapping[str, str]) -> Iterator[list[str]]:
    """Linears that are rounded together: all of a scheme of tiles, else one, so that one's factors are in memory."""
    for scheme in dict.fromkeys(schemes[name] for name in names):
        own = [name for name in names if schemes[name] == scheme]
        yield from [own] if isinstance(parse_scheme(scheme), TileGrid) else [[name] for name in own]


def _asked(recipe: Recipe, source: Source, name: str, curvature: LinearCurvature, target: Tensor | None, moments: Moments | None) -> Linear:
    return Linear.of(
        source,
        name,
        target=target,
        start=source.given.get(name),
        factors=curvature.factors if moments is None else moments.met(curvature.factors),
        damping=min(10.0, recipe.damping * curvature.damping),
    )


def _stored(source: Source, name: str) -> Tensor:
    stored = source.checkpoint.weight_of(name)
    assert stored is not None
    return source.checkpoint.read(stored)


def _fitted(recipe: Recipe, rounded: dict[str, RoundedWeight]) -> dict[str, RoundedWeight]:
    """With what linears must share that the format's engines run as one product."""
    if recipe.fuses:
        for unit in allocate.fused_units(list(rounded)).values():
            rounded |= FORMATS[recipe.written_format()].together({name: rounded[name] for name in unit})
    return rounded


def rounding_digest(recipe: Recipe, source: Source, split: Split) -> str:
    """Of all that decides the codes before tuning."""
    decisive = {name: value for name, value in recipe.as_json().items() if not name.startswith(("tune", "eval_")) and name != "effort"}
    decisive["prefix_aware"] = recipe.corrects(split.calibration.ids.numel())
    given = [decisive, model_fingerprint(source.checkpoint), data_hash(split.everything), str(source.model.dtype)]
    if recipe.tune != "none":
        given.append(data_hash(along(recipe, split)))
    if (file := imatrix_file(recipe)) is not None:
        given.append(digest(file))
    return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()
