"""Curvature: from text to what every linear is rounded with, by one backward sweep (`sweeps.gradient_visits`).

In the visit of a group of layers, while its gradients are there:

    sums of the estimator over the calibration sequences, or those of a factors directory
    where sequences are left out to choose by: each linear is rounded as a draft under every candidate of the estimator (or to every scheme
        that bits are allocated over), the KL of these errors is predicted on them, `1/2 E_s <G_s, E>^2`, one is chosen, and their gradients
        join the sums
    the factors go to disk (`artifacts.curvatures`), the sums are dropped

Where the sums of a group take more than a part of the memory, so do some of its linears at a time (`_portions`), which the group is run
again for; no result depends on it. Several processes share sequences and drafts (`roundel.processes`), and the first writes.

Cost: a forward pass, a forward and backward pass for each pass of the estimator and each portion, drafts with one sweep. Memory: the sums
of one portion, `STATES` matrices of the size of each factor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from roundel import processes
from roundel.artifacts import factors as factor_files
from roundel.artifacts.curvatures import Curvatures, LinearCurvature
from roundel.artifacts.factors import FactorsDirectory
from roundel.artifacts.imatrix_sums import imatrix_sums
from roundel.artifacts.source import Source
from roundel.artifacts.work import Work
from roundel.calibration import Split
from roundel.curvature import Candidate, Sketch, choose, parse_curvature
from roundel.curvature.collect import collect_visit, inner_products, passes
from roundel.curvature.pooling import ENOUGH, Pooled
from roundel.errors import FactorsError, NumericalError
from roundel.grids import parse_scheme
from roundel.models.experts import expert_family
from roundel.recipes import Recipe
from roundel.rounding.round import dequantized
from roundel.stages.drafts import DRAFT_SWEEPS, Draft, draft_rounding, drafts_of
from roundel.stages.ends import drafts_of_ends, ends_measured, measure_ends, wants_ends
from roundel.stages.linears import schemes_of, width_of
from roundel.stages.notes import Notes
from roundel.stages.text import along
from roundel.sweeps import Visit, gradient_visits, safe_batch_size
from roundel.sweeps.gradients import ENDS, steps, visits_without_gradients

__all__ = ["Measured", "Settled", "check_model", "measure_curvature", "measured_in", "safe_batch", "settle"]

STATES = 7
"""Matrices of the size of each factor that a linear needs at the same time: sums, sums of a run, what one pass hands on to the next."""

PORTION = 4
"""One part in so many of the memory is for the sums of a portion."""

UNSEEN = 99
"""The portion of linears that never ran on the text."""


class Sums(Protocol):
    """What was summed up before."""

    def sketches(self, names: Iterable[str], device: torch.device) -> dict[str, Sketch]:
        """Those of some linears."""
        ...


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What the rounding stage reads."""

    curvatures: Curvatures
    rows: dict[str, dict[str, Any]]
    """What the report says of each linear that can be rounded, by name."""
    ends: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)
    """Of embedding and head, where there is to choose, what each scheme takes and costs (`stages.ends`)."""


def measure_curvature(
    recipe: Recipe,
    source: Source,
    split: Split,
    stored: Sums | None,
    notes: Notes,
    *,
    batch_size: int,
    work: Work,
) -> Measured:
    """What each linear is rounded with, collected from the text or from sums that are `stored` or in the file that the recipe names.

    Linears that no gradient reached are moved to `source.skipped`.

    Raises:
        NumericalError: no linear is left.
    """
    curvatures = Curvatures(path=work.curvature, factor_type=recipe.factor_type)
    stored = stored if stored is not None else imatrix_sums(recipe, source)
    with notes.timed("curvature"):
        tokens, linears, rows = split.used, source.linears, _own_rows(recipe, split)
        total = steps(source.layers, linears) * len(rows)
        finished = processes.from_first(lambda: [index for index in range(len(source.layers) + 1) if curvatures.has(index)])
        finished += processes.from_first(lambda: [ENDS] * ends_measured(work))
        with notes.progress.stage("curvature", total) as advance:
            kinds = [recipe.labels] * len(split.calibration) + ["sampled" if recipe.labels == "data" else recipe.labels] * len(split.choice)
            ends = wants_ends(recipe, source)
            if stored is not None and recipe.bits is None and not len(split.choice) and not ends:
                visits = visits_without_gradients(source.layers, linears, finished=finished.__contains__)
                advance(total)
            else:
                visits = gradient_visits(
                    source.layers,
                    linears,
                    tokens,
                    seed=recipe.seed,
                    labels=kinds,
                    batch_size=batch_size,
                    store=work.store("curvature"),
                    advance=advance,
                    finished=finished.__contains__,
                    quickly=True,
                    rows=rows,
                    ends=ends,
                )
            for visit in visits:
                if visit.index == ENDS:
                    measure_ends(visit, recipe, source, split, work)
                    continue
                _measure(visit, recipe, source, split, stored, curvatures, batch_size, work.memory)
    found = measured_in(curvatures, source, notes)
    return dataclasses.replace(found, ends=drafts_of_ends(work)) if ends else found


