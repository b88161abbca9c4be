"""All linears of a model from their curvature to codes: which factors each is rounded with, and with how many bits.

Both choices are made by the same measure: the KL that gradients which the factors have not seen predict for the actual errors,
`1/2 E_s <G_s, E>^2`, all candidates of all linears in one backward pass over them (`curvature.inner_products`).

- Factors: an estimator may offer several candidates for each linear (`Auto.candidates`); each is rounded with all of them, with few sweeps
  and a cheaper grid of the same kind where the real one is expensive (`Grid.draft`). Then the held-out gradients join the sums.
- Bits: for `--bits B` each linear is rounded to each of the recipe's schemes. The schemes that predict the least KL within `B` bits per
  weight, held-out prediction and proxy loss taken together, are an integer program with one choice for each linear (`rounding.allocate`).
  It is taken if the KL *measured* on the same held-out sequences is below that of the best scheme for all within `B`.

Cost besides the roundings: one forward and backward pass over the held-out sequences for each choice, `2 d_in d_out` flops per token,
linear and candidate, and two forward passes for the measured comparison. The codes of all candidates are in memory until the choice.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from roundel.curvature import Sketch, choose, inner_products, parse_curvature
from roundel.curvature.collect import safe_batch_size
from roundel.curvature.sketches.base import Candidate
from roundel.error_aware import Targets
from roundel.errors import NumericalError, SchemeError, in_layer
from roundel.formats import FORMATS
from roundel.grids import Grid, TileGrid, parse_scheme
from roundel.recipes import Recipe
from roundel.rotation import Rotation
from roundel.rounding import allocate, make_problem, round_weights
from roundel.rounding.round import dequantized, stacked
from roundel.source import Notes, Source, device_of, measured_kl
from roundel.types import Factors, KroneckerFactors, RoundedWeight, RoundingProblem, TokenBatch

__all__ = ["Linear", "choose_factors", "decoder_layers", "round_all", "round_allocated", "round_linears"]

DRAFT_SWEEPS = 1
"""Sweeps of a rounding that is made only to compare factors."""

Rows = dict[str, dict[str, Any]]


def round_all(
    recipe: Recipe,
    grid: Grid,
    source: Source,
    sketches: dict[str, Sketch],
    unseen: TokenBatch,
    notes: Notes,
    *,
    batch_size: int,
    correct_on: tuple[TokenBatch, TokenBatch] | None = None,
) -> tuple[dict[str, RoundedWeight], Rows]:
    """Rounds every linear and empties `sketches`; a linear that no gradient reached is moved to `source.skipped`.

    With sequences in `unseen`, each linear's factors are chosen by them, and then they are added to the sums (`choose_factors`). With text
    to `correct_on`, and to judge that by, later linears make up for the errors of earlier ones (`error_aware`): the rows of each decoder
    layer then tell what that has brought after it.
    """
    labels, predicted = choose_factors(recipe, grid, source, sketches, unseen, notes, batch_size=batch_size)
    rounded: dict[str, RoundedWeight] = {}
    rows: Rows = {}
    targets = None
    if correct_on is not None:
        factors = {name: parse_curvature(recipe.curvature).candidates(sketches[name])[label].factors for name, label in labels.items()}
        targets = Targets(source.model, factors, *correct_on, seed=recipe.seed, batch_size=batch_size)
        del factors
    with notes.progress.stage("rounding", len(labels)) as advance:
        for names in decoder_layers(labels):
            chosen = {name: parse_curvature(recipe.curvature).candidates(sketches.pop(name))[labels[name]] for name in names}
            found = _round_candidates(recipe, grid, source, list(chosen.items()), targets.values if targets else {})
            for name, (weight, row) in zip(names, found, strict=True):
                rounded[name], rows[name] = weight, row
                if name in predicted:
                    row |= {"candidate": labels[name], "candidates_predicted_kl": predicted[name]}
                if row.pop("damping_raised"):
                    notes.warn(f"{name}: damping raised to {row['damping']:g}, its factors were not positive definite")
            rounded |= _fitted(recipe, {name: rounded[name] for name in names})
            if targets and (moved := targets.follow({name: rounded[name] for name in names})):
                for name in names:
                    rows[name]["error_aware"] = moved
                if not moved["taken"]:
                    notes.warn(f"what follows {names[-1]} does not make up for its errors: that raised the KL on held-out calibration text")
            advance(len(names))
    return rounded, rows


def choose_factors(
    recipe: Recipe, grid: Grid, source: Source, sketches: dict[str, Sketch], unseen: TokenBatch, notes: Notes, *, batch_size: int
) -> tuple[dict[str, str], dict[str, dict[str, float]]]:
    """Which candidate of the estimator each linear is to be rounded with; a linear that no gradient reached is moved to `source.skipped`.

    The sketches have not seen `unseen`. Each linear is rounded, as cheaply as ranks candidates (`DRAFT_SWEEPS`, `Grid.draft`), with all of
    them, and one is chosen by the KL that gradients of `unseen` predict. Those gradients are then added to the sums: the final factors are
    those of all sequences.

    Returns:
        The candidate of each linear, and by what it was chosen: the predicted KL of each, in nats per token; nothing where there was no
        choice.

    Raises:
        NumericalError: no linear is left.
    """
    estimator = parse_curvature(recipe.curvature)
    labels: dict[str, str] = {}
    drafts: dict[str, dict[str, RoundedWeight]] = {}
    draft = dataclasses.replace(recipe, sweeps=min(recipe.sweeps, DRAFT_SWEEPS))
    with notes.progress.stage("rounding drafts", len(source.linears)) if len(unseen) else nullcontext(lambda _n: None) as advance:
        for name in source.linears:
            candidates = estimator.candidates(sketches[name])
            if any(candidate.factors.scale == 0 for candidate in candidates.values()):
                source.skipped[name] = "no usable gradient reached it"
                notes.warn(f"{name} stays in its precision: no usable gradient reached it")
                del sketches[name]
            else:
                labels[name] = next(iter(candidates))
                if len(unseen):
                    labelled = [(name, candidate) for candidate in candidates.values()]
                    tried = _round_candidates(draft, grid.draft(), source, labelled, kept=False)
                    drafts[name] = {label: weight for label, (weight, _) in zip(candidates, tried, strict=True)}
            advance(1)
    if not labels:
        raise NumericalError("no linear could be quantized: no usable gradient reached any")
    if drafts:
        predicted = _predicted(recipe, source, drafts, unseen, notes, batch_size=batch_size, sketches=sketches)
        labels |= {name: choose(values) for name, values in predicted.items()}
        return labels, {name: {label: values.mean().item() for label, values in own.items()} for name, own in predicted.items()}
    return labels, {}


def round_allocated(
    recipe: Recipe, source: Source, sketches: dict[str, Sketch], unseen: TokenBatch, notes: Notes, *, batch_size: int
) -> tuple[dict[str, RoundedWeight], Rows, dict[str, Any]]:
    """Rounds every linear to that of the recipe's schemes with which the whole model predicts the least KL within `recipe.bits`.

    Args:
        recipe: With `bits`.
        source: The original.
        sketches: Are emptied.
        unseen: Sequences that the factors have not seen, by which all choices are made.
        notes: For warnings and progress.
        batch_size: Sequences per pass.

    Returns:
        Rounded weights, their rows of the report, and how the bits were allocated.

    Raises:
        SchemeError: not even the smallest scheme fits.
    """
    assert recipe.bits is not None
    schemes = recipe.candidate_schemes()
    rounded: dict[str, dict[str, RoundedWeight]] = {}
    rows: dict[str, Rows] = {}
    with notes.progress.stage("rounding", len(sketches) * len(schemes)) as advance:
        for name in list(sketches):
            sketch = sketches.pop(name)
            candidate = next(iter(parse_curvature(recipe.curvature).candidates(sketch).values()))
            if candidate.factors.scale == 0:
                source.skipped[name] = "no usable gradient reached it"
                notes.warn(f"{name} stays in its precision: no usable gradient reached it")
                continue
            rounded[name], rows[name] = {}, {}
            for scheme in schemes:
                ((rounded[name][scheme], row),) = _round_candidates(recipe, parse_scheme(scheme), source, [(name, candidate)])
                rows[name][scheme] = {key: value for key, value in row.items() if key != "damping_raised"}
                advance(1)
    if not rounded:
        raise NumericalError("no linear could be quantized: no usable gradient reached any")
    predicted = _predicted(recipe, source, rounded, unseen, notes, batch_size=batch_size)
    losses = _smoothed(predicted, rows)
    units = allocate.fused_units(list(rounded)) if recipe.fuses else {name: [name] for name in rounded}
    sizes = {name: source.linears[name].weight.numel() for name in rounded}
    choices = {
        unit: {
            scheme: allocate.Option(
                bits=float(sum(round(rows[name][scheme]["bits_per_weight"] * sizes[name]) for name in members)),
                loss=sum(losses[name][scheme] for name in members),
            )
            for scheme in schemes
        }
        for unit, members in units.items()
    }
    budget = float(math.floor(recipe.bits * sum(sizes.values()) + 1e-3))  # bits are whole, and an average copied from a report is enough
    by_unit = allocate.least_loss(choices, budget)
    mixed = {name: by_unit[unit] for unit, members in units.items() for name in members}
    fitting = [s for s in schemes if sum(options[s].bits for options in choices.values()) <= budget]
    report: dict[str, Any] = {
        "bits": recipe.bits,
        "schemes": list(schemes),
        "predicted_kl": sum(choices[unit][scheme].loss for unit, scheme in by_unit.items()),
        "taken": "mixed",
    }
    if fitting:
        uniform = min(fitting, key=lambda scheme: sum(options[scheme].loss for options in choices.values()))
        report["uniform"] = {"scheme": uniform, "predicted_kl": sum(options[uniform].loss for options in choices.values())}
        with notes.progress.stage("mixed bits against uniform", 2 * len(unseen)) as advance:
            measured = [
                measured_kl(
                    source.model, {name: rounded[name][of[name]] for name in rounded}, {}, unseen, batch_size=batch_size, advance=advance
                )
                for of in (mixed, dict.fromkeys(rounded, uniform))
            ]
        report["held_out_kl"], report["uniform"]["held_out_kl"] = measured
        if not measured[0] < measured[1]:
            mixed, report["taken"] = dict.fromkeys(rounded, uniform), "uniform"
            notes.warn(f"{uniform} for all linears is as good as mixed schemes on held-out text, and is taken")
    for name, scheme in mixed.items():
        rows[name][scheme]["schemes_predicted_kl"] = {label: values.mean().item() for label, values in predicted[name].items()}
    taken = _fitted(recipe, {name: rounded[name][mixed[name]] for name in rounded})
    return taken, {name: rows[name][mixed[name]] for name in rounded}, report


def _fitted(recipe: Recipe, rounded: dict[str, RoundedWeight]) -> dict[str, RoundedWeight]:
    """With what linears must share that the format's engines run as one product."""
    if recipe.fuses:
        for unit in allocate.fused_units(list(rounded)).values():
            rounded |= FORMATS[recipe.written_format()].together({name: rounded[name] for name in unit})
    return rounded


