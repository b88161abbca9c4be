"""The choice between roundings of one linear: the first, unless another is significantly better."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from laws.problems import draw
from roundel.curvature import choose
from roundel.curvature.choose import LEVEL


def with_moments(mean: float, stderr: float, count: int = 16) -> Tensor:
    """Values with exactly this mean and this standard error of it."""
    values = draw(count, seed=0)
    values = (values - values.mean()) / values.std()
    return mean + stderr * math.sqrt(count) * values


SPREAD = 100 + 30 * draw(16, seed=1)
"""What sequences have in common: ten times the differences that matter."""


def test_without_evidence_the_first_stands() -> None:
    better = SPREAD - with_moments(1, 0.6)
    assert better.mean() < SPREAD.mean()
    assert choose({"first": SPREAD, "other": better}) == "first"
    assert choose({"other": better, "first": SPREAD}) == "other"


@pytest.mark.parametrize(
    ("gain", "stderr", "expected"), [(1, 0.446, "first"), (1, 0.442, "other"), (-1, 0.01, "first"), (0, 0.01, "first")]
)
def test_students_distribution_of_the_paired_difference_decides(gain: float, stderr: float, expected: str) -> None:
    other = SPREAD - with_moments(gain, stderr)
    assert LEVEL == 0.02  # 2.25 standard errors with 16 sequences
    assert choose({"first": SPREAD, "other": other}) == expected


def test_only_the_difference_counts_not_the_spread_of_the_sequences() -> None:
    """The gradients are common to both: unpaired, a gain of 1 % would drown in 30 % of spread."""
    first, other = SPREAD, SPREAD - with_moments(1, 0.1)
    unpaired = math.sqrt((first.var().item() + other.var().item()) / len(first))
    assert (first - other).mean() < unpaired
    assert choose({"first": first, "other": other}) == "other"
    shuffled = other[torch.randperm(16, generator=torch.Generator().manual_seed(0))]
    assert choose({"first": first, "other": shuffled}) == "first"


def test_of_several_that_are_better_the_one_with_the_least_mean() -> None:
    good, best = SPREAD - with_moments(1, 0.1), SPREAD - with_moments(2, 0.1)
    for order in (("good", "best"), ("best", "good")):
        assert choose({"first": SPREAD, **{name: {"good": good, "best": best}[name] for name in order}}) == "best"


def test_the_least_mean_of_all_is_not_taken_if_it_is_not_significant() -> None:
    sure, unsure = SPREAD - with_moments(1, 0.1), SPREAD - with_moments(5, 4)
    assert choose({"first": SPREAD, "unsure": unsure, "sure": sure}) == "sure"


def test_one_sequence_is_no_evidence() -> None:
    assert choose({"first": torch.tensor([1.0]), "other": torch.tensor([1e-9])}) == "first"


def test_equal_predictions_leave_the_first_and_equal_better_ones_the_earlier() -> None:
    assert choose({"first": SPREAD, "same": SPREAD.clone(), "again": SPREAD.clone()}) == "first"
    better = SPREAD - with_moments(1, 0.1)
    assert choose({"first": SPREAD, "one": better, "two": better.clone()}) == "one"
    constant = SPREAD - 1  # no spread of the difference at all
    assert choose({"first": SPREAD, "one": constant}) == "one"


def test_numbers_that_are_none_do_not_win() -> None:
    for bad in (math.nan, math.inf):
        other = SPREAD - 50
        other[3] = bad
        assert choose({"first": SPREAD, "other": other}) == "first"


def test_a_single_candidate_is_taken() -> None:
    assert choose({"only": torch.tensor([math.nan])}) == "only"


@given(factor=st.floats(1e-12, 1e6), seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_the_unit_does_not_matter(factor: float, seed: int) -> None:
    predicted = {name: SPREAD - draw(16, seed=seed + k) - 0.4 * k for k, name in enumerate(("a", "b", "c"))}
    assert choose({name: factor * values for name, values in predicted.items()}) == choose(predicted)