def measured_in(curvatures: Curvatures, source: Source, notes: Notes) -> Measured:
    """What a directory holds of a whole model; linears that cannot be rounded are moved to `source.skipped`.

    Raises:
        NumericalError: no linear is left.
    """
    found: dict[str, dict[str, Any]] = {}
    for index in [*range(len(source.layers)), len(source.layers)]:
        if curvatures.has(index):
            known = curvatures.notes(index)
            found |= {name: own["row"] for name, own in known["linears"].items()}
            for name, reason in known["skipped"].items():
                source.skipped[name] = reason
                notes.warn(f"{name} stays in its precision: {reason}")
    if few := [name for name, row in found.items() if "borrowed" in row]:
        notes.warn(f"{_some(few)} saw fewer than {ENOUGH} rows a column: part of their curvature is that of their layer's other experts")
    if unseen := [name for name, row in found.items() if row.get("text_rows") == 0 and "borrowed" not in row]:
        notes.warn(f"{_some(unseen)} never ran on the text: rounded to nearest, and no KL of this report says what that costs")
    if len(unseen) == len(found):
        raise NumericalError("no linear could be quantized: no usable gradient reached any")
    return Measured(curvatures=curvatures, rows={name: found[name] for name in source.linears if name in found})


def _some(names: Sequence[str]) -> str:
    """The first of them, and how many more."""
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def safe_batch(source: Source, split: Split, recipe: Recipe, wanted: int) -> int:
    """A batch size that is safe for all that sequences are gone through for (`sweeps.safe_batch_size`)."""
    prefix = range(len(along(recipe, split)))
    together = [len(run) for rows in [*_parts(recipe, split), prefix] for run in processes.runs(rows)]
    together += [len(_own_rows(recipe, split)), len(processes.own_rows(prefix)), len(processes.own_rows(range(len(split.heldout))))]
    return safe_batch_size(source.layers, source.linears, split.used, batch_size=wanted, parts=together, quickly=True)


def _parts(recipe: Recipe, split: Split) -> list[Sequence[int]]:
    """The sequences of each pass, and those to choose by."""
    count = len(split.calibration)
    return [*passes(parse_curvature(recipe.curvature), count), range(count, count + len(split.choice))]


def _own_rows(recipe: Recipe, split: Split) -> list[int]:
    """Those that this process takes."""
    together = parse_curvature(recipe.curvature).together
    *summed, choice = _parts(recipe, split)
    return sorted({row for rows in summed for row in processes.own_rows(rows, together)} | set(processes.own_rows(choice)))


def _measure(
    visit: Visit,
    recipe: Recipe,
    source: Source,
    split: Split,
    stored: Sums | None,
    curvatures: Curvatures,
    batch_size: int,
    memory: int,
) -> None:
    """One group of layers, from its gradients to its files."""
    device, count = source.layers.device, len(split.calibration)
    *summed, held = _parts(recipe, split)
    estimators, parts = {"": parse_curvature(recipe.curvature)}, {"": summed}
    found = Settled()
    for portion, names in enumerate(_portions(visit.names, source, memory)):
        if stored is not None:
            sketches = stored.sketches(names, device)
        else:
            measured = collect_visit(visit, source.linears, estimators, parts, batch_size=batch_size, device=device, names=names, fast=True)
            sketches = measured[""].sketches
            del measured
        settle(visit, recipe, source, sketches, count, held, batch_size, found)
        del sketches  # before those of the next
        found.put(curvatures, visit.index, portion)
    found.finish(curvatures, visit.index)