def _round_candidates(
    recipe: Recipe,
    grid: Grid,
    source: Source,
    candidates: Sequence[tuple[str, Candidate]],
    targets: Mapping[str, Tensor] | None = None,
    *,
    kept: bool = True,
) -> list[tuple[RoundedWeight, dict[str, Any]]]:
    """Linears by name, each with factors to be rounded with, all at once; to `targets`, where they are not the weights themselves."""
    asked = []
    for name, candidate in candidates:
        stored = source.checkpoint.weight_of(name)
        assert stored is not None
        damping = min(10.0, recipe.damping * candidate.damping)
        target = (targets or {}).get(name)
        asked.append(Linear(name=name, stored=source.checkpoint.read(stored), target=target, factors=candidate.factors, damping=damping))
    results = round_linears(recipe, grid, asked, device_of(source.model), kept=kept)
    for linear, (_, row) in zip(asked, results, strict=True):
        row["damping_raised"] = row["damping"] > linear.damping
    return results


def _predicted(
    recipe: Recipe,
    source: Source,
    rounded: Mapping[str, Mapping[str, RoundedWeight]],
    unseen: TokenBatch,
    notes: Notes,
    *,
    batch_size: int,
    sketches: Mapping[str, Sketch] | None = None,
) -> dict[str, dict[str, Tensor]]:
    """For each linear and label the predicted KL of each sequence, in nats per token; the gradients are added to the sketches."""
    linears = {name: source.linears[name] for name in rounded}

    def error_of(label: str) -> Callable[[str], Tensor]:
        return lambda name: linears[name].weight.float().cpu() - dequantized(rounded[name][label])

    labels = list(next(iter(rounded.values())))
    # its last batch has another size than those of the calibration, for which `batch_size` was found safe
    batch_size = safe_batch_size(source.model, linears, unseen, seed=recipe.seed, batch_size=batch_size, labels=recipe.labels)
    with notes.progress.stage("choice", len(unseen)) as advance:
        inner = inner_products(
            source.model,
            linears,
            {label: error_of(label) for label in labels},
            unseen,
            seed=recipe.seed,
            batch_size=batch_size,
            labels=recipe.labels,
            advance=advance,
            sketches=sketches if recipe.labels != "data" else None,  # the prediction's labels are the model's own, those sums have others
        )
    return {name: {label: 0.5 * inner[label][name].square() / unseen.ids.shape[1] for label in labels} for name in rounded}


