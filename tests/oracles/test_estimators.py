"""Estimators of several passes against dense gradients, singular vectors of the Fisher, and the loss they promise to lower."""

import numpy as np
import pytest
import torch
from torch import Tensor

from laws.problems import draw
from oracles.test_fisher import weight_gradients
from oracles.tiny import collected, dense_fisher, linears, random_tokens, repeated, tiny_llama
from roundel.curvature import Estimator, parse_curvature
from roundel.curvature.sketches import ESTIMATORS
from roundel.curvature.sketches.triangular import DAMPING
from roundel.linalg.ldl import damped_ldl, ldl
from roundel.types import KroneckerFactors, LayerGrad, LayerInput

CPU = torch.device("cpu")
V_PROJ, DOWN_PROJ = "model.layers.1.self_attn.v_proj", "model.layers.0.mlp.down_proj"
Pair = tuple[Tensor, Tensor]


def unit(H: Tensor) -> Tensor:
    return H / H.diagonal().mean()


def gradient_stream(d_out: int, d_in: int, *, sequences: int, tokens: int = 10, seed: int) -> Pair:
    """Correlated inputs and gradients, some sequences much larger than others, and gradients that depend on inputs."""
    x = draw(sequences, tokens, d_in, seed=seed) * torch.exp(-torch.arange(d_in) / 4) @ draw(d_in, d_in, seed=seed + 1)
    g = draw(sequences, tokens, d_out, seed=seed + 2) * torch.exp(-torch.arange(d_out) / 3) @ draw(d_out, d_out, seed=seed + 3)
    x = x * draw(sequences, 1, 1, seed=seed + 4).exp() + 0.5 * draw(sequences, 1, d_in, seed=seed + 5)
    g = g * x[..., :1].abs() + 0.3 * draw(sequences, 1, d_out, seed=seed + 6)
    return x.float(), g.float()


def fit(estimator: Estimator, x: Tensor, g: Tensor) -> list[KroneckerFactors]:
    """The factors after every pass."""
    found: list[KroneckerFactors] = []
    for index in range(estimator.passes):
        sketch = estimator.sketch(g.shape[2], x.shape[2], CPU, index=index, previous=found[-1] if found else None)
        sketch.update(LayerGrad(input=LayerInput(x), g=g))
        found.append(sketch.factors())
    return found


def cosine(one: Tensor, other: Tensor) -> float:
    return torch.nn.functional.cosine_similarity(one.flatten().double(), other.flatten().double(), dim=0).abs().item()


def leading_pair(F: Tensor, d_out: int, d_in: int) -> tuple[Tensor, Tensor, float]:
    """The leading singular pair of the rearranged Fisher, and the ratio of the second singular value to the first."""
    R = F.reshape(d_out, d_in, d_out, d_in).permute(0, 2, 1, 3).reshape(d_out**2, d_in**2)
    U, S, Vh = np.linalg.svd(R.numpy(), full_matrices=False)
    return torch.from_numpy(U[:, 0].copy()), torch.from_numpy(Vh[0].copy()), float(S[1] / S[0])


@pytest.mark.parametrize("name", [V_PROJ, DOWN_PROJ])
def test_power_converges_to_the_leading_singular_pair_of_the_gradients_fisher(name: str) -> None:
    model, tokens = tiny_llama(), random_tokens(8, 6, seed=1)
    chosen = {name: linears(model)[name]}
    G = weight_gradients(model, chosen, tokens, seed=4)[name].double()
    rows = G.flatten(1)
    u, v, gap = leading_pair(rows.T @ rows, *G.shape[1:])
    assert gap < 0.7
    close = collected(model, chosen, tokens, "power:rounds=30", seed=4, batch_size=1)[name]
    first, some = (collected(model, chosen, tokens, spec, seed=4, batch_size=1)[name] for spec in ("sketch-b", "power"))
    for H, start, between, vector in ((close.H_out, first.H_out, some.H_out, u), (close.H_in, first.H_in, some.H_in, v)):
        assert cosine(H, vector) > 1 - 1e-6
        assert cosine(start, vector) < cosine(between, vector)
        assert cosine(start, vector) < 1 - 1e-3


