"""With how many bits each linear is rounded: `--bits`.

Each linear is rounded to each of the recipe's schemes. The schemes that predict the least KL within `B` bits per weight, held-out
prediction and proxy loss taken together, are an integer program with one choice for each linear (`rounding.allocate`). It is taken if the
KL *measured* on the same held-out sequences is below that of the best scheme for all within `B`.

Cost besides the roundings: one forward and backward pass over the held-out sequences, and two forward passes for the measured comparison.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from roundel.artifacts.source import Source, measured_kl
from roundel.curvature import Sketch, parse_curvature
from roundel.errors import NumericalError
from roundel.grids import parse_scheme
from roundel.recipes import Recipe
from roundel.rounding import allocate
from roundel.stages.notes import Notes
from roundel.stages.rounding.candidates import Rows, fitted, predicted_losses, round_candidates
from roundel.types import RoundedWeight, TokenBatch

__all__ = ["round_allocated"]


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
                ((rounded[name][scheme], row),) = round_candidates(recipe, parse_scheme(scheme), source, [(name, candidate)])
                rows[name][scheme] = {key: value for key, value in row.items() if key != "damping_raised"}
                advance(1)
    if not rounded:
        raise NumericalError("no linear could be quantized: no usable gradient reached any")
    predicted = predicted_losses(recipe, source, rounded, unseen, notes, batch_size=batch_size)
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
    taken = fitted(recipe, {name: rounded[name][mixed[name]] for name in rounded})
    return taken, {name: rows[name][mixed[name]] for name in rounded}, report


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
