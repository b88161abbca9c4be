"""One vec convention: row-major, `kron(H_out, H_in)`; and the LDL identity that feedback rests on."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from laws.problems import draw, random_problem
from roundel.linalg.ldl import ldl
from roundel.types import KroneckerFactors

sizes = st.integers(1, 9)
seeds = st.integers(0, 10_000)


@given(d_out=sizes, d_in=sizes, seed=seeds)
@settings(max_examples=30, deadline=None)
def test_kron_acts_on_the_row_major_vec(d_out: int, d_in: int, seed: int) -> None:
    problem, W = random_problem(d_out, d_in, seed=seed), draw(d_out, d_in, seed=seed + 2)
    H_out, H_in = problem.H_out, problem.H_in
    torch.testing.assert_close(torch.kron(H_out, H_in) @ W.flatten(), (H_out @ W @ H_in).flatten())


@given(d_out=sizes, d_in=sizes, seed=seeds)
@settings(max_examples=30, deadline=None)
def test_loss_is_the_dense_quadratic_form(d_out: int, d_in: int, seed: int) -> None:
    problem, E = random_problem(d_out, d_in, seed=seed), draw(d_out, d_in, seed=seed + 7)
    dense = 0.5 * E.flatten() @ torch.kron(problem.H_out, problem.H_in) @ E.flatten()
    assert problem.loss(E) == pytest.approx(dense.item(), rel=1e-10)


@given(d_out=sizes, d_in=sizes, seed=seeds)
@settings(max_examples=30, deadline=None)
def test_loss_is_diagonal_after_both_triangular_factors(d_out: int, d_in: int, seed: int) -> None:
    problem, E = random_problem(d_out, d_in, seed=seed), draw(d_out, d_in, seed=seed + 7)
    D_out, D_in = ldl(problem.H_out)[1], ldl(problem.H_in)[1]
    eta = problem.L_out.T @ E @ problem.L_in
    assert problem.loss(E) == pytest.approx(0.5 * (D_out[:, None] * D_in * eta**2).sum().item(), rel=1e-8)


@given(d_out=sizes, d_in=sizes, seed=seeds, size=st.floats(1e-6, 1e6))
@settings(max_examples=30, deadline=None)
def test_normalised_factors_keep_the_trace(d_out: int, d_in: int, seed: int, size: float) -> None:
    problem = random_problem(d_out, d_in, seed=seed)
    factors = KroneckerFactors.normalised(3.0 * problem.H_out, size * problem.H_in, trace=size)
    assert factors.H_out.diagonal().mean().item() == pytest.approx(1)
    assert factors.H_in.diagonal().mean().item() == pytest.approx(1)
    dense = factors.scale * torch.kron(factors.H_out, factors.H_in)
    assert torch.trace(dense).item() == pytest.approx(size)


@pytest.mark.parametrize("trace", [0.0, float("nan"), float("inf")])
def test_an_unusable_trace_gives_scale_zero(trace: float) -> None:
    factors = KroneckerFactors.normalised(torch.eye(2), torch.eye(3), trace=trace)
    assert factors.scale == 0


def test_a_loss_that_float32_does_not_hold_is_formed_in_float64() -> None:
    factors = KroneckerFactors(H_out=torch.eye(2), H_in=torch.eye(3), scale=1e-3)
    E = torch.full((2, 3), 1e30)
    assert factors.loss(E) == pytest.approx(0.5e-3 * 6e60, rel=1e-6)