def test_power_approaches_the_leading_singular_pair_of_the_exact_fisher() -> None:
    model, tokens = tiny_llama(), random_tokens(1, 5, seed=3)
    linear = linears(model)[V_PROJ]
    u, v, gap = leading_pair(dense_fisher(model, [linear.weight], tokens.ids[0]), *linear.weight.shape)
    assert gap < 0.8
    factors = collected(model, {V_PROJ: linear}, repeated(tokens, 250), "power:rounds=8", seed=0, batch_size=250)[V_PROJ]
    assert cosine(factors.H_out, u) > 0.99
    assert cosine(factors.H_in, v) > 0.99


@pytest.mark.parametrize("tokens", [1, 12])
def test_rounds_of_sketch_b_equal_their_formula_on_dense_gradients(tokens: int) -> None:
    x, g = gradient_stream(9, 7, sequences=20, tokens=tokens, seed=3)
    G = torch.einsum("sto,sti->soi", g.double(), x.double())
    H_out, H_in = unit((G @ G.mT).sum(0)), unit((G.mT @ G).sum(0))
    for factors in fit(parse_curvature("sketch-b:rounds=3"), x, g):
        torch.testing.assert_close(factors.H_out.double(), H_out, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(factors.H_in.double(), H_in, rtol=1e-4, atol=1e-5)
        assert factors.scale == pytest.approx(G.square().sum().item() / (20 * tokens * 63), rel=1e-5)
        H_out, H_in = unit((G @ H_in @ G.mT).sum(0)), unit((G.mT @ H_out @ G).sum(0))


def J(G: Tensor, A: Tensor, B: Tensor) -> float:
    """`E |A^-1 G B^-T|^2`."""
    return (torch.linalg.inv(A) @ G @ torch.linalg.inv(B).T).square().sum().item() / len(G)


def damped_factors(factors: KroneckerFactors) -> Pair:
    return damped_ldl(factors.H_out, DAMPING)[1], damped_ldl(factors.H_in, DAMPING)[1]


@pytest.mark.parametrize("tokens", [1, 12])
def test_triangular_equals_its_formula_on_dense_gradients(tokens: int) -> None:
    x, g = gradient_stream(9, 7, sequences=20, tokens=tokens, seed=3)
    G = torch.einsum("sto,sti->soi", g.double(), x.double())
    mean, *rest = fit(parse_curvature("triangular:rounds=2:shrinkage=0"), x, g)
    last = fit(parse_curvature("triangular:rounds=2:shrinkage=0.3"), x, g)[-1]
    kfac = fit(parse_curvature("kfac"), x, g)[0]
    start = fit(parse_curvature("mean"), x, g)[0]
    torch.testing.assert_close(mean.H_out, start.H_out)
    torch.testing.assert_close(mean.H_in, start.H_in)
    previous = mean
    for factors in rest:
        A, B = (torch.linalg.inv(L) for L in damped_factors(previous))
        torch.testing.assert_close(factors.H_out.double(), unit((G @ B.T @ B @ G.mT).sum(0)), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(factors.H_in.double(), unit((G.mT @ A.T @ A @ G).sum(0)), rtol=1e-4, atol=1e-5)
        assert factors.scale == pytest.approx(G.square().sum().item() / (20 * tokens * 63), rel=1e-5)
        previous = factors
    torch.testing.assert_close(last.H_out, 0.3 * kfac.H_out + 0.7 * previous.H_out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last.H_in, 0.3 * kfac.H_in + 0.7 * previous.H_in, rtol=1e-4, atol=1e-5)
    assert last.scale == pytest.approx(previous.scale, rel=1e-5)


@pytest.mark.parametrize("spec", ["pilot:shrinkage=0.3", "auto:shrinkage=0.3"])
def test_pilot_equals_its_formula_on_dense_gradients(spec: str) -> None:
    model, tokens = tiny_llama(), random_tokens(40, 6, seed=1)
    estimator, chosen = parse_curvature(spec), {V_PROJ: linears(model)[V_PROJ]}
    count = estimator.pilot(len(tokens))
    assert count == 10
    found, own_kfac, mean = (
        collected(model, chosen, part, kind, seed=4, batch_size=1)[V_PROJ]
        for part, kind in ((tokens, spec), (tokens, "kfac"), (tokens[:count], "mean"))
    )
    G = weight_gradients(model, chosen, tokens, seed=4)[V_PROJ].double()[count:]
    A, B = (torch.linalg.inv(L) for L in damped_factors(mean))
    for H, kfac, flip_flop in (
        (found.H_out, own_kfac.H_out, G @ B.T @ B @ G.mT),
        (found.H_in, own_kfac.H_in, G.mT @ A.T @ A @ G),
    ):
        torch.testing.assert_close(H.double(), 0.3 * kfac.double() + 0.7 * unit(flip_flop.sum(0)), rtol=1e-4, atol=1e-5)
    assert found.scale == pytest.approx(G.square().sum().item() / (30 * 6 * G[0].numel()), rel=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_each_update_of_triangular_is_the_exact_minimiser_given_the_other_side(seed: int) -> None:
    x, g = gradient_stream(8, 11, sequences=60, seed=10 * seed)
    G = torch.einsum("sto,sti->soi", g.double(), x.double())
    start, updated = fit(parse_curvature("triangular:rounds=1:shrinkage=0"), x, g)
    A0, B0 = damped_factors(start)
    best_out, best_in = ldl(updated.H_out), ldl(updated.H_in)
    assert best_out is not None
    assert best_in is not None
    A, B = best_out[0], best_in[0]
    assert J(G, A, B0) < J(G, A0, B0)
    assert J(G, A0, B) < J(G, A0, B0)
    for k in range(20):
        away_out, away_in = (0.01 * draw(len(L), len(L), seed=k).tril(-1) for L in (A, B))
        assert J(G, A, B0) < J(G, A + away_out, B0)
        assert J(G, A0, B) < J(G, A0, B + away_in)


@pytest.mark.parametrize(("d_out", "d_in", "sequences", "seed"), [(12, 16, 40, 0), (12, 16, 40, 1), (24, 8, 60, 2), (10, 10, 200, 3)])
def test_triangular_lowers_the_loss_on_the_gradients_that_it_was_fitted_on(d_out: int, d_in: int, sequences: int, seed: int) -> None:
    x, g = gradient_stream(d_out, d_in, sequences=sequences, seed=100 * seed)
    G = torch.einsum("sto,sti->soi", g.double(), x.double())

    def loss(spec: str) -> float:
        return J(G, *damped_factors(fit(parse_curvature(spec), x, g)[-1]))

    starts = [loss(spec) for spec in ("kfac", "sketch-b", "mean")]
    assert loss("triangular:shrinkage=0") < min(starts)
    assert loss("triangular") < loss("kfac")
    assert loss("triangular:rounds=8:shrinkage=0") < 1.01 * loss("triangular:shrinkage=0")


def test_triangular_shrunk_all_the_way_is_kfac_but_for_the_scale() -> None:
    x, g = gradient_stream(8, 11, sequences=10, seed=1)
    shrunk, kfac = fit(parse_curvature("triangular:shrinkage=1"), x, g)[-1], fit(parse_curvature("kfac"), x, g)[-1]
    torch.testing.assert_close(shrunk.H_out, kfac.H_out)
    torch.testing.assert_close(shrunk.H_in, kfac.H_in)


@pytest.mark.parametrize("of", [name for name in ESTIMATORS if name != "diagonal"])
def test_diagonal_is_the_diagonal_of_the_other_estimator(of: str) -> None:
    x, g = gradient_stream(8, 11, sequences=10, seed=1)
    diagonal, full = fit(parse_curvature(f"diagonal:of={of}"), x, g)[-1], fit(parse_curvature(of), x, g)[-1]
    for (rows, ours), (same_rows, theirs) in zip(diagonal.row_groups(), full.row_groups(), strict=True):
        assert rows == same_rows
        assert torch.equal(ours.H_out, torch.diag(theirs.H_out.diagonal()))
        assert torch.equal(ours.H_in, torch.diag(theirs.H_in.diagonal()))
        assert ours.scale == theirs.scale
        assert torch.equal(damped_factors(ours)[0], torch.eye(len(ours.H_out), dtype=torch.float64))
