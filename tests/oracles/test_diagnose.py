"""Held-out diagnostics against dense gradients, the dense Fisher and estimates made again without each sequence."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor, nn

from laws.problems import covariance, draw
from oracles.test_fisher import weight_gradients
from oracles.tiny import collected, dense_fisher, linears, random_tokens, repeated, tiny_llama
from roundel.curvature import predicted_kl
from roundel.curvature.diagnose import Diagnosis, diagnose, total
from roundel.errors import DataError
from roundel.sweeps import Layers
from roundel.types import Factors, GroupedFactors, KroneckerFactors, TokenBatch

DAMPING = 0.1
Q_PROJ, V_PROJ, DOWN_PROJ = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj", "model.layers.0.mlp.down_proj"


def factors_of(linear: nn.Linear, seed: int, groups: int = 1) -> Factors:
    d_out, d_in = linear.weight.shape
    parts = tuple(
        KroneckerFactors(
            H_out=covariance(d_out // groups, 4 * k + seed).float(), H_in=covariance(d_in, 4 * k + seed + 2).float(), scale=0.3 + k
        )
        for k in range(groups)
    )
    return parts[0] if groups == 1 else GroupedFactors(groups=parts)


def dense(factors: Factors) -> Tensor:
    return torch.block_diag(*(part.scale * torch.kron(part.H_out.double(), part.H_in.double()) for _, part in factors.row_groups()))


def cosine(G: Tensor, sizes: list[int], factors: Factors) -> float:
    """By its definition; the Fisher's norm from all ordered pairs of different sequences in batches of these sizes."""
    rows, K = G.flatten(1), dense(factors)
    inner = torch.einsum("si,ij,sj->s", rows, K, rows).mean()
    products = [part[s] @ part[t] for part in rows.split(sizes) for s in range(len(part)) for t in range(len(part)) if s != t]
    return (inner / torch.stack(products).square().mean().sqrt() / torch.linalg.norm(K)).item()


def unit_lower(H: Tensor) -> Tensor:
    H = H.double() + DAMPING * H.double().diagonal().mean() * torch.eye(len(H), dtype=torch.float64)
    C = torch.linalg.cholesky(H)
    return C / C.diagonal()


def j_of(G: Tensor, factors: Factors) -> Tensor:
    return sum(
        (torch.linalg.inv(unit_lower(part.H_out)) @ G[:, rows] @ torch.linalg.inv(unit_lower(part.H_in)).T).square().sum((1, 2))
        for rows, part in factors.row_groups()
    )


def jackknifed(estimates: list[float]) -> float:
    values = torch.tensor(estimates, dtype=torch.float64)
    return math.sqrt((len(values) - 1) / len(values) * (values - values.mean()).square().sum().item())


# Two tokens: G is never formed. Eight: for the pairs alone. Thirty: for everything.
@pytest.mark.parametrize("length", [2, 8, 30])
def test_every_number_equals_its_definition_on_dense_gradients(length: int) -> None:
    model, tokens, sizes = tiny_llama(), random_tokens(8, length, seed=1), [3, 3, 2]
    chosen = {name: linears(model)[name] for name in (Q_PROJ, DOWN_PROJ, V_PROJ)}
    factors = {
        "one": {name: factors_of(linear, 0) for name, linear in chosen.items()},
        "two": {name: factors_of(linear, 7, groups=2) for name, linear in chosen.items()},
    }
    errors = {name: 0.1 * draw(*linear.weight.shape, seed=5).float() for name, linear in chosen.items()}
    done: list[int] = []
    found = diagnose(
        Layers(model),
        chosen,
        factors,
        tokens,
        seed=4,
        batch_size=3,
        damping=DAMPING,
        advance=done.append,
        errors={"two": errors.__getitem__},
    )
    assert sum(done) == 8 * (2 + 1 + 2)
    gradients = {name: G.double() for name, G in weight_gradients(model, chosen, tokens, seed=4).items()}
    for label, own in factors.items():
        for name, layer in own.items():
            G, row = gradients[name], found[label][name]
            assert row.cosine == pytest.approx(cosine(G, sizes, layer), rel=1e-4)
            J, J0 = j_of(G, layer), G.square().sum((1, 2))
            assert row.j_ratio == pytest.approx((J.sum() / J0.sum()).item(), rel=1e-4)
            assert row.j == pytest.approx(J.mean().item() / length, rel=1e-4)
            assert row.j_identity == pytest.approx(J0.mean().item() / length, rel=1e-4)
            assert row.damping == DAMPING
            left_out = [[k for k in range(8) if k != s] for s in range(8)]
            remaining = [[2, 3, 2] if s < 3 else [3, 2, 2] if s < 6 else [3, 3, 1] for s in range(8)]
            expected = jackknifed([cosine(G[kept], left, layer) for kept, left in zip(left_out, remaining, strict=True)])
            assert row.cosine_stderr == pytest.approx(expected, rel=1e-3)
            assert row.j_ratio_stderr == pytest.approx(jackknifed([(J[k].sum() / J0[k].sum()).item() for k in left_out]), rel=1e-3)
    prediction = predicted_kl(Layers(model), chosen, errors.__getitem__, tokens, seed=4, batch_size=3)
    assert {name: row.predicted_kl for name, row in found["two"].items()} == pytest.approx(prediction.layers, rel=1e-5)
    assert all(row.predicted_kl is None for row in found["one"].values())
    whole = total(found["two"].values())
    assert whole.predicted_kl == pytest.approx(prediction.total, rel=1e-5)
    assert whole.predicted_kl_stderr == pytest.approx(prediction.total_stderr, rel=1e-5)
    assert total(found["one"].values()).predicted_kl is None


