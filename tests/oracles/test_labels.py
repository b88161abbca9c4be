"""What goes back from the logits: its second moment against `diag(p) - p p^T` and the dense Fisher, its tails, its draws."""

from itertools import product

import pytest
import torch
from torch import Tensor, nn

from laws.problems import draw
from oracles.tiny import backward, collected, dense_fisher, label_gradient, linears, random_tokens, repeated, tiny_llama
from roundel.curvature import predicted_kl
from roundel.curvature.collect import Prediction
from roundel.errors import SchemeError
from roundel.recipes import Recipe
from roundel.sweeps import Layers, safe_batch_size
from roundel.sweeps.labels import LABEL_KINDS, Labels
from roundel.sweeps.tap import tapped
from roundel.types import LayerGrad, TokenBatch

LAYERS = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.v_proj"]


def weight_gradients(
    model: nn.Module, chosen: dict[str, nn.Linear], tokens: TokenBatch, labels: str, *, seed: int = 0
) -> dict[str, Tensor]:
    """`vec(G_s)` of every sequence, `(sequences, d_out * d_in)`, in float64."""
    found: dict[str, Tensor] = {}

    def consume(name: str, grad: LayerGrad) -> None:
        found[name] = torch.stack([grad.weight_gradient(s).flatten() for s in grad.sequences()]).double()

    with tapped(model, chosen, consume):
        backward(model, tokens, seed, labels)
    return found


def draws_of(p: Tensor, labels: str, draws: int) -> Tensor:
    """`u` at the positions of `p` `(tokens, vocabulary)`, `(draws, tokens * vocabulary)`, in float64."""
    tokens = repeated(random_tokens(1, p.shape[0]), draws)
    return label_gradient(p.log().expand(draws, -1, -1), tokens, 0, labels).double().flatten(1)


@pytest.mark.parametrize("labels", ["sampled", "probe"])
@pytest.mark.parametrize("peaked", [1, 3])
def test_second_moment_is_the_hessian_of_the_kl_in_the_logits(labels: str, peaked: int) -> None:
    draws, p = 4000, (peaked * draw(3, 9, seed=peaked)).softmax(-1)
    exact = torch.block_diag(*(torch.diag(row) - torch.outer(row, row) for row in p))  # positions are independent
    u = draws_of(p.float(), labels, draws)
    error = (u.T @ u / draws - exact).square().sum()
    expected = (u.square().sum(1).square().mean() - exact.square().sum()) / draws  # its mean, by the draws' own spread
    assert error < 2 * expected
    assert error.sqrt() < 0.09 * torch.linalg.norm(exact)
    assert (u.mean(0).abs() < 4.5 * exact.diagonal().div(draws).sqrt() + 1e-7).all()


def test_a_probe_is_one_of_the_signed_roots_and_all_of_them_together_have_the_exact_moment() -> None:
    p = (2 * draw(1, 6, seed=4)).softmax(-1)
    signs = torch.tensor(list(product((-1.0, 1.0), repeat=6)), dtype=torch.float64)
    every = signs * p.sqrt() - p * (signs * p.sqrt()).sum(1, keepdim=True)
    torch.testing.assert_close(every.T @ every / len(every), torch.diag(p[0]) - p.T @ p, rtol=0, atol=1e-14)
    u = draws_of(p.float(), "probe", 3000)
    distance = torch.cdist(u, every)
    assert distance.min(1).values.max() < 1e-6
    counts = distance.argmin(1).bincount(minlength=64)
    assert ((counts - 3000 / 64).square() / (3000 / 64)).sum() < 64 + 4 * 128**0.5  # chi squared: uniform over the 64