def _portions(names: Sequence[str], source: Source, memory: int) -> list[list[str]]:
    """Linears whose sums are in memory at the same time, all experts of a family in one."""
    units: dict[str, list[str]] = {}
    for name in names:
        units.setdefault(expert_family(source.model, name) or name, []).append(name)
    found: list[list[str]] = []
    filled = 0
    for unit in units.values():
        size = sum(4 * STATES * (linear.in_features**2 + linear.out_features**2) for linear in map(source.linears.__getitem__, unit))
        if not found or filled + size > memory // PORTION:
            found.append([])
            filled = 0
        found[-1] += unit
        filled += size
    return found


@dataclass(kw_only=True)
class Settled:
    """What is known of the linears of one visit so far."""

    linears: dict[str, LinearCurvature] = field(default_factory=dict)
    """What they are rounded with; those that have not been `put` yet."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Those that cannot be rounded, and why."""
    unseen: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Those that never ran on the text, and their shapes."""
    _notes: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, candidate: Candidate, row: dict[str, Any], borrowed: float) -> None:
        """What a linear is rounded with, and what part of it is its family's."""
        told = {**row, "borrowed": borrowed} if borrowed else row
        self.linears[name] = LinearCurvature(factors=candidate.factors, damping=candidate.damping, row=told)

    def put(self, curvatures: Curvatures, index: int, portion: int) -> None:
        """Writes what is new."""
        if self.linears and processes.first():
            self._notes |= curvatures.put(index, portion, self.linears)
        self.linears.clear()

    def finish(self, curvatures: Curvatures, index: int) -> None:
        """The visit is over: what never ran is rounded to nearest, or skipped where nothing did, as in layers for images."""
        if processes.first():
            if self._notes or self.skipped:
                flat = parse_curvature("identity")
                for name, shape in self.unseen.items():
                    factors = flat.sketch(*shape, torch.device("cpu")).factors()
                    self.linears[name] = LinearCurvature(factors=factors, row={"text_rows": 0})
                self.put(curvatures, index, UNSEEN)
            else:
                self.skipped |= dict.fromkeys(self.unseen, "no text goes through its layer")
            curvatures.save(index, self._notes, self.skipped)
        processes.wait()


def settle(
    visit: Visit,
    recipe: Recipe,
    source: Source,
    sketches: Mapping[str, Sketch],
    count: int,
    held: Sequence[int],
    batch_size: int,
    found: Settled,
) -> None:
    """Adds to `found` what linears of a visit are rounded with, and which cannot be rounded and why.

    Args:
        visit: The group of layers.
        recipe: How they will be rounded.
        source: The model.
        sketches: The sums of some of its linears, over `count` sequences; others may join them.
        count: How many sequences calibrate.
        held: Sequences to choose by.
        batch_size: Sequences in a pass.
        found: Of the visit.
    """
    family_of = partial(expert_family, source.model)
    pooled = Pooled(parse_curvature(recipe.curvature), sketches, family_of)
    labels: dict[str, str] = {}
    rows: dict[str, dict[str, Any]] = {}
    compared = recipe.bits is not None or len(held) > 0
    for name, sketch in sketches.items():
        candidates = pooled.candidates(name)
        if all(candidate.factors.scale > 0 for candidate in candidates.values()):
            label, candidate = next(iter(candidates.items()))
            labels[name] = label
            rows[name] = {"text_rows": sketch.rows} if family_of(name) else {}
            if not compared:
                found.add(name, candidate, rows[name], pooled.borrowed(name))
        elif sketch.rows == 0 and recipe.bits is None:
            found.unseen[name] = (sketch.d_out, sketch.d_in)
        else:
            found.skipped[name] = "no usable gradient reached it"
    names = list(labels)
    if not compared:
        return
    if recipe.bits is not None:
        _draft_schemes(visit, recipe, source, pooled, names, held or range(count), rows, batch_size)
    elif held and names:
        _choose_factors(visit, recipe, source, sketches, pooled, names, held, labels, rows, batch_size)
        pooled = Pooled(parse_curvature(recipe.curvature), sketches, family_of)  # with the gradients that were chosen by
    for name in names:
        found.add(name, pooled.candidates(name)[labels[name]], rows[name], pooled.borrowed(name))