def test_the_total_is_that_of_the_block_diagonal_fisher() -> None:
    model, tokens = tiny_llama(), random_tokens(6, 5, seed=2)
    chosen = {name: linears(model)[name] for name in (Q_PROJ, V_PROJ)}
    own = {name: factors_of(linear, 3) for name, linear in chosen.items()}
    rows = diagnose(Layers(model), chosen, {"": own}, tokens, seed=0, batch_size=6, damping=DAMPING)[""]
    G = {name: value.double() for name, value in weight_gradients(model, chosen, tokens).items()}
    inner = sum(torch.einsum("si,ij,sj->s", G[name].flatten(1), dense(own[name]), G[name].flatten(1)).mean() for name in chosen)
    pairs = [(s, t) for s in range(6) for t in range(6) if s != t]
    fisher = sum(torch.tensor([(G[name][s] * G[name][t]).sum() for s, t in pairs]).square().mean() for name in chosen)
    norm = sum(torch.linalg.norm(dense(own[name])).square() for name in chosen)
    whole = total(rows.values())
    assert whole.cosine == pytest.approx((inner / (fisher * norm).sqrt()).item(), rel=1e-4)
    J, J0 = sum(j_of(G[name], own[name]) for name in chosen), sum(G[name].square().sum((1, 2)) for name in chosen)
    assert whole.j_ratio == pytest.approx((J.sum() / J0.sum()).item(), rel=1e-4)
    expected = jackknifed([((J.sum() - J[s]) / (J0.sum() - J0[s])).item() for s in range(6)])
    assert whole.j_ratio_stderr == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", [V_PROJ, pytest.param(DOWN_PROJ, marks=pytest.mark.slow)])
def test_the_cosine_is_that_of_the_exact_fisher(name: str) -> None:
    """One text, many draws of its labels, in small batches: with a sequence's own square it would be far off."""
    model, tokens, draws = tiny_llama(), random_tokens(1, 5, seed=3), 800
    linear = linears(model)[name]
    F = dense_fisher(model, [linear.weight], tokens.ids[0])
    factors = {
        "random": factors_of(linear, 0),
        "collected": collected(model, {name: linear}, repeated(tokens, 150), "mean", seed=9, batch_size=150)[name],
    }
    rows = diagnose(
        Layers(model),
        {name: linear},
        {label: {name: own} for label, own in factors.items()},
        repeated(tokens, draws),
        seed=0,
        batch_size=16,
        damping=DAMPING,
    )
    for label, own in factors.items():
        K, row = dense(own), rows[label][name]
        exact = ((F * K).sum() / torch.linalg.norm(F) / torch.linalg.norm(K)).item()
        assert abs(row.cosine - exact) < 4 * row.cosine_stderr
        assert 0 < row.cosine_stderr < 0.03
        biased = exact / math.sqrt(1 + (torch.trace(F) / torch.linalg.norm(F)).item() ** 2 / 16)
        assert abs(biased - exact) > 5 * row.cosine_stderr
    assert rows["collected"][name].cosine > rows["random"][name].cosine + 0.2


def test_identity_leaves_all_of_the_loss_and_better_factors_less() -> None:
    model, tokens = tiny_llama(), random_tokens(40, 12, seed=2)
    chosen = {DOWN_PROJ: linears(model)[DOWN_PROJ]}
    own = {spec: collected(model, chosen, tokens[:24], spec, seed=0, batch_size=8) for spec in ("identity", "activation", "mean")}
    rows = diagnose(Layers(model), chosen, own, tokens[24:], seed=0, batch_size=8, damping=DAMPING)
    identity, activation, mean = (rows[spec][DOWN_PROJ] for spec in own)
    assert identity.j_ratio == pytest.approx(1, rel=1e-5)
    assert identity.j_ratio_stderr < 1e-5
    assert mean.j_ratio < activation.j_ratio < 0.95
    assert identity.cosine < activation.cosine < mean.cosine


def test_what_cannot_be_judged_is_left_out_or_refused() -> None:
    model, tokens = tiny_llama(), random_tokens(4, 5)
    chosen = {name: linears(model)[name] for name in (Q_PROJ, V_PROJ)}
    own: dict[str, Factors] = {name: factors_of(linear, 3) for name, linear in chosen.items()}
    own[V_PROJ] = KroneckerFactors(H_out=own[V_PROJ].H_out, H_in=own[V_PROJ].H_in, scale=0.0)
    settings = {"seed": 0, "damping": DAMPING}
    assert set(diagnose(Layers(model), chosen, {"": own}, tokens, batch_size=4, **settings)[""]) == {Q_PROJ}
    for few, batch in ((tokens[:1], 4), (tokens, 1)):
        with pytest.raises(DataError, match="2 or more"):
            diagnose(Layers(model), chosen, {"": own}, few, batch_size=batch, **settings)
    with pytest.raises(ValueError, match="no factors"):
        diagnose(Layers(model), chosen, {"": own}, tokens, batch_size=4, errors={"x": lambda _name: torch.zeros(0)}, **settings)


def test_as_json() -> None:
    model = tiny_llama()
    tokens: TokenBatch = random_tokens(2, 5)
    chosen = {Q_PROJ: linears(model)[Q_PROJ]}
    own = {Q_PROJ: factors_of(chosen[Q_PROJ], 3)}
    row: Diagnosis = diagnose(Layers(model), chosen, {"": own}, tokens, seed=0, batch_size=2, damping=DAMPING)[""][Q_PROJ]
    values = json.loads(json.dumps(row.as_json(), allow_nan=False))
    assert values["cosine"] == row.cosine
    assert values["cosine_stderr"] is None  # without one of two sequences there is no pair
    assert values["predicted_kl"] is None
    assert "samples" not in values