def test_tails_are_lighter_where_a_label_is_improbable_and_heavier_at_a_coin_flip() -> None:
    """Kurtosis of `v . u` where `v` picks the last label, as the docstring of `sweeps.labels` has it."""
    found = {}
    for p in (0.01, 0.5):
        for labels in ("sampled", "probe"):
            distribution = torch.tensor([0.7 * (1 - p), 0.3 * (1 - p), p])
            last = draws_of(distribution.expand(40000, -1), labels, 1).reshape(-1, 3)[:, 2]  # positions draw for themselves
            found[labels, p] = last.pow(4).mean().item() / last.square().mean().item() ** 2
            a = distribution.sqrt() * torch.tensor([-p, -p, 1 - p])
            probe = 3 - 2 * a.pow(4).sum().item() / a.square().sum().item() ** 2
            assert found[labels, p] == pytest.approx(((1 - p) ** 3 + p**3) / (p * (1 - p)) if labels == "sampled" else probe, rel=0.2)
    assert found["sampled", 0.01] > 50
    assert found["sampled", 0.5] < found["probe", 0.5]
    assert max(found["probe", p] for p in (0.01, 0.5)) < 3


@pytest.mark.parametrize("labels", ["sampled", "probe"])
def test_weight_gradients_have_the_dense_fisher_as_second_moment(labels: str) -> None:
    model, tokens, draws = tiny_llama(), random_tokens(1, 5, seed=3), 3000
    chosen = {name: linears(model)[name] for name in LAYERS}
    gradients = weight_gradients(model, chosen, repeated(tokens, draws), labels)
    for name in LAYERS:
        exact, vec = dense_fisher(model, [chosen[name].weight], tokens.ids[0]), gradients[name]
        error = (vec.T @ vec / draws - exact).square().sum()
        expected = (vec.square().sum(1).square().mean() - exact.square().sum()) / draws  # its mean, by the draws' own spread
        assert error < 2 * expected
        assert error.sqrt() < 0.07 * torch.linalg.norm(exact)


