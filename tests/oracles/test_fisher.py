"""Collected gradients and factors against autograd, the dense Fisher and its singular value decomposition."""

from itertools import combinations

import pytest
import torch
from torch import Tensor, nn

from laws.problems import draw
from oracles.tiny import LinearChain, backward, collected, dense_fisher, label_gradient, linears, random_tokens, repeated, tiny_llama
from roundel.curvature import predicted_kl
from roundel.curvature.sketches import Estimator, Kfac, Mean, SketchA, SketchB
from roundel.evaluate.divergence import compare_models
from roundel.sweeps import Layers, safe_batch_size
from roundel.sweeps.tap import tapped
from roundel.types import LayerGrad, LayerInput, TokenBatch

CPU = torch.device("cpu")
LAYERS = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.v_proj"]


def weight_gradients(model: nn.Module, chosen: dict[str, nn.Linear], tokens: TokenBatch, *, seed: int = 0) -> dict[str, Tensor]:
    """`G_s` of every sequence, `(sequences, d_out, d_in)`."""
    found: dict[str, Tensor] = {}

    def consume(name: str, grad: LayerGrad) -> None:
        found[name] = torch.stack([grad.weight_gradient(s) for s in grad.sequences()])

    with tapped(model, chosen, consume):
        backward(model, tokens, seed)
    return found


def sampled_labels(logits: Tensor, tokens: TokenBatch, seed: int) -> Tensor:
    return (logits.float().softmax(-1) - label_gradient(logits, tokens, seed)).argmax(-1)


