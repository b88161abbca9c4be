"""What steps see: some tokens of their text drawn from the original's own distribution, the rest the text."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from oracles.tiny import random_tokens, tiny_llama
from roundel.sweeps import Layers, layers
from roundel.tuning import teacher
from roundel.tuning.teacher import Divergence, Reference, Teacher, descend, drawn_share
from roundel.types import TokenBatch

WORDS = 6


class Bigram(Layers):
    """Logits of the next token that depend on this one alone."""

    def __init__(self) -> None:
        table = torch.randn(WORDS, WORDS, generator=torch.Generator().manual_seed(1))
        table[:, 0] = -torch.inf  # never said
        self.table = table
        self.model = SimpleNamespace(get_input_embeddings=lambda: nn.Embedding(WORDS, 1))
        self.tokens = 0

    device = torch.device("cpu")

    def through(self, ids: torch.Tensor) -> torch.Tensor:
        self.tokens += ids.numel()
        return self.table[ids]

    def logits(self, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        assert ids.shape == hidden.shape[:2]
        return hidden


def seen(reference: Reference) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and log-probabilities of all tokens."""
    return reference.ids, reference.piece(slice(None), slice(None))


@pytest.fixture(params=[layers.SLICE, 7 * WORDS], ids=["whole", "pieces"], autouse=True)
def sliced(request, monkeypatch) -> None:
    monkeypatch.setattr(layers, "SLICE", request.param)


@pytest.fixture
def text() -> TokenBatch:
    return TokenBatch.of(torch.randint(1, WORDS, (40, 100), generator=torch.Generator().manual_seed(2)))


def test_a_share_of_the_tokens_comes_from_the_originals_distribution(text) -> None:
    model = Bigram()
    own = Teacher(model, text, share=0.5, turns=10, seed=3)
    counts, places = torch.zeros(WORDS, WORDS), 0
    rows = list(range(40))
    for step in range(10):
        uniforms = own.uniforms(40, step)
        ids, expected = seen(own.batch(rows, [step] * 40, uniforms))
        anew = uniforms < 0.5
        assert torch.equal(ids[:, 0], text.ids[:, 0])
        assert torch.equal(ids[:, 1:][~anew], text.ids[:, 1:][~anew])
        torch.testing.assert_close(expected, model.table[ids].log_softmax(-1))
        counts.index_put_((text.ids[:, :-1][anew], ids[:, 1:][anew]), torch.ones(()), accumulate=True)  # drawn after the true token
        places += anew.sum().item()
    assert places / (10 * 40 * 99) == pytest.approx(0.5, abs=0.01)
    found = counts[1:] / counts[1:].sum(1, keepdim=True)
    wanted = model.table[1:].softmax(-1)
    assert found[:, 0].sum() == 0
    assert (found - wanted).abs().max() < 5 * (0.25 / counts[1:].sum(1).min()).sqrt()


def test_each_step_is_other_text_and_the_same_each_time(text) -> None:
    model = Bigram()
    first, again, other = (Teacher(model, text, share=0.3, turns=2, seed=seed) for seed in (3, 3, 4))
    rows, uniforms = [4, 1, 7], first.uniforms(3, 0)
    one = first.batch(rows, [0, 0, 0], uniforms).ids
    assert not torch.equal(one, first.batch(rows, [1, 1, 1], uniforms).ids)
    assert not torch.equal(uniforms, first.uniforms(3, 1))
    assert not torch.equal(one, other.batch(rows, [0, 0, 0], other.uniforms(3, 0)).ids)
    two = first.batch(rows, [1, 1, 0], first.uniforms(3, 1)).ids
    assert torch.equal(two, again.batch(rows, [1, 1, 0], again.uniforms(3, 1)).ids)  # a run that goes on from there
    parts = torch.cat([first.batch(rows[part], [0] * len(rows[part]), uniforms[part]).ids for part in (slice(0, 2), slice(2, 3))])
    assert torch.equal(one, parts)
    assert torch.equal(text.ids[rows], TokenBatch.of(text.ids).ids[rows])  # the text itself stays


def test_what_to_draw_is_asked_for_once(text) -> None:
    model = Bigram()
    own = Teacher(model, text, share=0.3, turns=3, seed=0)
    for turn in range(3):
        own.batch([0, 5], [turn, turn], own.uniforms(2, turn))
    assert model.tokens == 2 * 100 + 3 * 2 * 100


@pytest.mark.parametrize(("cache", "passes"), [(1 << 30, 1), (0, 3)])
def test_what_fits_is_computed_once(text, monkeypatch, cache, passes) -> None:
    monkeypatch.setattr(teacher, "CACHE", cache)
    model = Bigram()
    own = Teacher(model, text, share=0.0, turns=3, seed=0)
    for step in range(3):
        ids, expected = seen(own.batch([0, 5], [step, step], own.uniforms(2, step)))
        assert torch.equal(ids, text.ids[[0, 5]])
        torch.testing.assert_close(expected.float(), model.table[ids].log_softmax(-1), atol=4e-3, rtol=1e-3)
    assert model.tokens == passes * 2 * 100


def test_the_divergence_and_its_gradient_are_those_of_torch() -> None:
    random = torch.Generator().manual_seed(5)
    logits = torch.randn(2, 3, WORDS, generator=random, requires_grad=True)
    reference = torch.randn(2, 3, WORDS, generator=random).log_softmax(-1)
    loss = Divergence.apply(logits, reference)
    loss.backward()
    other = logits.detach().requires_grad_(True)
    plain = nn.functional.kl_div(other.log_softmax(-1).flatten(0, 1), reference.flatten(0, 1), log_target=True, reduction="batchmean")
    plain.backward()
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(logits.grad, other.grad)


def test_the_backward_pass_in_pieces_is_that_of_all_logits(monkeypatch) -> None:
    monkeypatch.setattr(teacher, "fast", lambda function, **_kinds: function)
    model, ids = tiny_llama(), random_tokens(3, 12).ids
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    own, other = Layers(model), Layers(twin)
    loss = descend(other, other.through(ids), Reference(own, ids), tokens=2 * ids.numel())
    found = {name: parameter.grad for name, parameter in twin.named_parameters()}
    twin.zero_grad()
    plain = Divergence.apply(twin(input_ids=ids).logits, model(input_ids=ids).logits.detach().log_softmax(-1)) / 2
    plain.backward()
    assert loss == pytest.approx(plain.item(), rel=1e-5)
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-7)


def test_text_is_drawn_only_where_there_is_little_of_it() -> None:
    assert drawn_share(1, 10**9) == pytest.approx(0.3)
    assert drawn_share(100_000, 3_500_000) == pytest.approx(0.28, abs=0.01)
    assert drawn_share(100_000, 200_000) == drawn_share(10**9, 10) == drawn_share(5, 0) == 0
