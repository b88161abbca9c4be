"""What two-sided rounding owes to its special cases, its specification and itself."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from laws.problems import covariance, draw, loss, of, random_problem, scales_for, with_factors
from roundel.errors import NumericalError
from roundel.grids import Grid, parse_scheme
from roundel.linalg.ldl import ldl
from roundel.rounding import feedback, make_problem, nearest, refit_scales, round_weight, sweep
from roundel.rounding import round as rounding_loop
from roundel.rounding.descent import sweep_rows
from roundel.rounding.feedback import feedback_waves
from roundel.rounding.state import State
from roundel.types import KroneckerFactors, RoundingProblem

SCHEMES = ["int2-g4", "int3-channel", "int4-g8", "int8-g2"]
SHAPES = [(1, 8), (8, 16), (33, 24), (64, 64), (65, 128), (131, 72), (40, 200)]
seeds = st.integers(0, 10_000)
schemes = st.sampled_from(SCHEMES)
widths = st.sampled_from([8, 16, 24, 40])


def ldlq(W: Tensor, L_in: Tensor, grid: Grid, step: Tensor) -> Tensor:
    """LDLQ as published: columns from last to first, each shifted by the errors of those after it (QuIP, arXiv 2307.13304)."""
    low, high = grid.code_range
    codes, E = torch.zeros_like(W), torch.zeros_like(W)
    for j in range(W.shape[1] - 1, -1, -1):
        target = W[:, j] + E[:, j + 1 :] @ L_in[j + 1 :, j]
        codes[:, j] = (target / step[:, j]).round().clamp(low, high)
        E[:, j] = W[:, j] - codes[:, j] * step[:, j]
    return codes.to(torch.int8)


def transposed(problem: RoundingProblem) -> RoundingProblem:
    factors = KroneckerFactors(H_out=problem.H_in, H_in=problem.H_out, scale=1.0)
    turned = make_problem(problem.W.T.contiguous(), factors, damping=0.0, dtype=problem.W.dtype)
    assert torch.equal(turned.L_out, problem.L_in)
    return turned


@pytest.mark.parametrize("implementation", [feedback, feedback_waves])
@given(d_out=st.integers(1, 20), d_in=widths, scheme=schemes, seed=seeds)
@settings(max_examples=15, deadline=None)
def test_identity_H_out_is_ldlq(implementation, d_out: int, d_in: int, scheme: str, seed: int) -> None:
    grid = parse_scheme(scheme)
    problem = with_factors(draw(d_out, d_in, seed=seed), torch.eye(d_out, dtype=torch.float64), covariance(d_in, seed), damping=0.05)
    scales = scales_for(problem, grid)
    expected = ldlq(problem.W, problem.L_in, grid, grid.affine(scales, (d_out, d_in), torch.float64)[0])
    assert torch.equal(implementation(problem, grid, scales), expected)


@pytest.mark.parametrize("implementation", [feedback, feedback_waves])
@given(d_out=st.integers(1, 20), d_in=widths, scheme=schemes, seed=seeds)
@settings(max_examples=15, deadline=None)
def test_diagonal_factors_give_nearest_rounding(implementation, d_out: int, d_in: int, scheme: str, seed: int) -> None:
    grid = parse_scheme(scheme)
    H_out, H_in = torch.diag(draw(d_out, seed=seed).abs() + 0.1), torch.diag(draw(d_in, seed=seed + 1).abs() + 0.1)
    problem = with_factors(draw(d_out, d_in, seed=seed + 2), H_out, H_in)
    scales = scales_for(problem, grid)
    codes = implementation(problem, grid, scales)
    assert torch.equal(codes, nearest(problem.W, grid, scales))
    assert torch.equal(sweep(problem, grid, scales, codes), codes)


@pytest.mark.parametrize("implementation", [feedback, feedback_waves])
@given(d_out=st.integers(1, 30), d_in=st.integers(1, 30), width=st.integers(2, 8), seed=seeds)
@settings(max_examples=15, deadline=None)
def test_transposing_the_problem_transposes_the_answer(implementation, d_out: int, d_in: int, width: int, seed: int) -> None:
    grid, problem = parse_scheme(f"int{width}-channel"), random_problem(d_out, d_in, seed=seed)
    step = 4 / 2**width  # one scale everywhere, on both sides
    codes = implementation(problem, grid, {"scale": torch.full((d_out, 1), step)})
    assert torch.equal(implementation(transposed(problem), grid, {"scale": torch.full((d_in, 1), step)}), codes.T)


@given(d_out=st.integers(1, 30), d_in=st.integers(1, 30), seed=seeds)
@settings(max_examples=25, deadline=None)
def test_what_is_left_is_the_grids_own_error(d_out: int, d_in: int, seed: int) -> None:
    grid, problem, step = parse_scheme("int8-channel"), random_problem(d_out, d_in, seed=seed, damping=1.0), 1.0
    codes = feedback(problem, grid, {"scale": torch.full((d_out, 1), step)})
    assert codes.abs().max() < 100  # nothing was clipped
    E = problem.W - codes * step
    eta = problem.L_out.T @ E @ problem.L_in
    assert eta.abs().max() <= step / 2 + 1e-9
    D_out, D_in = ldl(problem.H_out)[1], ldl(problem.H_in)[1]
    assert problem.loss(E) == pytest.approx(0.5 * (D_out[:, None] * D_in * eta**2).sum().item(), rel=1e-8)


def uneven(d: int, seed: int) -> Tensor:
    """A covariance whose diagonal spans orders of magnitude, as activations have it."""
    spread = draw(d, seed=seed + 7).exp()
    return covariance(d, seed) * spread[:, None] * spread


def factors_for(d_out: int, d_in: int, seed: int) -> KroneckerFactors:
    return KroneckerFactors(H_out=uneven(d_out, 4 * seed), H_in=uneven(d_in, 4 * seed + 2), scale=1.0)


@pytest.mark.parametrize("implementation", [feedback, feedback_waves])
@pytest.mark.parametrize("scheme", ["int3-channel", "int3-g4-asym"])
@given(d_out=st.integers(1, 20), d_in=widths, seed=seeds)
@settings(max_examples=15, deadline=None)
def test_an_order_is_that_of_the_reordered_problem(implementation, scheme: str, d_out: int, d_in: int, seed: int) -> None:
    """Codes lie where they did, and the largest diagonal is decided first: feedback begins at the end."""
    grid, W, factors = parse_scheme(scheme), draw(d_out, d_in, seed=seed), factors_for(d_out, d_in, seed)
    problem = make_problem(W, factors, damping=0.1, dtype=torch.float64, ordered=True)
    rows, columns = problem.order
    assert (problem.H_in.diagonal()[columns].diff() >= 0).all()
    natural = make_problem(W, factors, damping=0.1, dtype=torch.float64)
    assert torch.equal(problem.H_in, natural.H_in)
    scales = scales_for(problem, grid)
    codes = implementation(problem, grid, scales)
    E = W - grid.dequantize(codes, scales, (d_out, d_in), torch.float64)
    eta = problem.L_out.T @ E[rows][:, columns] @ problem.L_in
    D_out = ldl(problem.H_out[rows][:, rows])[1]
    assert problem.loss(E) == pytest.approx(0.5 * (D_out[:, None] * problem.D_in[columns] * eta**2).sum().item(), rel=1e-8)
    if scheme == "int3-channel":
        reordered = with_factors(W[rows][:, columns], problem.H_out[rows][:, rows], problem.H_in[columns][:, columns], damping=0.0)
        assert torch.equal(implementation(reordered, grid, {"scale": scales["scale"][rows]}), codes[rows][:, columns])


def test_the_order_and_what_errors_cost_after_feedback_lower_the_loss() -> None:
    """Geometric mean over 20 problems, of feedback with the same scales and of the whole rounding: .67 and .89 of the natural order's."""
    grid, W = parse_scheme("int3-g8"), draw(24, 48, seed=0)
    fed, swept = [], []
    for seed in range(20):
        factors = factors_for(24, 48, seed)
        both = [make_problem(W, factors, damping=0.1, dtype=torch.float64, ordered=ordered) for ordered in (True, False)]
        scales = scales_for(both[1], grid)
        fed.append([loss(problem, grid, of(grid, codes=feedback(problem, grid, scales), scales=scales)) for problem in both])
        swept.append([round_weight(problem, grid, sweeps=4, scale_dtype=torch.float32).trace[-1] for problem in both])
    for losses, at_most in ((fed, 0.75), (swept, 0.93)):
        with_order, without = torch.tensor(losses).log().mean(0).exp().tolist()
        assert with_order < at_most * without


