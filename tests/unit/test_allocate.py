"""The allocation of bits against all assignments; units that engines fuse."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roundel.errors import NumericalError, SchemeError
from roundel.rounding.allocate import Option, fused_units, least_loss

SCHEMES = ("low", "middle", "high")
losses = st.floats(1e-9, 1e2)
units = st.lists(st.tuples(losses, losses, losses, st.integers(1, 5)), min_size=1, max_size=5)


def options_of(drawn: list[tuple[float, float, float, int]]) -> dict[str, dict[str, Option]]:
    return {
        f"unit{k}": {
            scheme: Option(bits=float(size * bits * 64), loss=loss) for scheme, bits, loss in zip(SCHEMES, (2, 3, 5), own, strict=True)
        }
        for k, (*own, size) in enumerate(drawn)
    }


@given(drawn=units, part=st.floats(0.4, 1.0))
@settings(max_examples=60, deadline=None)
def test_no_assignment_within_the_budget_loses_less(drawn: list[tuple[float, float, float, int]], part: float) -> None:
    options = options_of(drawn)
    budget = part * sum(own["high"].bits for own in options.values())
    found = least_loss(options, budget)
    bits = sum(options[unit][scheme].bits for unit, scheme in found.items())
    loss = sum(options[unit][scheme].loss for unit, scheme in found.items())
    assert list(found) == list(options)
    assert bits <= budget
    feasible = []
    for schemes in product(SCHEMES, repeat=len(options)):
        chosen = [own[scheme] for own, scheme in zip(options.values(), schemes, strict=True)]
        if sum(option.bits for option in chosen) <= budget:
            feasible.append(sum(option.loss for option in chosen))
    assert loss <= min(feasible) * (1 + 1e-5)


def by_dynamic_programming(options: dict[str, dict[str, Option]], budget: int) -> float:
    """The least loss for whole bits: the best of each number of bits, unit by unit."""
    best = np.zeros(budget + 1)
    for schemes in options.values():
        following = np.full(budget + 1, np.inf)
        for option in schemes.values():
            bits = int(option.bits)
            following[bits:] = np.minimum(following[bits:], best[: budget + 1 - bits] + option.loss)
        best = following
    return float(best[-1])


@pytest.mark.parametrize("decades", [0, 3, 6])
@pytest.mark.parametrize("seed", range(3))
def test_a_scheme_that_loses_very_much_does_not_blur_the_rest(decades: int, seed: int) -> None:
    """60 units as models have them: losses over decades, and one unit that a low scheme would ruin."""
    random, options = np.random.default_rng(seed), {}
    for k in range(60):
        size, loss = int(random.integers(1, 12)), 10 ** random.uniform(-decades, 0)
        options[f"unit{k}"] = {
            f"s{b}": Option(bits=float(size * b), loss=loss * 6.0**-b * random.uniform(0.9, 1.1) * (1e6 * 99.0**-b + 1 if k == 0 else 1))
            for b in range(1, 9)
        }
    budget = int(random.uniform(4, 6) * sum(own["s1"].bits for own in options.values()))
    found = least_loss(options, float(budget))
    assert sum(options[unit][scheme].bits for unit, scheme in found.items()) <= budget
    loss = sum(options[unit][scheme].loss for unit, scheme in found.items())
    assert loss == pytest.approx(by_dynamic_programming(options, budget), rel=1e-5)


@given(missing=st.integers(0, 3), size=st.integers(3, 2**40), count=st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_a_budget_is_kept_to_the_last_bit(missing: int, size: int, count: int) -> None:
    options = {f"unit{k}": {"low": Option(bits=2.0 * size, loss=1.0), "high": Option(bits=3.0 * size, loss=0.1)} for k in range(count)}
    found = least_loss(options, 3.0 * size * count - missing)
    high = sum(scheme == "high" for scheme in found.values())
    assert high == count - -(-missing // size)


def test_losses_that_are_all_alike_take_any_scheme_that_fits() -> None:
    options = {name: {"low": Option(bits=2.0, loss=1.0), "high": Option(bits=3.0, loss=1.0)} for name in "abc"}
    for budget in (6.0, 7.5, 9.0, 100.0):
        assert sum(options[name][scheme].bits for name, scheme in least_loss(options, budget).items()) <= budget
    zero = {name: {"low": Option(bits=2.0, loss=0.0), "high": Option(bits=3.0, loss=0.0)} for name in "abc"}
    assert set(least_loss(zero, 6.0)) == set("abc")


def test_a_loss_that_is_not_finite_is_refused() -> None:
    with pytest.raises(NumericalError, match="not finite"):
        least_loss({"a": {"low": Option(bits=2.0, loss=float("nan"))}}, 5.0)


def test_the_bits_go_where_they_save_most() -> None:
    cheap = {"low": Option(bits=2.0, loss=1.0), "high": Option(bits=3.0, loss=0.9)}
    dear = {"low": Option(bits=2.0, loss=10.0), "high": Option(bits=3.0, loss=1.0)}
    assert least_loss({"a": cheap, "b": dear}, 5.0) == {"a": "low", "b": "high"}
    assert least_loss({"a": cheap, "b": dear}, 6.0) == {"a": "high", "b": "high"}


def test_a_budget_below_the_smallest_schemes_is_refused() -> None:
    with pytest.raises(SchemeError, match="ask for more bits"):
        least_loss(options_of([(1.0, 1.0, 1.0, 1)]), 100.0)


def test_linears_that_engines_fuse_are_one_unit() -> None:
    names = [f"model.layers.{k}.{name}" for k in range(2) for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")]
    names += [
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.mlp.up_proj",
        "transformer.h.0.attn.c_attn",
    ]
    names += ["model.layers.0.experts.0.w1", "model.layers.0.experts.0.w3", "model.layers.0.experts.0.w2"]
    found = fused_units(names)
    assert sorted(name for members in found.values() for name in members) == sorted(names)
    assert {len(members) for members in found.values()} == {1, 2, 3}
    assert found["model.layers.1.self_attn.q_proj"] == [n for n in names if ".1.self_attn" in n]
    assert found["model.layers.0.mlp.gate_proj"] == ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"]
    assert found["model.layers.0.experts.0.w1"] == ["model.layers.0.experts.0.w1", "model.layers.0.experts.0.w3"]
