"""KL against ten lines of plain torch."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from oracles.tiny import random_tokens, tiny_llama
from roundel.errors import ModelError
from roundel.evaluate import divergence
from roundel.evaluate.divergence import Part, compare_models
from roundel.sweeps import layers
from roundel.types import TokenBatch


class Table(nn.Module):
    """Logits looked up by token."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits, self.layers = nn.Embedding.from_pretrained(logits), nn.ModuleList([nn.Identity()])

    def get_input_embeddings(self) -> nn.Embedding:
        return self.logits

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        return SimpleNamespace(logits=self.layers[0](self.logits(input_ids)))


class Stored:
    """Logits of a model that is not there any more."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def of(self, batch: TokenBatch) -> list[Part]:
        return [self.logits[sequence].__getitem__ for sequence in batch.sequence_ids]


@torch.no_grad()
def plain(model: nn.Module, reference: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor, list[float]]:
    logits = [m(input_ids=ids).logits.double() for m in (model, reference)]
    q, p = (z.softmax(-1) for z in logits)
    kl = (p * (p.log() - q.log())).sum(-1)
    agreement = logits[0].argmax(-1) == logits[1].argmax(-1)
    nll = [nn.functional.cross_entropy(z[:, :-1].flatten(0, 1), ids[:, 1:].flatten()) for z in logits]
    return kl, agreement, [math.exp(n) for n in nll]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("size", [layers.SLICE, 40])
def test_every_number_equals_plain_torch(batch_size: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "SLICE", size)
    model, reference, tokens = tiny_llama(1), tiny_llama(2), random_tokens(5, 9)
    kl, agreement, perplexities = plain(model, reference, tokens.ids)
    done: list[int] = []
    found = compare_models(model, reference, tokens, batch_size=batch_size, advance=done.append)
    flat = kl.flatten().sort().values
    assert found.kl_mean == pytest.approx(kl.mean().item(), rel=1e-4)
    assert found.kl_stderr == pytest.approx(kl.mean(1).std().item() / math.sqrt(5), rel=1e-4)
    assert found.kl_median == pytest.approx(flat[22].item(), rel=1e-4)
    assert found.kl_p99 == pytest.approx(flat[44].item(), rel=1e-4)
    assert found.top1_agreement == pytest.approx(agreement.double().mean().item())
    assert found.perplexity_model == pytest.approx(perplexities[0], rel=1e-4)
    assert found.perplexity_reference == pytest.approx(perplexities[1], rel=1e-4)
    assert (found.tokens, found.sequences) == (45, 5)
    assert sum(done) == 5


def test_logits_from_elsewhere_stand_for_a_model() -> None:
    model, reference, tokens = tiny_llama(1), tiny_llama(2), random_tokens(5, 9)
    with torch.no_grad():
        ours, theirs = (Stored(each(input_ids=tokens.ids).logits) for each in (model, reference))
    found = compare_models(model, reference, tokens, batch_size=5)
    for pair in ((model, theirs), (ours, reference)):
        other = compare_models(*pair, tokens, batch_size=2)
        assert other.kl_mean == pytest.approx(found.kl_mean, rel=1e-5)
        assert other.sequence_kl == pytest.approx(found.sequence_kl, rel=1e-5)


def test_the_interval_holds_the_mean_of_most_other_draws() -> None:
    """Of skewed values: the mean is in the interval of 95 of 100 samples, and less often in one without regard to the skew's side."""
    random = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(200):
        values = torch.empty(40, dtype=torch.float64).exponential_(generator=random)
        low, high = divergence._interval(values)
        assert low < values.mean() < high
        hits += low < 1 < high
    assert 0.88 <= hits / 200 <= 0.98
    symmetric = torch.randn(4000, dtype=torch.float64, generator=random)
    low, high = divergence._interval(symmetric)
    error = symmetric.std().item() / 4000**0.5
    assert (high - low) / error == pytest.approx(2 * 1.96, rel=0.06)


@pytest.mark.parametrize("length", [3, 16, 40])
def test_spans_are_means_over_their_positions(length: int) -> None:
    model, reference, tokens = tiny_llama(1), tiny_llama(2), random_tokens(5, length)
    kl = plain(model, reference, tokens.ids)[0]
    found = compare_models(model, reference, tokens, batch_size=2).spans
    assert [span.first for span in found] == [0, *(span.last + 1 for span in found[:-1])]
    assert found[-1].last == length - 1
    assert len(found) <= divergence.SPANS
    for span in found:
        part = kl[:, span.first : span.last + 1].mean(1)
        assert span.kl == pytest.approx(part.mean().item(), rel=1e-4)
        assert span.stderr == pytest.approx(part.std().item() / math.sqrt(5), rel=1e-3)


def test_p99_leaves_one_token_in_a_hundred_above() -> None:
    model, reference = Table(torch.diag(torch.linspace(0, 3, 200))), Table(torch.zeros(200, 200))
    tokens = TokenBatch(ids=torch.arange(200).reshape(2, 100), sequence_ids=(0, 1))
    kl = plain(model, reference, tokens.ids)[0].flatten()
    found = compare_models(model, reference, tokens, batch_size=2)
    assert found.kl_p99 == pytest.approx(kl[197].item(), rel=1e-4)  # the 198th of 200
    assert found.kl_p999 == pytest.approx(kl[199].item(), rel=1e-4)


def test_identical_models_do_not_differ() -> None:
    found = compare_models(tiny_llama(), tiny_llama(), random_tokens(3, 8), batch_size=3)
    assert (found.kl_mean, found.kl_stderr, found.kl_p99, found.top1_agreement) == (0, 0, 0, 1)
    assert found.perplexity_model == found.perplexity_reference


def test_the_direction_is_from_the_reference_to_the_model() -> None:
    """A token that the reference rules out costs nothing; one that only the model rules out costs everything."""
    reference, model = Table(torch.tensor([[0.0, 0.0, -torch.inf]])), Table(torch.tensor([[0.0, 0.0, 0.0]]))
    tokens = TokenBatch(ids=torch.zeros(1, 4, dtype=torch.int64), sequence_ids=(0,))
    assert compare_models(model, reference, tokens, batch_size=1).kl_mean == pytest.approx(math.log(3 / 2))
    with pytest.raises(ModelError, match="not finite"):
        compare_models(reference, model, tokens, batch_size=1)


def test_a_perplexity_that_no_number_holds_is_one_error() -> None:
    """Found by changes to a checkpoint's scales: the report could not be written."""
    damaged = Table(torch.tensor([[0.0, 2000.0]]).expand(2, 2))
    tokens = TokenBatch(ids=torch.zeros(1, 4, dtype=torch.int64), sequence_ids=(0,))
    with pytest.raises(ModelError, match="perplexity beyond 1e308"):
        compare_models(damaged, damaged, tokens, batch_size=1)


def test_one_sequence_has_no_standard_error() -> None:
    found = compare_models(tiny_llama(1), tiny_llama(2), random_tokens(1, 8), batch_size=1)
    assert math.isnan(found.kl_stderr)
    assert found.as_json()["kl"]["stderr"] is None
    assert found.as_json()["kl"]["mean"] == found.kl_mean


def test_other_vocabularies_are_refused() -> None:
    with pytest.raises(ModelError, match="vocabularies of 11 and 13"):
        compare_models(tiny_llama(), tiny_llama(vocabulary=13), random_tokens(1, 4), batch_size=1)