def by_rows(problem: RoundingProblem, grid: Grid, kept: dict[str, Tensor] | None = None) -> State:
    return rounding_loop._ended(rounding_loop._by_rows(problem, grid, torch.float32, kept, refits=kept is None, H_in=None))


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("size", [1, 7, 64])
@pytest.mark.parametrize("scheme", ["int3-g8", "int2-channel", "int3-g8-asym", "nvfp4"])
def test_blocks_of_rows_that_are_not_swept_are_the_feedback(scheme: str, size: int, ordered: bool, monkeypatch) -> None:
    monkeypatch.setitem(rounding_loop.ROWS, "cpu", size)
    monkeypatch.setattr(rounding_loop, "SWEEPS", 0)
    grid, factors = parse_scheme(scheme), factors_for(40, 48, 1)
    problem = make_problem(draw(40, 48, seed=2), factors, damping=0.1, dtype=torch.float64, ordered=ordered)
    scales = scales_for(problem, grid)
    state = by_rows(problem, grid, scales)
    assert torch.equal(state.codes, feedback(problem, grid, scales))
    assert all(torch.equal(state.scales[name], scale) for name, scale in scales.items())


@pytest.mark.parametrize("scheme", ["int3-g8", "int3-channel", "int2-g8-asym", "nvfp4", "int4-tensor"])
def test_what_blocks_of_rows_lose_is_what_the_weight_loses(scheme: str, monkeypatch) -> None:
    """Each block's loss is what it costs after all that follow have made up for it as well as real numbers could."""
    lost: list[float] = []
    swept = rounding_loop._swept

    def noted(*given, **named):
        rounded = yield from swept(*given, **named)
        lost.append(rounded.trace[-1])
        return rounded

    monkeypatch.setitem(rounding_loop.ROWS, "cpu", 11)
    monkeypatch.setattr(rounding_loop, "_swept", noted)
    problem = make_problem(draw(40, 48, seed=2), factors_for(40, 48, 3), damping=0.1, dtype=torch.float64, ordered=True)
    state = by_rows(problem, parse_scheme(scheme))
    assert len(lost) == 4
    assert state.loss == pytest.approx(sum(lost), rel=1e-9)