def test_collected_gradients_are_those_of_autograd() -> None:
    model, tokens = tiny_llama(), random_tokens(3, 7)
    chosen = linears(model)
    collected = weight_gradients(model, chosen, tokens, seed=5)
    labels = sampled_labels(model(input_ids=tokens.ids).logits.detach(), tokens, 5)
    weights = [linear.weight.requires_grad_(True) for linear in chosen.values()]
    for s in range(3):
        logits = model(input_ids=tokens.ids[s : s + 1]).logits[0]
        nll = nn.functional.cross_entropy(logits, labels[s], reduction="sum")
        for name, expected in zip(chosen, torch.autograd.grad(nll, weights), strict=True):
            torch.testing.assert_close(collected[name][s], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_second_moments_approach_the_dense_fisher(name: str) -> None:
    model, tokens, draws = tiny_llama(), random_tokens(1, 5, seed=3), 3000
    linear = linears(model)[name]
    exact = dense_fisher(model, [linear.weight], tokens.ids[0])
    G = weight_gradients(model, {name: linear}, repeated(tokens, draws))[name].double()
    for k in range(20):
        E = draw(*linear.weight.shape, seed=k)
        squares = (G * E).sum((1, 2)).square()
        error = (squares.mean() - E.flatten() @ exact @ E.flatten()).abs()
        assert error < 4 * squares.std() / draws**0.5
    d_out, d_in = linear.weight.shape
    blocks = exact.reshape(d_out, d_in, d_out, d_in)
    for estimate, partial_trace in (
        (torch.einsum("soi,spi->op", G, G), torch.einsum("oipi->op", blocks)),
        (torch.einsum("soi,soj->ij", G, G), torch.einsum("oioj->ij", blocks)),
    ):
        assert torch.linalg.norm(estimate / draws - partial_trace) < 0.1 * torch.linalg.norm(partial_trace)


def test_collect_gives_the_partial_traces_of_the_gradients() -> None:
    model, tokens = tiny_llama(), random_tokens(6, 5)
    chosen = {name: linears(model)[name] for name in LAYERS}
    factors = collected(model, chosen, tokens, "sketch-b", seed=2, batch_size=1)
    gradients = weight_gradients(model, chosen, tokens, seed=2)
    for name in LAYERS:
        G = gradients[name]
        H_out, H_in = torch.einsum("soi,spi->op", G, G), torch.einsum("soi,soj->ij", G, G)
        scale = factors[name].scale * torch.trace(factors[name].H_out) * torch.trace(factors[name].H_in)
        torch.testing.assert_close(factors[name].H_out, H_out / H_out.diagonal().mean(), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(factors[name].H_in, H_in / H_in.diagonal().mean(), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(scale, G.square().sum() / tokens.ids.numel(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["kfac", "sketch-a:rounds=1", "mean"])
def test_collecting_in_safe_batches_changes_no_bit(name: str) -> None:
    model, tokens = tiny_llama(), random_tokens(5, 6)
    chosen = linears(model)
    safe = safe_batch_size(Layers(model), chosen, tokens, batch_size=3)
    done: list[int] = []
    single, batched = (collected(model, chosen, tokens, name, seed=1, batch_size=size, advance=done.append) for size in (1, safe))
    for layer, factors in single.items():
        assert torch.equal(batched[layer].H_out, factors.H_out)
        assert torch.equal(batched[layer].H_in, factors.H_in)
        assert batched[layer].scale == factors.scale
    assert sum(done) == 2 * 5 * (2 + 1 + 2)  # two layers forward, the head, two layers back, however many passes


def test_label_gradients_do_not_depend_on_the_batch() -> None:
    logits, tokens = draw(4, 6, 9, seed=1, dtype=torch.float32), random_tokens(4, 6)
    together = label_gradient(logits, tokens, 3)
    assert torch.equal(together, torch.cat([label_gradient(logits[k : k + 1], tokens[k : k + 1], 3) for k in range(4)]))
    torch.testing.assert_close(together.sum(-1), torch.zeros(4, 6), rtol=0, atol=1e-6)
    assert ((together < 0).sum(-1) == 1).all()


def test_another_seed_draws_other_labels() -> None:
    logits, tokens = draw(4, 6, 9, seed=1, dtype=torch.float32), random_tokens(4, 6)
    gradients = [label_gradient(logits, tokens, seed) for seed in (0, 1, 2, 2**31)]
    assert all(not torch.equal(one, other) for one, other in combinations(gradients, 2))


def test_labels_are_drawn_from_the_models_own_distribution() -> None:
    draws, logits = 4000, 2 * draw(1, 3, 7, seed=2, dtype=torch.float32)
    logits[0, :, 4] = -torch.inf
    p = logits[0].softmax(-1)
    tokens = repeated(random_tokens(1, 3), draws)
    gradient = label_gradient(logits.expand(draws, -1, -1), tokens, 0)
    counts = (p - gradient).sum(0)
    assert (counts[:, 4] == 0).all()
    z = (counts - draws * p) / (draws * p * (1 - p)).clamp(min=1e-9).sqrt()
    assert z.abs().max() < 4
    one_hot = (p - gradient).reshape(draws, -1)
    independent = one_hot[:, :7].T @ one_hot[:, 7:14] / draws
    torch.testing.assert_close(independent, torch.outer(p[0], p[1]), rtol=0, atol=0.03)


def test_predicted_kl_is_half_the_dense_fishers_quadratic_form_per_token() -> None:
    model, tokens, draws = tiny_llama(), random_tokens(1, 5, seed=3), 1500
    chosen = {name: linears(model)[name] for name in LAYERS[1:]}
    exact = dense_fisher(model, [linear.weight for linear in chosen.values()], tokens.ids[0])
    stacked = torch.linalg.eigh(exact).eigenvectors[:, -1]  # the direction in which the layers' errors interact most
    parts = stacked.float().split([linear.weight.numel() for linear in chosen.values()])
    errors = {name: part.reshape(linear.weight.shape) for part, (name, linear) in zip(parts, chosen.items(), strict=True)}
    prediction = predicted_kl(Layers(model), chosen, errors.__getitem__, repeated(tokens, draws), seed=0, batch_size=1000)
    separate, start = 0.0, 0
    for name, E in errors.items():
        part = slice(start, start + E.numel())
        expected = 0.5 * (stacked[part] @ exact[part, part] @ stacked[part]).item() / 5
        assert prediction.layers[name] == pytest.approx(expected, rel=0.1)
        separate, start = separate + expected, part.stop
    assert abs(prediction.total - separate) < 4 * prediction.total_stderr
    joint = 0.5 * (stacked @ exact @ stacked).item() / 5
    assert abs(prediction.joint - joint) < 4 * prediction.joint_stderr
    assert abs(separate - joint) > 8 * prediction.joint_stderr  # so the two are told apart
    assert 0 < prediction.joint_stderr < 0.1 * joint


def test_predicted_kl_is_the_measured_kl_of_a_small_error() -> None:
    model, tokens = tiny_llama(), random_tokens(1, 5, seed=3)
    linear = linears(model)[LAYERS[1]]
    E = 0.004 * draw(*linear.weight.shape, seed=0, dtype=torch.float32)
    F = dense_fisher(model, [linear.weight], tokens.ids[0])
    changed = tiny_llama()
    linears(changed)[LAYERS[1]].weight.data -= E
    measured = compare_models(changed, model, tokens, batch_size=1).kl_mean
    assert measured == pytest.approx(0.5 * (E.flatten().double() @ F @ E.flatten().double()).item() / 5, rel=0.03)


@pytest.mark.parametrize("estimator", [Kfac(), SketchB(), Mean()], ids=lambda estimator: type(estimator).__name__)
def test_estimators_are_exact_for_a_deep_linear_net_with_one_token_per_sequence(estimator: Estimator) -> None:
    """With the middle weight zero all logits are equal, so the label gradient is independent of the input, as KFAC assumes.

    The Fisher is then one Kronecker product, which its partial traces (Sketch B) determine too. Every label of every input is
    enumerated, so nothing is left to chance.
    """
    vocabulary, inputs = 5, 8
    weights = [draw(4, 3, seed=1).float(), torch.zeros(6, 4), draw(7, 6, seed=2).float(), draw(vocabulary, 7, seed=3).float()]
    model = LinearChain(weights, draw(inputs, 3, seed=4).float())
    chosen = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    sketches = {name: estimator.sketch(linear.out_features, linear.in_features, CPU) for name, linear in chosen.items()}
    with tapped(model, chosen, lambda name, grad: sketches[name].update(grad)):
        for label in range(vocabulary):
            logits = model(torch.arange(inputs)[:, None]).logits
            logits.backward(logits.detach().softmax(-1) - nn.functional.one_hot(torch.tensor(label), vocabulary))
    middle = "chain.1"
    exact = sum(dense_fisher(model, [chosen[middle].weight], torch.tensor([k])) for k in range(inputs)) / inputs
    factors = sketches[middle].factors()
    torch.testing.assert_close((factors.scale * torch.kron(factors.H_out, factors.H_in)).double(), exact, rtol=1e-4, atol=1e-5)
    assert torch.linalg.norm(exact) > 1


def test_sketch_a_converges_to_the_top_singular_pair_of_the_rearranged_fisher() -> None:
    d_out, d_in, sequences, tokens = 4, 5, 6, 8
    x = draw(sequences, tokens, d_in, seed=1).float()
    g = (draw(sequences, tokens, d_out, seed=2) * (0.3 + x[..., :1].double().abs())).float()  # gradients depend on inputs
    flat_x, flat_g = x.flatten(0, 1).double(), g.flatten(0, 1).double()
    R = torch.einsum("to,tp,ti,tj->opij", flat_g, flat_g, flat_x, flat_x).reshape(d_out**2, d_in**2)
    U, S, Vh = torch.linalg.svd(R)
    assert S[1] < 0.5 * S[0]
    estimator, factors = SketchA(rounds=20), None
    first = None
    for index in range(estimator.passes):
        sketch = estimator.sketch(d_out, d_in, CPU, index=index, previous=factors)
        sketch.update(LayerGrad(input=LayerInput(x), g=g))
        factors = sketch.factors()
        first = first or factors
    assert first is not None
    assert factors is not None
    for H, start, vector in ((factors.H_out, first.H_out, U[:, 0]), (factors.H_in, first.H_in, Vh[0])):
        assert abs(torch.nn.functional.cosine_similarity(H.flatten().double(), vector, dim=0)) > 1 - 1e-8
        assert abs(torch.nn.functional.cosine_similarity(start.flatten().double(), vector, dim=0)) < 1 - 1e-5