def test_labels_of_the_data_give_the_empirical_fisher() -> None:
    model, tokens = tiny_llama(), random_tokens(6, 7, seed=2)
    chosen = {name: linears(model)[name] for name in LAYERS}
    found = weight_gradients(model, chosen, tokens, "data", seed=9)
    weights = [linear.weight.requires_grad_(True) for linear in chosen.values()]
    empirical = {name: torch.zeros(linear.weight.numel(), linear.weight.numel(), dtype=torch.float64) for name, linear in chosen.items()}
    for s in range(6):
        logits = model(input_ids=tokens.ids[s : s + 1]).logits[0]
        nll = nn.functional.cross_entropy(logits[:-1], tokens.ids[s, 1:], reduction="sum")
        for name, gradient in zip(chosen, torch.autograd.grad(nll, weights), strict=True):
            torch.testing.assert_close(found[name][s], gradient.flatten().double(), rtol=1e-4, atol=1e-5)
            empirical[name] += torch.outer(gradient.flatten(), gradient.flatten()).double()
    factors = collected(model, chosen, tokens, "sketch-b", seed=0, batch_size=1, labels="data")
    for name, linear in chosen.items():
        torch.testing.assert_close(found[name].T @ found[name], empirical[name], rtol=1e-3, atol=1e-3)
        d_out, d_in = linear.weight.shape
        blocks = empirical[name].reshape(d_out, d_in, d_out, d_in)
        H_out, H_in = torch.einsum("oipi->op", blocks), torch.einsum("oioj->ij", blocks)
        torch.testing.assert_close(factors[name].H_out.double(), H_out / H_out.diagonal().mean(), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(factors[name].H_in.double(), H_in / H_in.diagonal().mean(), rtol=1e-3, atol=1e-4)
        assert factors[name].scale * d_out * d_in == pytest.approx(torch.trace(empirical[name]).item() / tokens.ids.numel(), rel=1e-4)


def test_the_last_position_of_the_data_has_no_label() -> None:
    logits, tokens = draw(2, 5, 11, seed=1, dtype=torch.float32), random_tokens(2, 5)
    gradient = label_gradient(logits, tokens, 0, "data")
    assert (gradient[:, -1] == 0).all()
    assert torch.equal((logits.softmax(-1) - gradient)[:, :-1].argmax(-1), tokens.ids[:, 1:])
    assert torch.equal(gradient, label_gradient(logits, tokens, 1, "data"))


@pytest.mark.parametrize("labels", LABEL_KINDS)
def test_gradients_do_not_depend_on_the_batch(labels: str) -> None:
    logits, tokens = draw(4, 6, 11, seed=1, dtype=torch.float32), random_tokens(4, 6)
    together = label_gradient(logits, tokens, 3, labels)
    assert torch.equal(together, torch.cat([label_gradient(logits[k : k + 1], tokens[k : k + 1], 3, labels) for k in range(4)]))
    torch.testing.assert_close(together.sum(-1), torch.zeros(4, 6), rtol=0, atol=1e-6)
    if labels != "data":
        assert not torch.equal(together, label_gradient(logits, tokens, 4, labels))
        alike = label_gradient(logits[:1].expand(4, -1, -1), tokens, 3, labels)
        assert not torch.equal(alike[0], alike[1])  # sequences draw for themselves


@pytest.mark.parametrize("labels", ["probe", "data"])
def test_collecting_in_safe_batches_changes_no_bit(labels: str) -> None:
    model, tokens = tiny_llama(), random_tokens(5, 6)
    chosen = linears(model)
    safe = safe_batch_size(Layers(model), chosen, tokens, batch_size=3)
    single, batched, other = (
        collected(model, chosen, tokens, "mean", seed=1, batch_size=size, labels=kind)
        for size, kind in ((1, labels), (safe, labels), (1, "sampled"))
    )
    for layer, factors in single.items():
        assert torch.equal(batched[layer].H_out, factors.H_out)
        assert torch.equal(batched[layer].H_in, factors.H_in)
        assert not torch.equal(other[layer].H_out, factors.H_out)


def test_predictions_are_of_the_true_fisher_whatever_the_labels() -> None:
    model, tokens, draws = tiny_llama(), random_tokens(1, 5, seed=3), 800
    chosen = {LAYERS[1]: linears(model)[LAYERS[1]]}
    exact = dense_fisher(model, [chosen[LAYERS[1]].weight], tokens.ids[0])
    E = 0.01 * draw(*chosen[LAYERS[1]].weight.shape, seed=0, dtype=torch.float32)

    def prediction_of(labels: str, draws: int) -> Prediction:
        return predicted_kl(Layers(model), chosen, lambda _name: E, repeated(tokens, draws), seed=0, batch_size=400, labels=labels)

    assert prediction_of("data", 20) == prediction_of("sampled", 20)
    sampled, probe = (prediction_of(kind, draws) for kind in ("sampled", "probe"))
    assert probe.total != sampled.total
    expected = 0.5 * (E.flatten().double() @ exact @ E.flatten().double()).item() / 5
    for prediction in (sampled, probe):
        assert abs(prediction.total - expected) < 4 * prediction.total_stderr < 0.3 * expected


@pytest.mark.parametrize("labels", LABEL_KINDS)
@pytest.mark.parametrize("size", [1, 4, 9])
def test_slices_of_a_sequence_draw_what_the_whole_draws(labels: str, size: int) -> None:
    logits, tokens = 2 * draw(3, 9, 11, seed=1, dtype=torch.float32), random_tokens(3, 9)
    whole = label_gradient(logits, tokens, 3, labels)
    for row, own in enumerate(logits):
        drawn = Labels(tokens, row, 3, labels)
        parts = [drawn.gradient(own[part], part) for part in (slice(k, min(k + size, 9)) for k in range(0, 9, size))]
        assert torch.equal(torch.cat(parts), whole[row])


def test_unknown_labels_are_refused() -> None:
    with pytest.raises(ValueError, match="sampled, probe, data"):
        label_gradient(draw(1, 2, 11, seed=0, dtype=torch.float32), random_tokens(1, 2), 0, "hard")
    with pytest.raises(SchemeError, match="labels 'hard': expected one of sampled, probe, data"):
        Recipe(labels="hard")