def test_one_row_is_a_block() -> None:
    problem = random_problem(1, 32, seed=1)
    for scheme in ("nvfp4", "int4-tensor", "int3-g8", "mxfp4"):
        rounded = round_weight(problem, parse_scheme(scheme), sweeps=2, scale_dtype=torch.float32)
        assert rounded.trace[-1] == pytest.approx(loss(problem, parse_scheme(scheme), rounded), rel=1e-9)


@pytest.mark.parametrize("scheme", ["int3-g8", "int4-g8-asym", "nvfp4"])
def test_blocks_of_rows_lower_the_loss(scheme: str, monkeypatch) -> None:
    """Geometric mean over 10 problems after all sweeps: .83 to .85 of what feedback on the whole weight and as many sweeps end with."""
    grid, W, ends = parse_scheme(scheme), draw(96, 48, seed=0), []
    monkeypatch.setitem(rounding_loop.ROWS, "cpu", 16)
    for seed in range(10):
        problem = make_problem(W, factors_for(96, 48, seed), damping=0.1, dtype=torch.float64, ordered=True)
        scales = grid.fit_scales(W, problem.D_in, torch.float32)
        start = State.of(problem, grid, scales, feedback(problem, grid, scales))
        plain = rounding_loop._ended(rounding_loop._swept(problem, grid, 4, start, refitted=range(4), H_in=None))
        ends.append([round_weight(problem, grid, sweeps=4, scale_dtype=torch.float32).trace[-1], plain.trace[-1]])
    blocks, whole = torch.tensor(ends).log().mean(0).exp().tolist()
    assert blocks < 0.9 * whole


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_blocked_kernels_equal_their_specifications(shape: tuple[int, int], scheme: str) -> None:
    grid, problem = parse_scheme(scheme), random_problem(*shape, seed=shape[0])
    scales = scales_for(problem, grid)
    codes = feedback(problem, grid, scales)
    assert torch.equal(codes, feedback_waves(problem, grid, scales))
    before = codes.clone()
    swept = sweep(problem, grid, scales, codes)
    assert torch.equal(swept, sweep_rows(problem, grid, scales, codes))
    assert torch.equal(codes, before)  # neither writes into its argument
    if min(shape) > 1:
        assert not torch.equal(swept, codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scheme", SCHEMES)
@given(d_out=st.integers(1, 24), d_in=widths, seed=seeds)
@settings(max_examples=10, deadline=None)
def test_a_sweep_never_raises_the_loss(scheme: str, dtype: torch.dtype, d_out: int, d_in: int, seed: int) -> None:
    grid, problem = parse_scheme(scheme), random_problem(d_out, d_in, seed=seed, dtype=dtype)
    scales = scales_for(problem, grid, torch.bfloat16)
    codes = nearest(problem.W, grid, scales)
    slack = 1 + (1e-12 if dtype == torch.float64 else 1e-5)
    before = loss(problem, grid, of(grid, codes=codes, scales=scales))
    for _ in range(3):
        codes = sweep(problem, grid, scales, codes)
        after = loss(problem, grid, of(grid, codes=codes, scales=scales))
        assert after <= before * slack
        before = after


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scheme", SCHEMES)
@given(d_out=st.integers(1, 24), d_in=widths, seed=seeds)
@settings(max_examples=10, deadline=None)
def test_the_trace_of_losses_falls_and_ends_with_the_answers(scheme: str, dtype: torch.dtype, d_out: int, d_in: int, seed: int) -> None:
    grid, problem = parse_scheme(scheme), random_problem(d_out, d_in, seed=seed, dtype=dtype)
    rounded = round_weight(problem, grid, sweeps=6, scale_dtype=torch.bfloat16)
    assert 1 <= len(rounded.trace) <= 7
    assert all(later < earlier for earlier, later in zip(rounded.trace, rounded.trace[1:], strict=False))
    assert rounded.trace[-1] == pytest.approx(loss(problem, grid, rounded), rel=1e-3 if dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(d_out=st.integers(1, 24), d_in=widths, scheme=schemes, seed=seeds)
@settings(max_examples=20, deadline=None)
def test_refitted_scales_never_raise_the_loss(dtype: torch.dtype, d_out: int, d_in: int, scheme: str, seed: int) -> None:
    grid, problem = parse_scheme(scheme), random_problem(d_out, d_in, seed=seed, dtype=dtype)
    scales = scales_for(problem, grid, torch.bfloat16)
    codes = feedback(problem, grid, scales)
    refitted = refit_scales(problem, grid, scales, codes)
    before, after = (loss(problem, grid, of(grid, codes=codes, scales=s)) for s in (scales, refitted))
    assert after <= before * (1 + 1e-5)
    assert refitted["scale"].dtype == scales["scale"].dtype
    assert torch.isfinite(refitted["scale"]).all()
    assert (refitted["scale"] != 0).all()


def test_refitted_scales_solve_the_normal_equations() -> None:
    grid, problem = parse_scheme("int4-g4"), random_problem(3, 8, seed=1)
    scales = scales_for(problem, grid, torch.float64)
    codes = feedback(problem, grid, scales)
    # W_hat = A s with one column of A for each scale, solved densely.
    A = torch.zeros(24, 6, dtype=torch.float64)
    for i in range(3):
        for j in range(8):
            A[i * 8 + j, i * 2 + j // 4] = codes[i, j].double()
    F = torch.kron(problem.H_out, problem.H_in)
    best = torch.linalg.solve(A.T @ F @ A, A.T @ F @ problem.W.flatten()).reshape(3, 2)
    torch.testing.assert_close(refit_scales(problem, grid, scales, codes, steps=6)["scale"], best, rtol=1e-6, atol=1e-9)


@given(d_out=st.integers(1, 20), d_in=widths, scheme=schemes, seed=seeds)
@settings(max_examples=20, deadline=None)
def test_weights_on_the_grid_are_returned(d_out: int, d_in: int, scheme: str, seed: int) -> None:
    grid = parse_scheme(scheme)
    generator = torch.Generator().manual_seed(seed)
    low, high = grid.code_range
    codes = torch.randint(low, high + 1, (d_out, d_in), generator=generator).to(torch.int8)
    scales = {"scale": draw(*grid.scale_shape(d_out, d_in), seed=seed).to(torch.bfloat16)}
    W = grid.decode(codes, grid.affine(scales, (d_out, d_in), torch.float64)[0])
    problem = replace(random_problem(d_out, d_in, seed=seed), W=W)
    assert torch.equal(feedback(problem, grid, scales), codes)
    assert torch.equal(feedback_waves(problem, grid, scales), codes)
    assert torch.equal(sweep(problem, grid, scales, codes), codes)
    assert torch.equal(refit_scales(problem, grid, scales, codes)["scale"], scales["scale"])
    assert loss(problem, grid, of(grid, codes=codes, scales=scales)) == 0


@pytest.mark.parametrize("scheme", ["int2-g8", "int4-g8"])
def test_each_stage_lowers_the_mean_loss(scheme: str) -> None:
    """On the mean over many draws: no stage is better for every single matrix."""
    grid = parse_scheme(scheme)
    totals = torch.zeros(4)
    for seed in range(40):
        problem = random_problem(12, 24, seed=seed)
        one_sided = replace(problem, L_out=torch.eye(12, dtype=torch.float64))
        scales = scales_for(problem, grid)
        start = loss(problem, grid, of(grid, codes=nearest(problem.W, grid, scales), scales=scales))
        results = [
            of(grid, codes=feedback(one_sided, grid, scales), scales=scales),
            of(grid, codes=feedback(problem, grid, scales), scales=scales),
            round_weight(problem, grid, sweeps=4, scale_dtype=torch.float32),
        ]
        totals += torch.tensor([1.0, *(loss(problem, grid, r) / start for r in results)])
    nearest_, ldlq_, two_sided, descended = (totals / 40).tolist()
    assert descended < 0.9 * two_sided
    assert two_sided < 0.95 * ldlq_
    assert ldlq_ < 0.95 * nearest_


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rounding_is_deterministic(scheme: str) -> None:
    grid = parse_scheme(scheme)
    first, second = (
        round_weight(random_problem(70, 72, seed=3, dtype=torch.float32), grid, sweeps=3, scale_dtype=torch.bfloat16) for _ in range(2)
    )
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.scales["scale"], second.scales["scale"])
    assert first.trace == second.trace


@given(power=st.integers(-20, 20), seed=seeds)
@settings(max_examples=15, deadline=None)
def test_the_size_of_the_factors_does_not_matter(power: int, seed: int) -> None:
    grid, problem = parse_scheme("int3-g8"), random_problem(9, 16, seed=seed)
    size = 2.0**power  # exact in binary
    larger = replace(problem, H_out=size * problem.H_out, H_in=problem.H_in * size)
    first, second = (round_weight(p, grid, sweeps=3, scale_dtype=torch.bfloat16) for p in (problem, larger))
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.scales["scale"], second.scales["scale"])


def test_a_rank_deficient_factor_gets_more_damping_and_says_so() -> None:
    singular = torch.ones(6, 6, dtype=torch.float64)
    factors = KroneckerFactors(H_out=torch.eye(2, dtype=torch.float64), H_in=singular - 0.01 * torch.eye(6, dtype=torch.float64), scale=1.0)
    problem = make_problem(draw(2, 6, seed=0), factors, damping=1e-4)
    assert problem.damping == pytest.approx(0.1)


def test_a_factor_that_is_not_finite_is_refused() -> None:
    factors = KroneckerFactors(H_out=torch.eye(2), H_in=torch.full((3, 3), torch.nan), scale=1.0)
    with pytest.raises(NumericalError, match="not finite"):
        make_problem(torch.zeros(2, 3), factors, damping=0.1)