def _smoothed(predicted: Mapping[str, Mapping[str, Tensor]], rows: Mapping[str, Rows]) -> dict[str, dict[str, float]]:
    """For each linear and scheme the geometric mean of two predicted KLs, in nats per token.

    What held-out gradients predict is unbiased, but has a standard error of 10-20 % for one linear, and the program would pick where it is
    too low. The proxy loss is smooth, but fitted to the gradients that it was measured on: it is scaled to predict the same in total.
    """
    heldout = {name: {scheme: values.mean().item() for scheme, values in own.items()} for name, own in predicted.items()}
    pairs = [(heldout[name][scheme], rows[name][scheme]["proxy_loss"]) for name in heldout for scheme in heldout[name]]
    scale = sum(first for first, _ in pairs) / max(sum(second for _, second in pairs), torch.finfo(torch.float64).tiny)
    return {
        name: {scheme: math.sqrt(value * scale * rows[name][scheme]["proxy_loss"]) for scheme, value in own.items()}
        for name, own in heldout.items()
    }


@dataclass(frozen=True, kw_only=True)
class Linear:
    """What is to be rounded of one linear."""

    name: str
    """Seeds its rotation."""
    stored: Tensor
    factors: Factors
    damping: float
    target: Tensor | None = None
    """What it is rounded to, if not to what is stored."""


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Rows of a linear with factors of their own: one problem."""

    W: Tensor
    """As stored: errors are relative to it, even where the problem has another target."""
    factors: KroneckerFactors
    rotation: Rotation | None
    problem: RoundingProblem


def round_linears(
    recipe: Recipe, grid: Grid, linears: Sequence[Linear], device: torch.device, *, kept: bool = True
) -> list[tuple[RoundedWeight, dict[str, Any]]]:
    """The codes of each, in main memory, and its row of the report; `device` does the work.

    With grids of tiles all are rounded at the same time (`rounding.round_weights`), and the seconds are shared out by size; with grids of
    scalars that would only take memory.
    Where they are not `kept`, as drafts, the recipe's format need not hold them, and the row has no bits.
    """
    if len(linears) > 1 and not isinstance(grid, TileGrid):
        return [round_linears(recipe, grid, [linear], device, kept=kept)[0] for linear in linears]
    began = time.monotonic()
    parts: list[list[_Part]] = []
    for linear in linears:
        with in_layer(linear.name):
            parts.append(_parts(recipe, grid, linear, device))
    flat = [part for own in parts for part in own]
    dtypes = [_scale_dtype(recipe, linear.stored) for linear, own in zip(linears, parts, strict=True) for _ in own]
    found = iter(round_weights([part.problem for part in flat], grid, sweeps=recipe.sweeps, scale_dtypes=dtypes))
    results = []
    for linear, own in zip(linears, parts, strict=True):
        with in_layer(linear.name):
            weight, row = _result(grid, linear, own, [next(found) for _ in own])
            if kept:
                row["bits_per_weight"] = _stored_bits(recipe, grid, linear.stored) / linear.stored.numel()
            results.append((weight, row))
    seconds = time.monotonic() - began
    for linear, (_, row) in zip(linears, results, strict=True):
        row["seconds"] = round(seconds * linear.stored.numel() / sum(other.stored.numel() for other in linears), 3)
    return results


def _parts(recipe: Recipe, grid: Grid, linear: Linear, device: torch.device) -> list[_Part]:
    kind = recipe.rotation_of(grid)
    groups = linear.factors.row_groups()
    if kind and len(groups) > 1:
        raise SchemeError("groups of rows with curvature of their own cannot be rotated together; use --rotate none or another curvature")
    parts = []
    for rows, group in groups:
        factors = KroneckerFactors(H_out=group.H_out.to(device), H_in=group.H_in.to(device), scale=group.scale)
        W, basis, rotation = linear.stored[rows].to(device).float(), factors, None
        if kind:
            digest = hashlib.sha256(f"{recipe.seed} {linear.name}".encode()).digest()
            rotation = Rotation.draw(W.shape[0], W.shape[1], kind=kind, seed=int.from_bytes(digest[:6], "big"))
            basis = rotation.rotate_factors(factors)
        target = W if linear.target is None else linear.target[rows].to(device)
        problem = make_problem(rotation.rotate_weight(target) if rotation else target, basis, damping=linear.damping)
        parts.append(_Part(W=W, factors=factors, rotation=rotation, problem=problem))
    return parts


def _result(grid: Grid, linear: Linear, parts: Sequence[_Part], found: Sequence[RoundedWeight]) -> tuple[RoundedWeight, dict[str, Any]]:
    weights, proxy_loss = [], 0.0
    for part, weight in zip(parts, found, strict=True):
        E = part.W - dequantized(dataclasses.replace(weight, rotation=part.rotation))
        curved = part.factors.H_out @ E @ part.factors.H_in
        proxy_loss += 0.5 * part.factors.scale * torch.sum(curved * E, dtype=torch.float64).item()
        scales = {key: scale.cpu() for key, scale in weight.scales.items()}
        weights.append(dataclasses.replace(weight, codes=weight.codes.cpu(), scales=scales, rotation=part.rotation))
    result = stacked(weights)
    row = {
        "shape": list(linear.stored.shape),
        "bits": grid.bits,
        "scheme": grid.name,
        "dtype": str(linear.stored.dtype).removeprefix("torch."),
        "damping": max(part.problem.damping for part in parts),
        "proxy_loss": proxy_loss,
        "sweeps": len(result.trace) - 1,
        "loss_after_sweeps": result.trace[-1] / result.trace[0] if result.trace[0] > 0 else 1.0,
    }
    return result, row


def decoder_layers(names: Iterable[str]) -> list[list[str]]:
    """Runs of linears of one decoder layer: what is rounded together, and so in memory together."""
    return [list(group) for _, group in itertools.groupby(names, key=lambda name: re.match(r"(?:.*?\.\d+)?", name)[0])]  # type: ignore[index]


def _stored_bits(recipe: Recipe, grid: Grid, stored: Tensor) -> int:
    """Of all that the linear's weight takes in the recipe's format; in dense ones of codes, scales and a rotation's signs."""
    shape, form, rotation = (stored.shape[0], stored.shape[1]), recipe.written_format(), recipe.rotation_of(grid)
    if form in FORMATS:
        return 8 * FORMATS[form].packed_bytes(shape, grid, _scale_dtype(recipe, stored), rotation)
    return grid.stored_bits(shape, _scale_dtype(recipe, stored)) + (sum(shape) if rotation else 0)


def _scale_dtype(recipe: Recipe, weight: Tensor) -> torch.dtype:
    """Scales are stored in the format's type, if it has one, else in the weight's own, but never in more than 16 bits.

    float32 weights get float16 scales, three bits finer than bfloat16, where they stay clear of float16's narrow range.
    """
    form = recipe.written_format()
    fixed = FORMATS[form].scale_dtype if form in FORMATS else None
    if fixed is not None:
        return fixed
    if weight.dtype in (torch.float16, torch.bfloat16):
        return weight.dtype
    largest = weight.abs().max().item()
    return torch.float16 if 1e-2 < largest < 1e4 else torch.bfloat16
