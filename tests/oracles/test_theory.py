"""What the method rests on, on random problems: depth of feedback, its fixed point, YAQA's bound, and the descent of `J`."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from laws.problems import covariance, draw
from roundel.grids import ScalarGrid, parse_scheme
from roundel.linalg.dependency import structural_nilpotence, waves
from roundel.linalg.ldl import ldl
from roundel.rounding.feedback import feedback_waves
from roundel.types import RoundingProblem
from unit.test_dependency import sparse_unit_lower


def ldl_of(H: Tensor) -> tuple[Tensor, Tensor]:
    found = ldl(H)
    assert found is not None
    return found


def problem_of(W: Tensor, L_out: Tensor, L_in: Tensor) -> RoundingProblem:
    """With `D = I`."""
    D_out, D_in = torch.ones(len(L_out)), torch.ones(len(L_in))
    return RoundingProblem(
        W=W, H_out=L_out @ L_out.T, H_in=L_in @ L_in.T, L_out=L_out, L_in=L_in, D_out=D_out, D_in=D_in, scale=1.0, damping=0.0
    )


# snd(kron(A, B)) = snd(A) + snd(B) - 1, and what it means for rounding


@pytest.mark.parametrize("density", [0.02, 0.1, 0.4])
@pytest.mark.parametrize("seed", range(8))
def test_nilpotence_of_a_kronecker_product(density: float, seed: int) -> None:
    A, B = sparse_unit_lower(7 + seed, seed, density), sparse_unit_lower(13 - seed, seed + 50, density)
    expected = structural_nilpotence(A) + structural_nilpotence(B) - 1
    assert structural_nilpotence(torch.kron(A, B)) == expected
    assert waves(A, B) == expected


@pytest.fixture(scope="module")
def integers() -> ScalarGrid:
    """Whole numbers from -128 to 127, with scales of 1."""
    return parse_scheme("int8-channel")


@pytest.mark.parametrize("density", [0.03, 0.1, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_the_fixed_point_iteration_settles_within_the_degree_on_the_feedback(integers: ScalarGrid, density: float, seed: int) -> None:
    d_out, d_in = 9, 12
    L_out, L_in = (0.3 * sparse_unit_lower(d, seed + d, density) + 0.7 * torch.eye(d, dtype=torch.float64) for d in (d_out, d_in))
    W, scales = 10 * draw(d_out, d_in, seed=seed), torch.ones(d_out, 1)
    expected = feedback_waves(problem_of(W, L_out, L_in), integers, {"scale": scales}).double()
    degree = structural_nilpotence(torch.kron(L_out, L_in))
    W_hat, steps = draw(d_out, d_in, seed=seed + 100), 0  # from anywhere, not even from the grid
    while steps < degree:
        E = W - W_hat
        W_hat, steps = integers.encode(W + L_out.T @ E @ L_in - E, torch.ones_like(W)).double(), steps + 1
    assert torch.equal(W_hat, expected)
    eta = L_out.T @ (W - W_hat) @ L_in
    assert eta.abs().max() <= 0.5 + 1e-9
    if density < 1:
        assert degree < d_out + d_in - 1


def test_one_step_less_than_the_degree_is_not_enough(integers: ScalarGrid) -> None:
    """A chain whose every link passes a full unit on: the bound is attained."""
    d = 8
    L = torch.eye(d, dtype=torch.float64) + torch.diag(torch.ones(d - 1, dtype=torch.float64), -1)
    W = torch.zeros(1, d, dtype=torch.float64)
    expected = feedback_waves(problem_of(W, torch.ones(1, 1, dtype=torch.float64), L), integers, {"scale": torch.ones(1, 1)}).double()
    W_hat = torch.full_like(W, 3.0)
    settled = []
    for _ in range(structural_nilpotence(L)):
        E = W - W_hat
        W_hat = integers.encode(W + E @ L - E, torch.ones_like(W)).double()
        settled.append(torch.equal(W_hat, expected))
    assert settled == [False] * (d - 1) + [True]


# E^T F E <= |F| (|E|^2 sqrt(2 - 2 c) + tr(D_out) tr(D_in) sigma^2 / (|H_out| |H_in|)): YAQA, Theorem 1

WORST = 0.25
"""Of the squared error of nearest rounding to whole numbers."""


def bound(F: Tensor, H_out: Tensor, H_in: Tensor, E: Tensor) -> float:
    K, norm = torch.kron(H_out, H_in), torch.linalg.norm(F)
    cosine = ((F * K).sum() / norm / torch.linalg.norm(K)).clamp(max=1)
    pivots = ldl_of(H_out)[1].sum() * ldl_of(H_in)[1].sum()
    return (norm * (E.square().sum() * (2 - 2 * cosine).sqrt() + pivots * WORST / torch.linalg.norm(K))).item()


def rounded_error(integers: ScalarGrid, W: Tensor, H_out: Tensor, H_in: Tensor) -> Tensor:
    problem = problem_of(W, ldl_of(H_out)[0], ldl_of(H_in)[0])
    return W - feedback_waves(problem, integers, {"scale": torch.ones(len(W), 1)}).double()


@pytest.mark.parametrize("sequences", [8, 60, 2000])
@pytest.mark.parametrize("seed", range(4))
def test_the_loss_of_feedback_is_within_the_bound(integers: ScalarGrid, sequences: int, seed: int) -> None:
    d_out, d_in = 6, 8
    mix_out, mix_in = covariance(d_out, seed) + 0.05 * torch.eye(d_out), covariance(d_in, seed + 40) + 0.05 * torch.eye(d_in)
    G = mix_out @ draw(sequences, d_out, d_in, seed=seed) @ mix_in
    F = G.flatten(1).T @ G.flatten(1) / sequences
    H_out, H_in = (G @ G.mT).mean(0), (G.mT @ G).mean(0)
    for k in range(10):
        E = rounded_error(integers, 8 * draw(d_out, d_in, seed=10 * seed + k), H_out, H_in)
        assert E.flatten() @ F @ E.flatten() <= bound(F, H_out, H_in, E) * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_for_an_exact_product_the_bound_is_sharp_and_nearest_rounding_breaks_it(integers: ScalarGrid, seed: int) -> None:
    """Then the loss is `sum_ij D_out,i D_in,j eta_ij^2`: about a third of the bound, as `eta` is uniform in +-1/2."""
    d_out, d_in = 10, 14
    H_out, H_in = (covariance(d, seed + d) + 0.01 * torch.eye(d) for d in (d_out, d_in))
    F, W = torch.kron(H_out, H_in), 8 * draw(20, d_out, d_in, seed=seed)
    fed_back, nearest, limit = 0.0, 0.0, 0.0
    for weight in W:
        E, plain = rounded_error(integers, weight, H_out, H_in), weight - weight.round()
        loss = (E.flatten() @ F @ E.flatten()).item()
        limit_here = bound(F, H_out, H_in, torch.zeros_like(E))  # with a cosine of 1 the first term is 0
        assert loss <= limit_here
        fed_back, nearest, limit = fed_back + loss, nearest + (plain.flatten() @ F @ plain.flatten()).item(), limit + limit_here
    assert fed_back > 0.25 * limit
    assert nearest > 1.5 * limit


# J(A, B) = E |A^-1 G B^-T|^2: exact updates of one side at a time


def j(G: Tensor, A: Tensor, B: Tensor) -> float:
    left = torch.linalg.solve_triangular(A, G, upper=False, unitriangular=True)
    return torch.linalg.solve_triangular(B, left.mT, upper=False, unitriangular=True).square().sum().item() / len(G)


def best_rows(G: Tensor, B: Tensor) -> Tensor:
    """The minimiser over `A`: the unit lower factor of `E[G (B B^T)^-1 G^T]`."""
    right = torch.linalg.solve_triangular(B, G.mT, upper=False, unitriangular=True)
    return ldl_of((right.mT @ right).mean(0))[0]


@pytest.mark.parametrize("seed", range(4))
def test_exact_updates_of_one_side_at_a_time_never_raise_j_and_are_minimisers(seed: int) -> None:
    d_out, d_in, sequences = 7, 10, 50
    G = covariance(d_out, seed) @ draw(sequences, d_out, d_in, seed=seed) @ covariance(d_in, seed + 40) + 0.1 * draw(
        sequences, d_out, d_in, seed=seed + 7
    )
    A, B = torch.eye(d_out, dtype=torch.float64), torch.eye(d_in, dtype=torch.float64)
    values = [j(G, A, B)]
    assert values[0] == pytest.approx(G.square().sum().item() / sequences)
    for _ in range(6):
        A = best_rows(G, B)
        values.append(j(G, A, B))
        for k in range(20):
            for size in (1e-3, 0.1, 1.0):
                assert j(G, A + size * draw(d_out, d_out, seed=k).tril(-1), B) > values[-1]
        B = best_rows(G.mT, A)
        values.append(j(G, A, B))
        for k in range(20):
            for size in (1e-3, 0.1, 1.0):
                assert j(G, A, B + size * draw(d_in, d_in, seed=k).tril(-1)) > values[-1]
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in pairwise(values))
    assert values[1] < 0.7 * values[0]
    assert values[2] < 0.95 * values[1]
    assert values[-1] > 0.99 * values[-3]  # converged