def _choose_factors(
    visit: Visit,
    recipe: Recipe,
    source: Source,
    sketches: Mapping[str, Sketch],
    pooled: Pooled,
    names: Sequence[str],
    held: Sequence[int],
    labels: dict[str, str],
    rows: dict[str, dict[str, Any]],
    batch_size: int,
) -> None:
    """Puts the candidate that each linear is to be rounded with into `labels`; the gradients that were chosen by join the sums."""
    schemes = schemes_of(recipe, source)
    draft = dataclasses.replace(recipe, sweeps=min(recipe.sweeps, DRAFT_SWEEPS))

    def made(name: str) -> dict[str, Draft]:
        return draft_rounding(draft, parse_scheme(schemes[name]).draft(), source, name, pooled.candidates(name), kept=False)

    drafts = drafts_of(source, names, made)
    joins = recipe.labels != "data"  # the prediction's labels are the model's own, those sums have others
    predicted = _predicted(visit, source, drafts, held, batch_size, sketches if joins else None)
    for name, own in predicted.items():
        labels[name] = choose(own)
        means = {label: values.mean().item() for label, values in own.items()}
        rows[name] |= {"candidate": labels[name], "candidates_predicted_kl": means}


def _draft_schemes(
    visit: Visit,
    recipe: Recipe,
    source: Source,
    pooled: Pooled,
    names: Sequence[str],
    held: Sequence[int],
    rows: dict[str, dict[str, Any]],
    batch_size: int,
) -> None:
    """Puts into `rows` what each of the recipe's schemes would take and cost each linear."""
    draft = dataclasses.replace(recipe, sweeps=min(recipe.sweeps, DRAFT_SWEEPS))

    def made(name: str) -> dict[str, Draft]:
        candidate, width = next(iter(pooled.candidates(name).values())), width_of(recipe, source, name)
        return {
            scheme: draft_rounding(draft, parse_scheme(recipe.fitting(scheme, width)), source, name, {"": candidate}, kept=True)[""]
            for scheme in recipe.candidate_schemes()
        }

    drafts = drafts_of(source, names, made)
    for name, own in _predicted(visit, source, drafts, held, batch_size, None).items():
        rows[name]["schemes"] = {
            scheme: {
                "bits_per_weight": drafts[name][scheme].row["bits_per_weight"],
                "proxy_loss": drafts[name][scheme].row["proxy_loss"],
                "predicted_kl": values.mean().item(),
            }
            for scheme, values in own.items()
        }


def _predicted(
    visit: Visit,
    source: Source,
    drafts: Mapping[str, Mapping[str, Draft]],
    held: Sequence[int],
    batch_size: int,
    sketches: Mapping[str, Sketch] | None,
) -> dict[str, dict[str, Tensor]]:
    """For each linear and label the predicted KL of each held-out sequence, in nats per token; the gradients are added to the sketches."""

    def error_of(label: str) -> Callable[[str], Tensor]:
        return lambda name: source.linears[name].weight.float().cpu() - dequantized(drafts[name][label].weight)

    labels = list(next(iter(drafts.values())))
    inner = inner_products(
        visit, {label: error_of(label) for label in labels}, held, batch_size=batch_size, sketches=sketches, names=drafts
    )
    length = source.length
    return {name: {label: 0.5 * inner[label][name].square() / length for label in labels} for name in drafts}


def check_model(stored: FactorsDirectory, source: Source) -> None:
    """Refuses incomplete factors and those of another model; linears that they do not hold are skipped."""
    stored.check_complete()
    if stored.header.model_fingerprint != factor_files.model_fingerprint(source.checkpoint):
        raise FactorsError(
            f"the factors are of another model than {source.name}, or of another --rotate or --seed with fused rotation; collect them again"
        )
    for name in set(source.linears) - set(stored.header.layers):
        source.skipped[name] = "not in the factors directory"
        del source.linears[name]
    if not source.linears:
        raise FactorsError("the factors hold none of the linears to be quantized")
