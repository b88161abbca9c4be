"""Which linears get more bits: one scheme for each, so that the predicted KL is least within a budget of bits.

A multiple-choice knapsack, solved exactly as an integer program by SciPy's HiGHS: binary `z_us`, one scheme for each unit,

    minimise sum_us loss_us z_us    subject to    sum_s z_us = 1,    sum_us bits_us z_us <= budget

Losses of different linears are taken to add up, as second-order predictions do on average (`curvature.predicted_kl` has the interactions).
Some hundred units and ten schemes take milliseconds. A unit is a linear, or those that engines run as one: `fused_units`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from roundel.errors import NumericalError, SchemeError

__all__ = ["Option", "fused_units", "least_loss", "stacked_units"]

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
"""Linears of one parent that serving engines run as one product, so that they must share a scheme."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """What one scheme costs a unit."""

    bits: float
    """Whole, of all its linears."""
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
    if not all(math.isfinite(option.loss) for schemes in options.values() for option in schemes.values()):
        raise NumericalError("a scheme's predicted KL is not finite")
    fewest = sum(min(option.bits for option in schemes.values()) for schemes in options.values())
    if fewest > budget:
        raise SchemeError(
            f"the smallest schemes take {fewest / 8:.0f} bytes, the budget is {budget / 8:.0f}: ask for more bits or give smaller schemes"
        )
    least = {unit: min(option.loss for option in schemes.values()) for unit, schemes in options.items()}
    best: dict[str, str] | None = None
    bound = max(option.loss - least[unit] for unit, schemes in options.items() for option in schemes.values())
    while True:
        # no part of the optimum exceeds the whole of any solution: such options go, and the solver's tolerances are relative to the rest
        kept = {
            unit: {scheme: option for scheme, option in schemes.items() if option.loss - least[unit] <= bound}
            for unit, schemes in options.items()
        }
        found = _solved(kept, least, bound, budget)
        excess = sum(options[unit][scheme].loss - least[unit] for unit, scheme in found.items())
        if best is not None and excess >= bound:
            return best
        best = found
        if excess > bound / 2 or excess == 0:
            return best
        bound = excess


def _solved(options: Mapping[str, Mapping[str, Option]], least: Mapping[str, float], size: float, budget: float) -> dict[str, str]:
    """The program for losses above the least of each unit, in units of `size`; within the budget to the last bit."""
    flat = [(unit, scheme, option) for unit, schemes in options.items() for scheme, option in schemes.items()]
    divisor = math.gcd(*(int(option.bits) for *_, option in flat)) or 1
    bits = np.array([option.bits / divisor for *_, option in flat])
    losses = np.array([(option.loss - least[unit]) / (size or 1.0) for unit, _, option in flat])
    one_each = np.array([[float(unit == own) for own, *_ in flat] for unit in options])
    capacity = float(budget // divisor)
    while True:
        found = milp(
            losses,
            constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(bits[None], -np.inf, capacity)],
            integrality=np.ones(len(flat)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 1e-6},
        )
        if found.x is None:
            raise NumericalError(f"the allocation of bits has no solution: {found.message}")
        taken = found.x > 0.5
        over = bits[taken].sum() - budget // divisor
        if over <= 0:
            return {unit: scheme for (unit, scheme, _), chosen in zip(flat, taken, strict=True) if chosen}
        capacity -= over  # the solver keeps the budget up to its tolerance only


def fused_units(names: Sequence[str], *, experts: bool = False) -> dict[str, list[str]]:
    """Units of the linears, named after their first member: members of `FUSED` under one parent together, all others by themselves.

    With `experts` all experts of a layer are one unit.
    """
    units: dict[tuple[str, str], list[str]] = {}
    for name in names:
        parent, _, own = name.rpartition(".")
        if experts and (found := re.fullmatch(r"(.*\bexperts)\.\d+", parent)) is not None:
            units.setdefault((found[1], ""), []).append(name)
            continue
        family = next((family[0] for family in FUSED if own in family), own)
        units.setdefault((parent, family), []).append(name)
    return {members[0]: members for members in units.values()}


def stacked_units(names: Sequence[str]) -> dict[str, list[str]]:
    """Units of linears where a matrix of all experts of a layer is one tensor, all others by themselves; named as `fused_units`."""
    units: dict[str, list[str]] = {}
    for name in names:
        units.setdefault(re.sub(r"\bexperts\.\d+\.", "experts.", name), []).append(name)
    return {members[0]: members for members in units.values()}
