"""With how many bits each linear is rounded: `--bits`.

In the backward sweep each linear has been rounded to each of the recipe's schemes, as a draft (`stages.curvature`). The schemes that
predict the least KL within `B` bits per weight, held-out prediction and proxy loss taken together, are an integer program with one choice
for each linear (`rounding.allocate`), among whose solutions is the best scheme for all.

Cost: one draft of each linear and scheme, and `2 d_in d_out` flops per held-out token, linear and scheme.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from roundel.artifacts.source import Source
from roundel.recipes import Recipe
from roundel.rounding import allocate

__all__ = ["allocate_bits"]


def allocate_bits(recipe: Recipe, source: Source, rows: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, str], dict[str, Any]]:
    """The scheme of each linear with which the whole model predicts the least KL within `recipe.bits`.

    Args:
        recipe: With `bits`.
        source: The original.
        rows: Of each linear `schemes`: what each would take and cost.

    Returns:
        Schemes by linear, and how the bits were allocated, for the report.

    Raises:
        SchemeError: not even the smallest scheme fits.
    """
    assert recipe.bits is not None
    schemes = recipe.candidate_schemes()
    known = {name: row["schemes"] for name, row in rows.items()}
    losses = _smoothed(known)
    if recipe.fuses:
        units = allocate.fused_units(list(known), experts=True)
    elif recipe.written_format() == "gguf":
        units = allocate.stacked_units(list(known))
    else:
        units = {name: [name] for name in known}
    sizes = {name: source.linears[name].weight.numel() for name in known}
    choices = {
        unit: {
            scheme: allocate.Option(
                bits=float(sum(round(known[name][scheme]["bits_per_weight"] * sizes[name]) for name in members)),
                loss=sum(losses[name][scheme] for name in members),
            )
            for scheme in schemes
        }
        for unit, members in units.items()
    }
    budget = float(math.floor(recipe.bits * sum(sizes.values()) + 1e-3))  # bits are whole, and an average copied from a report is enough
    by_unit = allocate.least_loss(choices, budget)
    mixed = {name: recipe.fitting(by_unit[unit], source.linears[name].in_features) for unit, members in units.items() for name in members}
    fitting = [s for s in schemes if sum(options[s].bits for options in choices.values()) <= budget]
    report: dict[str, Any] = {
        "bits": recipe.bits,
        "schemes": list(schemes),
        "predicted_kl": sum(choices[unit][scheme].loss for unit, scheme in by_unit.items()),
    }
    if fitting:
        uniform = min(fitting, key=lambda scheme: sum(options[scheme].loss for options in choices.values()))
        report["uniform"] = {"scheme": uniform, "predicted_kl": sum(options[uniform].loss for options in choices.values())}
    return mixed, report


def _smoothed(known: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """For each linear and scheme the geometric mean of two predicted KLs, in nats per token.

    What held-out gradients predict is unbiased, but has a standard error of 10-20 % for one linear, and the program would pick where it is
    too low. The proxy loss is smooth, but fitted to the gradients that it was measured on: it is scaled to predict the same in total.
    """
    pairs = [(row["predicted_kl"], row["proxy_loss"]) for own in known.values() for row in own.values()]
    scale = sum(first for first, _ in pairs) / max(sum(second for _, second in pairs), torch.finfo(torch.float64).tiny)
    return {
        name: {scheme: math.sqrt(row["predicted_kl"] * scale * row["proxy_loss"]) for scheme, row in own.items()}
        for name, own in known.items()
    }
