"""Calibration on text that the model samples itself: no data needed."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM, OpenAIGPTConfig, OpenAIGPTLMHeadModel

from e2e import tiny
from e2e.tiny import BOS, VOCABULARY
from oracles.tiny import label_gradient
from roundel import calibration
from roundel.calibration import sample_from_model
from roundel.models import load_model, load_tokenizer
from roundel.types import TokenBatch

MODELS = {"with-bos": "gemma3", "without-bos": "qwen3"}


@pytest.mark.parametrize("name", MODELS.values(), ids=MODELS)
def test_the_same_for_every_batch_size(name, model, quantize, tmp_path) -> None:
    runs = [quantize(model(name), tmp_path / str(size), calibration="self", batch_size=size, scheme="int4-g32") for size in (1, 5)]
    one, five = ((run.path / "model.safetensors").read_bytes() for run in runs)
    assert one == five
    first, second = (run.details for run in runs)
    assert first["calibration"] == second["calibration"]
    assert first["evaluation"] == second["evaluation"]
    assert first["calibration"]["source"] == "self"
    assert first["calibration"]["tokens"] == 8 * 32
    assert first["evaluation"]["source"] == "self (held out)"
    assert first["evaluation"]["overlap_with_calibration"] == 0
    assert 0 < runs[0].report.kl_mean < 1
    assert json.loads((runs[0].path / "roundel.json").read_text())["recipe"]["calibration"] == "self"


@pytest.mark.parametrize("name", MODELS.values(), ids=MODELS)
def test_samples(name, model) -> None:
    loaded = load_model(model(name), device=torch.device("cpu"), dtype=torch.float32)
    tokenizer = load_tokenizer(model(name))
    samples = sample_from_model(loaded, tokenizer, 20, 24, seed=3)
    assert samples.shape == (20, 24)
    assert samples.min() >= 0
    assert samples.max() < VOCABULARY
    if name == MODELS["with-bos"]:
        assert (samples[:, 0] == BOS).all()
    else:
        assert len(samples[:, 0].unique()) > 10
    assert len(samples.unique(dim=0)) == 20
    assert torch.equal(sample_from_model(loaded, tokenizer, 20, 24, seed=3), samples)
    assert not torch.equal(sample_from_model(loaded, tokenizer, 20, 24, seed=4), samples)


def test_follows_the_model(model) -> None:
    """Each sampled token was likely: on average by the entropy of the model's own distributions."""
    loaded = load_model(model("gemma3"), device=torch.device("cpu"), dtype=torch.float32)
    samples = sample_from_model(loaded, load_tokenizer(model("gemma3")), 32, 32, seed=0)
    with torch.no_grad():
        log_p = loaded(input_ids=samples).logits[:, :-1].float().log_softmax(-1)
    surprise = -log_p.gather(-1, samples[:, 1:, None])[..., 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    difference = (surprise - entropy).flatten()
    assert abs(difference.mean()) < 4 * difference.std() / len(difference) ** 0.5


def test_labels_are_not_the_sampled_text(model) -> None:
    """Labels come from a stream of their own: the gradient needs labels that were not fed back into the context."""
    loaded = load_model(model("gemma3"), device=torch.device("cpu"), dtype=torch.float32)
    samples = sample_from_model(loaded, load_tokenizer(model("gemma3")), 4, 64, seed=0)
    with torch.no_grad():
        gradient = label_gradient(loaded(input_ids=samples).logits, TokenBatch(ids=samples, sequence_ids=(0, 1, 2, 3)), 0)
    labels = gradient.argmin(-1)
    assert (labels[:, :-1] == samples[:, 1:]).float().mean() < 0.5


KEPT = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**tiny.MODERN)),
    "mamba": lambda: MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, hidden_size=32, state_size=4, num_hidden_layers=2)),
    "nothing": lambda: OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=VOCABULARY, n_positions=32, n_embd=32, n_layer=1, n_head=2)),
}
"""Models by what they keep of earlier tokens."""


@pytest.mark.parametrize("kind", KEPT)
def test_what_is_sampled_does_not_depend_on_what_is_kept(kind: str, monkeypatch) -> None:
    torch.manual_seed(0)
    model, tokenizer = KEPT[kind]().double().eval(), tiny.make_tokenizer(starts=False)
    assert (calibration.cache_of(model) is None) == (kind == "nothing")
    found = sample_from_model(model, tokenizer, 3, 16, seed=1)
    monkeypatch.setattr(calibration, "cache_of", lambda _model: None)
    assert torch.equal(sample_from_model(model, tokenizer, 3, 16, seed=1), found)
    assert len(found.unique()) > 8
