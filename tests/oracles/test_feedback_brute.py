"""Feedback against its definition written as loops; descent against all codes of tiny problems."""

from functools import partial
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from laws.problems import loss, of, random_problem, scales_for
from roundel.grids import Grid, Scales, parse_scheme
from roundel.rounding import feedback, round_weight, sweep
from roundel.rounding.descent import sweep_rows, sweep_waves
from roundel.rounding.feedback import feedback_waves
from roundel.types import RoundingProblem

seeds = st.integers(0, 10_000)


def naive_feedback(problem: RoundingProblem, grid: Grid, scales: Scales) -> Tensor:
    """`W_hat = Q(W + L_out^T E L_in - E)`, the fixed point of YAQA's equation 8, entry by entry from the last to the first."""
    W, L_out, L_in = problem.W.tolist(), problem.L_out.tolist(), problem.L_in.tolist()
    d_out, d_in = len(W), len(W[0])
    step = grid.affine(scales, problem.shape, torch.float64)[0].tolist()
    low, high = grid.code_range
    E = [[0.0] * d_in for _ in range(d_out)]
    codes = [[0] * d_in for _ in range(d_out)]
    for i in range(d_out - 1, -1, -1):
        for j in range(d_in - 1, -1, -1):
            target = W[i][j]
            for k in range(i, d_out):
                for m in range(j, d_in):
                    if (k, m) != (i, j):
                        target += L_out[k][i] * E[k][m] * L_in[m][j]
            codes[i][j] = min(max(round(target / step[i][j]), low), high)
            E[i][j] = W[i][j] - codes[i][j] * step[i][j]
    return torch.tensor(codes, dtype=torch.int8)


@pytest.mark.parametrize("implementation", [feedback, feedback_waves])
@given(
    d_out=st.integers(1, 9), d_in=st.sampled_from([4, 8, 12]), scheme=st.sampled_from(["int2-g4", "int3-channel", "int8-g2"]), seed=seeds
)
@settings(max_examples=15, deadline=None)
def test_feedback_equals_the_naive_loops(implementation, d_out: int, d_in: int, scheme: str, seed: int) -> None:
    grid, problem = parse_scheme(scheme), random_problem(d_out, d_in, seed=seed)
    scales = scales_for(problem, grid)
    assert torch.equal(implementation(problem, grid, scales), naive_feedback(problem, grid, scales))


def converged(problem: RoundingProblem, grid: Grid, scales: Scales, implementation=sweep) -> Tensor:
    codes = feedback(problem, grid, scales)
    for _ in range(50):
        following = implementation(problem, grid, scales, codes)
        if torch.equal(following, codes):
            return codes
        codes = following
    raise AssertionError("50 sweeps did not converge")


@pytest.mark.parametrize("implementation", [sweep, sweep_rows, partial(sweep_waves, tile=(2, 2))], ids=["sweep", "rows", "waves"])
@given(shape=st.sampled_from([(2, 2), (2, 3), (5, 4)]), width=st.integers(2, 4), seed=seeds)
@settings(max_examples=15, deadline=None)
def test_descent_ends_where_no_single_code_lowers_the_loss(implementation, shape: tuple[int, int], width: int, seed: int) -> None:
    grid, problem = parse_scheme(f"int{width}-channel"), random_problem(*shape, seed=seed, damping=0.02)
    scales = scales_for(problem, grid)
    codes = converged(problem, grid, scales, implementation)
    least = loss(problem, grid, of(grid, codes=codes, scales=scales))
    low, high = grid.code_range
    for i, j, q in product(range(shape[0]), range(shape[1]), range(low, high + 1)):
        changed = codes.clone()
        changed[i, j] = q
        assert loss(problem, grid, of(grid, codes=changed, scales=scales)) >= least * (1 - 1e-10)


def all_losses(problem: RoundingProblem, grid: Grid, scales: Scales) -> Tensor:
    """The losses of all code matrices."""
    d_out, d_in = problem.W.shape
    low, high = grid.code_range
    codes = torch.cartesian_prod(*[torch.arange(low, high + 1)] * (d_out * d_in)).double()
    E = problem.W.flatten() - codes * grid.affine(scales, problem.shape, torch.float64)[0].flatten()
    return 0.5 * ((E @ torch.kron(problem.H_out, problem.H_in)) * E).sum(1)


def test_descent_comes_close_to_the_best_of_all_codes() -> None:
    grid, ratios = parse_scheme("int2-channel"), []
    for seed in range(40):
        problem = random_problem(2, 3, seed=seed, damping=0.02)
        scales = scales_for(problem, grid)
        losses = all_losses(problem, grid, scales)
        fed = loss(problem, grid, of(grid, codes=feedback(problem, grid, scales), scales=scales))
        descended = loss(problem, grid, of(grid, codes=converged(problem, grid, scales), scales=scales))
        assert losses.min() <= descended * (1 + 1e-10)
        assert descended <= fed * (1 + 1e-10)
        assert descended <= losses.quantile(0.02)  # better than 98 % of all codes
        ratios.append(descended / losses.min().item())
    assert torch.tensor(ratios).median() < 1.05
    assert torch.tensor(ratios).mean() < 1.5


def test_sweeps_after_feedback_recover_the_optimum_of_one_row() -> None:
    """With one row and one group the refit and the sweeps end at least as low as the enumeration for the first scale."""
    grid, wins = parse_scheme("int3-channel"), 0
    for seed in range(20):
        problem = random_problem(1, 4, seed=seed)
        best = all_losses(problem, grid, scales_for(problem, grid)).min().item()
        wins += round_weight(problem, grid, sweeps=10, scale_dtype=torch.float32).trace[-1] <= best * (1 + 1e-6)
    assert wins >= 14
