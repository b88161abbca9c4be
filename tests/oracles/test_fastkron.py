"""The Krylov method against dense singular value decompositions of the rearranged Fisher; how fast Lanczos converges, and how not."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from laws.problems import draw
from oracles.test_estimators import cosine, fit, gradient_stream
from oracles.tiny import linears, random_tokens, tiny_llama
from roundel.curvature import collect, parse_curvature
from roundel.curvature.collect import factors_of
from roundel.curvature.sketches.fastkron import FastKronSums, _positive
from roundel.sweeps import Layers, Visit
from roundel.types import KroneckerFactors, LayerGrad, LayerInput

CPU = torch.device("cpu")
SHAPES = [(9, 7, 20), (6, 6, 40), (5, 12, 8)]
TOKENS = 10


def study(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[2] / "studies" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


rates = study("lanczos_rate")


def run(spec: str, x: Tensor, g: Tensor) -> list[tuple[FastKronSums, KroneckerFactors]]:
    """The sketch and its factors after every pass."""
    estimator, found = parse_curvature(spec), []
    for index in range(estimator.passes):
        sketch = estimator.sketch(g.shape[2], x.shape[2], CPU, index=index, previous=found[-1][1] if found else None)
        assert isinstance(sketch, FastKronSums)
        sketch.update(LayerGrad(input=LayerInput(x), g=g))
        sketch.finish()
        found.append((sketch, sketch.factors()))
    return found


def gradients(x: Tensor, g: Tensor) -> Tensor:
    return torch.einsum("sto,sti->soi", g.double(), x.double())


def rearranged(G: Tensor, tokens: int) -> Tensor:
    """The rearranged Fisher per token, `(d_out^2, d_in^2)`, on symmetric matrices (it maps antisymmetric ones to antisymmetric ones)."""
    R = torch.einsum("soi,spj->opij", G, G) / tokens
    return (R + R.mT).flatten(2).flatten(0, 1) / 2


def sine(H: Tensor, vector: Tensor) -> float:
    """Of the angle between two matrices; not by the cosine, which hides small angles."""
    one, other = H.flatten().double() / H.double().norm(), vector.flatten() / vector.norm()
    return (one - (one @ other) * other).norm().item()


@pytest.mark.parametrize(("d_out", "d_in", "sequences"), SHAPES)
@pytest.mark.parametrize("batch", [1, 3])
def test_it_converges_to_the_singular_values_and_the_leading_pair_of_the_dense_matrix(
    d_out: int, d_in: int, sequences: int, batch: int
) -> None:
    x, g = gradient_stream(d_out, d_in, sequences=sequences, seed=3)
    G = gradients(x, g)
    sums = torch.stack([part.sum(0) for part in G.split(batch)])  # the last one is smaller
    U, S, Vh = torch.linalg.svd(rearranged(sums, sequences * TOKENS), full_matrices=False)
    assert 0.1 < S[1] / S[0] < 0.8
    found = run(f"fastkron:steps=10:batch={batch}:tolerance=0", x, g)
    sketch, factors = found[-1]
    assert sketch.singular_values()[0].item() == pytest.approx(S[0].item(), rel=1e-6)
    assert sketch.singular_values()[1].item() == pytest.approx(S[1].item(), rel=1e-3)
    assert sine(factors.H_out, U[:, 0]) < 1e-5
    assert sine(factors.H_in, Vh[0]) < 1e-5
    assert sketch.relative_residual() < 1e-5
    assert factors.scale == pytest.approx(G.square().sum().item() / (sequences * TOKENS * d_out * d_in), rel=1e-5)
    assert factors.carry == {}
    values = [sketch.singular_values() for sketch, _ in found]
    for before, after in pairwise(values):  # Ritz values interlace
        assert (after[:-1] >= before * (1 - 1e-6)).all()
        assert (after[:2] <= S[: len(after[:2])] * (1 + 1e-6)).all()


@pytest.mark.parametrize(("d_out", "d_in", "sequences", "seed"), [(9, 7, 20, 10), (6, 6, 40, 18), (5, 12, 8, 19), (8, 8, 3, 5)])
def test_every_pass_equals_its_definition_with_dense_matrices(d_out: int, d_in: int, sequences: int, seed: int) -> None:
    """Krylov spaces from explicit powers, projected by explicit products; clipped by a full eigendecomposition."""
    x, g = gradient_stream(d_out, d_in, sequences=sequences, seed=seed)
    R = rearranged(gradients(x, g), sequences * TOKENS)
    R_scaled = R / torch.linalg.matrix_norm(R, 2)
    u, v = [torch.eye(d_out).double().flatten()], [torch.eye(d_in).double().flatten()]
    clipped = 0
    for sketch, factors in run("fastkron:steps=5:tolerance=0", x, g):
        U, V = (torch.linalg.qr(torch.stack(side, 1))[0] for side in (u, v))
        Y, S, Zt = torch.linalg.svd(U.T @ R @ V)
        best_u, best_v = U @ Y[:, 0], V @ Zt[0]
        residual = max((R @ best_v - S[0] * best_u).norm(), (R.T @ best_u - S[0] * best_v).norm()) / S[0]
        assert sketch.singular_values().tolist() == pytest.approx(S.tolist(), rel=1e-3)
        assert sketch.relative_residual() == pytest.approx(residual.item(), rel=1e-2, abs=1e-6)
        for H, image, d in ((factors.H_out, R @ best_v, d_out), (factors.H_in, R.T @ best_u, d_in)):
            expected = image.reshape(d, d) * image.reshape(d, d).trace().sign()
            values, vectors = torch.linalg.eigh(expected)
            clipped += int((values < -1e-3 * values.max()).any())
            assert sine(H, (vectors * values.clamp(min=0)) @ vectors.T) < 1e-4
        u, v = [*u, R_scaled @ v[-1]], [*v, R_scaled.T @ u[-1]]
    assert bool(clipped) == (seed != 5)


@pytest.mark.parametrize("tokens", [10, 1])
def test_the_first_pass_is_sketch_b(tokens: int) -> None:
    x, g = gradient_stream(9, 7, sequences=5, tokens=tokens, seed=1)
    sketch = parse_curvature("sketch-b").sketch(9, 7, CPU)
    sketch.update(LayerGrad(input=LayerInput(x), g=g))
    expected, (_, factors) = sketch.factors(), run("fastkron:steps=1", x, g)[0]
    assert isinstance(expected, KroneckerFactors)
    torch.testing.assert_close(factors.H_out, expected.H_out, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(factors.H_in, expected.H_in, rtol=1e-5, atol=1e-6)
    assert factors.scale == pytest.approx(expected.scale, rel=1e-6)


@pytest.mark.parametrize(("d_out", "d_in", "sequences"), SHAPES[:2])
def test_fastkron_and_power_converge_to_the_same_pair(d_out: int, d_in: int, sequences: int) -> None:
    x, g = gradient_stream(d_out, d_in, sequences=sequences, seed=3)
    krylov, power = (fit(parse_curvature(spec), x, g)[-1] for spec in ("fastkron:steps=12:tolerance=0", "power:rounds=40"))
    assert cosine(krylov.H_out, power.H_out) > 1 - 1e-7
    assert cosine(krylov.H_in, power.H_in) > 1 - 1e-7
    assert krylov.scale == pytest.approx(power.scale, rel=1e-4)


def test_a_clipped_matrix_is_the_nearest_positive_one_up_to_its_sign() -> None:
    for seed in range(5):
        H = draw(8, 8, seed=seed, dtype=torch.float32)
        H = H + H.T
        values, vectors = torch.linalg.eigh(H.double() * H.trace().sign())
        torch.testing.assert_close(_positive(H).double(), (vectors * values.clamp(min=0)) @ vectors.T, rtol=1e-5, atol=1e-5)
        positive = H @ H
        assert torch.equal(_positive(positive), positive)
        assert torch.equal(_positive(-positive), positive)


@pytest.mark.parametrize(("d_out", "d_in", "tokens"), [(1, 5, 4), (5, 1, 4), (1, 1, 4), (4, 6, 1)])
def test_a_side_that_is_exhausted_adds_nothing(d_out: int, d_in: int, tokens: int) -> None:
    x, g = gradient_stream(d_out, d_in, sequences=3 if tokens > 1 else 1, tokens=tokens, seed=2)
    U, S, Vh = torch.linalg.svd(rearranged(gradients(x, g), g.shape[:2].numel()), full_matrices=False)
    *_, (sketch, factors) = run("fastkron:steps=9:tolerance=0", x, g)
    assert sketch.singular_values()[0].item() == pytest.approx(S[0].item(), rel=1e-6)
    assert sine(factors.H_out, U[:, 0]) < 1e-5
    assert sine(factors.H_in, Vh[0]) < 1e-5
    assert sketch.relative_residual() < 1e-5


@pytest.mark.parametrize("factor", [1e-10, 1e6])
def test_the_size_of_gradients_does_not_matter(factor: float) -> None:
    x, g = gradient_stream(9, 7, sequences=20, seed=3)
    for (_, small), (_, plain) in zip(run("fastkron", x, factor * g), run("fastkron", x, g), strict=True):
        torch.testing.assert_close(small.H_out, plain.H_out, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(small.H_in, plain.H_in, rtol=1e-3, atol=1e-4)
        assert small.scale == pytest.approx(plain.scale * factor**2, rel=1e-5)


def test_gradients_that_are_not_finite_give_scale_zero_in_every_pass() -> None:
    x, g = gradient_stream(4, 5, sequences=3, seed=3)
    for bad in (torch.zeros_like(g), g * torch.inf, g * 1e30):
        for spec in ("fastkron", "fastkron:batch=2"):
            for sketch, factors in run(spec, x, bad):
                assert factors.scale == 0
                assert sketch.relative_residual() == 0
                assert sketch.singular_values().tolist() == [0]


def test_batches_that_differ_only_by_their_signs_cancel_and_the_scale_stays() -> None:
    x, g = gradient_stream(4, 5, sequences=1, seed=3)
    x, g = x.expand(4, -1, -1), g * torch.tensor([1.0, 1.0, 1.0, -1.0])[:, None, None]
    (sketch, factors), (_, single) = run("fastkron:steps=1:batch=2", x, g)[0], run("fastkron:steps=1", x, g)[0]
    G = gradients(x, g)[:1]
    assert sketch.sums["GtG"].tril().double().sub(4 * (G[0].T @ G[0]).tril()).abs().max() < 1e-4 * sketch.sums["GtG"].abs().max()
    assert factors.scale == pytest.approx(single.scale, rel=1e-6)


def test_incomplete_batches_do_not_merge() -> None:
    x, g = gradient_stream(4, 5, sequences=5, seed=3)
    estimator = parse_curvature("fastkron:batch=3")

    def part(rows: slice) -> FastKronSums:
        sketch = estimator.sketch(4, 5, CPU)
        sketch.update(LayerGrad(input=LayerInput(x[rows]), g=g[rows]))
        assert isinstance(sketch, FastKronSums)
        return sketch

    for one, other in ((part(slice(3)), part(slice(3, 5))), (part(slice(3, 5)), part(slice(3)))):
        with pytest.raises(ValueError, match="only 2 of 3 sequences"):
            one.merge(other)
    first, rest, whole = part(slice(3)), part(slice(3, 5)), part(slice(5))
    rest.finish()
    whole.finish()
    first.merge(rest)
    for key, total in whole.sums.items():
        torch.testing.assert_close(first.sums[key], total)


def test_what_has_converged_is_left_alone_and_passes_stop_when_all_has(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = tiny_llama(), random_tokens(6, 5, seed=1)
    chosen = linears(model)
    runs: dict[int, int] = {}
    real = Visit.replay

    def counted(visit: Visit, rows: Sequence[int], consume: Callable[[str, LayerGrad], None]) -> None:
        runs[visit.index] = runs.get(visit.index, 0) + len(rows)
        real(visit, rows, consume)

    monkeypatch.setattr(Visit, "replay", counted)
    states, factors, passes = {}, {}, {}
    for steps in (4, 5, 7, 30):
        runs.clear()
        spec = parse_curvature(f"fastkron:steps={steps}:tolerance=0.01")
        states[steps] = collect(Layers(model), chosen, tokens, spec, seed=4, batch_size=2)
        factors[steps] = factors_of(states[steps])
        assert all(sketch.index == steps - 1 for sketch in states[steps].values())
        passes[steps] = {index: count // len(tokens) for index, count in runs.items()}
    assert max(passes[30].values()) == 7
    assert passes[4] == {0: 4, 1: 4}
    residuals = {steps: {name: sketch.relative_residual() for name, sketch in state.items()} for steps, state in states.items()}
    assert max(residuals[30].values()) <= 0.01
    settled = {name for name, residual in residuals[4].items() if residual <= 0.01}
    assert settled
    assert settled != set(chosen)
    for name in settled:  # in the fourth pass or before
        for later in (factors[5], factors[30]):
            assert torch.equal(later[name].H_out, factors[4][name].H_out)
            assert torch.equal(later[name].H_in, factors[4][name].H_in)
            assert later[name].scale == factors[4][name].scale
    for name, own in factors[7].items():
        assert torch.equal(factors[30][name].H_out, own.H_out)


QS = [0.02, 0.1, 0.3, 0.6, 0.9, 0.98]


def space_tangent(eigenvalues: np.ndarray, start: np.ndarray, k: int) -> float:
    """Between the leading eigenvector, the first unit vector, and the Krylov space."""
    basis = rates.krylov(eigenvalues, start, k)
    leading = np.eye(len(start))[0]
    nearest = basis @ (basis.T @ leading)
    return float(np.linalg.norm(leading - nearest) / np.linalg.norm(nearest))


@pytest.mark.parametrize("q", QS)
def test_lanczos_keeps_to_the_corrected_bounds(q: float) -> None:
    eigenvalues, start = rates.problem(q)
    assert eigenvalues[1] / eigenvalues[0] == q
    for k in range(1, 9):
        assert space_tangent(eigenvalues, start, k) <= rates.space_bound(q, k) * (1 + 1e-6) + 1e-14
        sine = rates.sine(rates.ritz_vector(eigenvalues, start, k))
        assert sine <= rates.ritz_bound(q, k) + 1e-14
        assert sine >= rates.ritz_bound(q, k) / 50 or sine < 1e-13  # and the bounds are not idle


def test_the_bound_of_the_space_does_not_hold_for_the_ritz_vector_without_its_factor() -> None:
    eigenvalues = np.array([1.0, 0.4843, 0.3316, 0.2129, 0.0])
    start = np.array([0.0539, -0.9471, 0.0015, 0.0024, -0.3165])
    start /= np.linalg.norm(start)
    bound = np.linalg.norm(start[1:]) / start[0] / (1 + 2 * (1 - 0.4843) / 0.4843)
    ritz = rates.ritz_vector(eigenvalues, start, 2)
    assert np.linalg.norm(ritz[1:]) / abs(ritz[0]) > 1.3 * bound
    assert space_tangent(eigenvalues, start, 2) <= bound
    assert rates.sine(ritz) <= bound / math.sqrt(1 - 0.4843)


def test_the_corrected_rate_worsens_with_q_and_is_below_that_of_power_iteration_while_the_published_one_improves() -> None:
    grid = np.linspace(0.001, 0.999, 999).tolist()
    for q, larger in pairwise(grid):
        assert rates.rate(q) < q
        assert rates.rate(q) < rates.rate(larger)
        assert rates.published(q, 1) > rates.published(larger, 1)
    for q in QS[:-1]:  # the bound's own rate is the asymptotic one
        assert rates.space_bound(q, 31) / rates.space_bound(q, 30) == pytest.approx(rates.rate(q), rel=1e-3)


def test_measured_errors_worsen_with_q_and_break_the_published_rate() -> None:
    errors = [rates.sine(rates.ritz_vector(*rates.problem(q), 6)) for q in QS]
    assert errors == sorted(errors)
    assert errors[-1] > 1e9 * rates.published(QS[-1], 6)
    for q in QS[:3]:
        ratios = [
            rates.sine(rates.ritz_vector(*rates.problem(q), k + 1)) / rates.sine(rates.ritz_vector(*rates.problem(q), k)) for k in (3, 4)
        ]
        assert all(ratio == pytest.approx(rates.rate(q), rel=0.15) for ratio in ratios)


def test_with_a_large_gap_power_iteration_is_ahead_for_the_first_products() -> None:
    eigenvalues, start = rates.problem(0.05)
    for k, ahead in ((2, True), (3, True), (4, True), (6, False), (8, False)):
        lanczos, power = (rates.sine(method(eigenvalues, start, k)) for method in (rates.ritz_vector, rates.power_iterate))
        assert (power < lanczos) == ahead
    for q in QS:  # what always holds: the Ritz value is no less than the Rayleigh quotient of the power iterate in the same space
        eigenvalues, start = rates.problem(q)
        for k in range(1, 7):
            ritz, power = rates.ritz_vector(eigenvalues, start, k), rates.power_iterate(eigenvalues, start, k - 1)
            values = [(eigenvalues * w * w).sum() / (w * w).sum() for w in (ritz, power)]
            assert values[0] >= values[1] - 1e-14
