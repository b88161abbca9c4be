"""Which scheme each linear gets, and embedding and head: the recipe's, or by what each costs, within `--bits` or `--target-size`.

In the backward sweep each linear has been rounded to each of the recipe's schemes, as a draft (`stages.curvature`), and with a target size
embedding and head to each of theirs (`stages.ends`). The schemes that predict the least KL within `B` bits per weight are an integer
program with one choice for each (`rounding.allocate`), among whose solutions is the best scheme for all. What a linear costs is held-out
prediction and proxy loss taken together, what an end does its proxy loss: a mean over all tokens, of few directions that the text could
have fitted.

Cost: one draft of each linear and scheme, and `2 d_in d_out` flops per held-out token, linear and scheme.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from roundel.artifacts.source import Source
from roundel.recipes import Recipe
from roundel.rounding import allocate
from roundel.stages.curvature import Measured
from roundel.stages.ends import schemes_of_ends
from roundel.stages.linears import schemes_of, width_of

__all__ = ["Chosen", "choose_schemes"]


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What everything is rounded to."""

    linears: Mapping[str, str]
    ends: Mapping[str, str]
    report: dict[str, Any] | None = None
    """How bits were allocated, if they were."""


def choose_schemes(recipe: Recipe, source: Source, measured: Measured) -> Chosen:
    """The recipe's schemes, or those with which the whole model predicts the least KL within `recipe.bits`.

    Raises:
        SchemeError: not even the smallest scheme fits.
    """
    ends = schemes_of_ends(recipe, source)
    known_ends = {name: schemes[0] for name, (_, schemes) in ends.items() if len(schemes) == 1}
    if recipe.bits is None:
        return Chosen(linears=schemes_of(recipe, source), ends=known_ends)
    schemes = recipe.candidate_schemes()
    known = {name: row["schemes"] for name, row in measured.rows.items()}
    losses = _smoothed(known)
    if recipe.fuses:
        units = allocate.fused_units(list(known), experts=True)
    elif recipe.written_format() == "gguf":
        units = allocate.stacked_units(list(known))
    else:
        units = {name: [name] for name in known}
    sizes = {name: source.model.get_parameter(f"{name}.weight").numel() for name in [*known, *measured.ends]}
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
    choices |= {
        name: {
            scheme: allocate.Option(bits=float(round(row["bits_per_weight"] * sizes[name])), loss=row["predicted_kl"])
            for scheme, row in own.items()
        }
        for name, own in measured.ends.items()
    }
    budget = float(math.floor(recipe.bits * sum(sizes.values()) + 1e-3))  # bits are whole, and an average copied from a report is enough
    by_unit = allocate.least_loss(choices, budget)
    report: dict[str, Any] = {
        "bits": recipe.bits,
        "schemes": list(schemes),
        "predicted_kl": sum(choices[unit][scheme].loss for unit, scheme in by_unit.items()),
    }
    shapes = {name: source.model.get_parameter(f"{name}.weight").shape for name in measured.ends}
    uniform: dict[str, float] = {}
    for scheme in schemes:
        beside = {name: recipe.usual_end(ends[name][0].role, scheme, *shape) for name, shape in shapes.items()}
        if None not in beside.values():
            taken = [options[beside.get(unit) or scheme] for unit, options in choices.items()]
            if sum(option.bits for option in taken) <= budget:
                uniform[scheme] = sum(option.loss for option in taken)
    if uniform:
        best = min(uniform, key=uniform.__getitem__)
        report["uniform"] = {"scheme": best, "predicted_kl": uniform[best]}
    return Chosen(
        linears={
            name: recipe.fitting(by_unit[unit], width_of(recipe, source, name)) for unit, members in units.items() for name in members
        },
        ends=known_ends | {name: by_unit[name] for name in measured.ends},
        report=report,
    )


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
