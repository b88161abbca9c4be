"""Prefix-aware targets against a dense ridge regression in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from laws.problems import draw
from roundel.errors import NumericalError
from roundel.rounding.prefix import Moments, Strengths
from roundel.types import GroupedFactors, KroneckerFactors

D_IN, D_OUT, TOKENS = 12, 7, 200
DAMPING = 0.03


def paths(seed: int = 0) -> dict[str, Tensor]:
    """Correlated inputs, what errors before them have made of these, and an error of the stream that they can explain in part."""
    x = draw(TOKENS, D_IN, seed=seed) @ (torch.eye(D_IN) + 0.3 * draw(D_IN, D_IN, seed=seed + 1))
    xq = x + 0.2 * draw(TOKENS, D_IN, seed=seed + 2) @ draw(D_IN, D_IN, seed=seed + 3)
    stream = 0.3 * draw(TOKENS, D_OUT, seed=seed + 4) + xq @ draw(D_IN, D_OUT, seed=seed + 5)
    return {"x": x, "xq": xq, "stream": stream, "W": draw(D_OUT, D_IN, seed=seed + 7)}


def moments(known: dict[str, Tensor], strengths: Strengths, parts: int = 1) -> Moments:
    """Of one linear that is added to the stream and one that is not."""
    W = known["W"].float()
    found = Moments({"added": W, "plain": W}, {"added"}, strengths)
    x, xq, stream = (known[name].float() for name in ("x", "xq", "stream"))
    for rows in torch.arange(TOKENS).tensor_split(parts):
        found.add(x[rows], xq[rows], {"added": stream[rows]})
    found.settle()
    return found


def targets(known: dict[str, Tensor], strengths: Strengths, parts: int = 1) -> dict[str, Tensor]:
    return moments(known, strengths, parts).targets(["added", "plain"])


def ridge(known: dict[str, Tensor], wanted: Tensor) -> Tensor:
    """The `V` nearest to `W` that gives `wanted` from `xq`: `min sum |wanted - V xq|^2 + lambda |V - W|^2`, by least squares."""
    W, xq = known["W"], known["xq"]
    penalty = DAMPING * xq.square().sum(0).mean()
    rows = torch.cat([xq, penalty.sqrt() * torch.eye(D_IN, dtype=torch.float64)])
    left = torch.cat([wanted - xq @ W.T, torch.zeros(D_IN, D_OUT, dtype=torch.float64)])
    return W + torch.linalg.lstsq(rows, left).solution.T


@pytest.mark.parametrize("parts", [1, 7])
def test_whole_corrections_are_the_ridge_regression(parts: int) -> None:
    known = paths()
    found = targets(known, Strengths(prefix=1.0, stream=1.0, damping=DAMPING), parts)
    outputs = known["x"] @ known["W"].T
    for name, wanted in (("added", outputs + known["stream"]), ("plain", outputs)):
        expected = ridge(known, wanted)
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-3, atol=1e-4)
        loss = [(wanted - known["xq"] @ V.T).square().sum() for V in (found[name].double(), known["W"])]
        assert loss[0] < 0.5 * loss[1]


@pytest.mark.parametrize(("s", "t"), [(0.5, 0.0), (0.0, 0.25), (0.4, 0.3)])
def test_strengths_take_so_much_of_each_correction(s: float, t: float) -> None:
    known = paths(10)
    W, found = known["W"], targets(known, Strengths(prefix=s, stream=t, damping=DAMPING))
    outputs = known["x"] @ W.T
    of_prefix = ridge(known, outputs) - W
    of_stream = ridge(known, outputs + known["stream"]) - W - of_prefix
    torch.testing.assert_close(found["added"].double(), W + s * of_prefix + t * of_stream, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found["plain"].double(), W + s * of_prefix, rtol=1e-3, atol=1e-4)


def test_strengths_of_zero_and_equal_paths_leave_the_weight() -> None:
    known = paths(20)
    W = known["W"].float()
    for value in targets(known, Strengths(prefix=0.0, stream=0.0, damping=DAMPING)).values():
        assert torch.equal(value, W)
    same = {**known, "xq": known["x"], "stream": torch.zeros_like(known["stream"])}
    for value in targets(same, Strengths(prefix=1.0, stream=1.0, damping=DAMPING)).values():
        assert torch.equal(value, W)


def test_linears_that_are_all_added_keep_no_square_of_differences_and_weights_may_be_in_sixteen_bits() -> None:
    known = paths(30)
    strengths = Strengths(prefix=0.7, stream=0.0, damping=DAMPING)
    W = known["W"].to(torch.bfloat16)
    own = Moments({"added": W}, {"added"}, strengths)
    own.add(known["x"].float(), known["xq"].float(), {"added": known["stream"].float()})
    own.settle()
    assert [tuple(total.shape) for total in own.sums()] == [(D_IN, D_IN), (D_OUT, D_IN)]
    found = own.targets(["added"])["added"]
    assert found.dtype == torch.float32
    expected = targets({**known, "W": W.double()}, strengths)["plain"]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_the_input_curvature_is_the_mean_of_both() -> None:
    known = paths(40)
    strengths = Strengths(prefix=1.0, stream=1.0, damping=DAMPING)
    own = moments(known, strengths)
    factors = KroneckerFactors(H_out=torch.eye(D_OUT), H_in=2 * torch.eye(D_IN), scale=3.0)
    second = known["xq"].T @ known["xq"]
    expected = (2 * torch.eye(D_IN) + second / second.diagonal().mean()) / 2
    torch.testing.assert_close(own.met(factors).H_in.double(), expected.double(), rtol=1e-5, atol=1e-6)
    grouped = own.met(GroupedFactors(groups=(factors, factors)))
    assert isinstance(grouped, GroupedFactors)
    assert all(torch.equal(group.H_in, own.met(factors).H_in) and group.scale == 3.0 for group in grouped.groups)
    assert Moments({"plain": known["W"]}, (), strengths).met(factors) is factors


def test_moments_that_are_not_finite_are_refused() -> None:
    known = paths(50)
    known["xq"][3, 2] = torch.inf
    with pytest.raises(NumericalError, match="not finite"):
        targets(known, Strengths(prefix=1.0, stream=1.0, damping=DAMPING))
