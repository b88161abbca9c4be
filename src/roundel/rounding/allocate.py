"""Which linears get more bits: one scheme for each, so that the predicted KL is least within a budget of bits.

A multiple-choice knapsack, solved exactly as an integer program by SciPy's HiGHS: binary `z_us`, one scheme for each unit,

    minimise sum_us loss_us z_us    subject to    sum_s z_us = 1,    sum_us bits_us z_us <= budget

Losses of different linears are taken to add up, as second-order predictions do on average (`curvature.predicted_kl` has the interactions).
Some hundred units and ten schemes take milliseconds. A unit is a linear, or those that engines run as one: `fused_units`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from roundel.errors import NumericalError, SchemeError

__all__ = ["Option", "fused_units", "least_loss"]

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
"""Linears of one parent that serving engines run as one product, so that they must share a scheme."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """What one scheme costs a unit."""

    bits: float
    loss: float
    """Predicted KL, nats per token."""


def least_loss(options: Mapping[str, Mapping[str, Option]], budget: float) -> dict[str, str]:
    """The scheme of each unit.

    Args:
        options: For each unit its schemes.
        budget: Bits, in total.

    Raises:
        SchemeError: even the fewest bits of every unit are more than the budget.
    """
    flat = [(unit, scheme, option) for unit, schemes in options.items() for scheme, option in schemes.items()]
    fewest = sum(min(option.bits for option in schemes.values()) for schemes in options.values())
    if fewest > budget:
        raise SchemeError(
            f"the smallest schemes take {fewest / 8:.0f} bytes, the budget is {budget / 8:.0f}: ask for more bits or give smaller schemes"
        )
    bits = np.array([option.bits for *_, option in flat])
    losses = np.array([option.loss for *_, option in flat])
    if not np.isfinite(losses).all():
        raise NumericalError("a scheme's predicted KL is not finite")
    one_each = np.array([[float(unit == own) for own, *_ in flat] for unit in options])
    # both rows and the objective scaled to about 1, where the solver's tolerances mean something
    found = milp(
        losses / max(losses.max(), np.finfo(float).tiny),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(bits[None] / budget, -np.inf, 1)],
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 1e-6},
    )
    if found.x is None:
        raise NumericalError(f"the allocation of bits has no solution: {found.message}")
    return {unit: scheme for (unit, scheme, _), taken in zip(flat, found.x, strict=True) if taken > 0.5}


def fused_units(names: Sequence[str]) -> dict[str, list[str]]:
    """Units of the linears, named after their first member: members of `FUSED` under one parent together, all others by themselves."""
    units: dict[tuple[str, str], list[str]] = {}
    for name in names:
        parent, _, own = name.rpartition(".")
        family = next((family[0] for family in FUSED if own in family), own)
        units.setdefault((parent, family), []).append(name)
    return {members[0]: members for members in units.values()}
