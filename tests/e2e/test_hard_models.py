"""Models and texts whose numbers break other tools: what cannot be used is in the report, or one clear error; the rest is rounded."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from e2e import tiny
from e2e.test_experts import original
from roundel.errors import ModelError, NumericalError

GIVEN: dict[str, Any] = {
    "scheme": "int3-g16",
    "prefix_aware": True,
    "prefix_sequences": 8,
    "natural_places": 0,
    "sequences": 8,
    "seq_len": 16,
}


@pytest.fixture
def changed(model, tmp_path: Path) -> Callable[..., Path]:
    """`changed(name=change, ...)`: a tiny Llama, weights of which (by the end of their names, dots as `__`) were changed in place."""

    def make(**changes: Callable[[torch.Tensor], object]) -> Path:
        copy = Path(shutil.copytree(model(), tmp_path / "model"))
        tensors = load_file(copy / "model.safetensors")
        for end, change in changes.items():
            (found,) = [name for name in tensors if name.endswith(end.replace("__", ".") + ".weight")]
            change(tensors[found])
        save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
        return copy

    return make


def finite(value: object) -> bool:
    """Whether all numbers in a report are."""
    if isinstance(value, dict):
        return all(map(finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def test_weights_of_every_kind(changed, quantize, tmp_path: Path) -> None:
    source = changed(
        layers__0__mlp__up_proj=lambda W: W[3].fill_(0.02),  # a constant row
        layers__0__mlp__down_proj=lambda W: W[:, ::2].zero_(),  # dead channels
        layers__0__self_attn__o_proj=lambda W: W[5, 7].fill_(1e4),  # an outlier
        layers__1__self_attn__k_proj=lambda W: W.zero_(),
        layers__1__mlp__gate_proj=lambda W: W.copy_(W[:, :1] * W[:1]),  # rank one
        layers__1__mlp__up_proj=lambda W: W.mul_(1e-30),
        embed_tokens=lambda W: W[:, 3].zero_(),
    )
    found = quantize(source, tmp_path / "out", **GIVEN, curvature="kfac")
    assert finite(found.details)
    written = json.loads((found.path / "roundel.json").read_text())
    assert len(written["layers"]) + len(written["skipped"]) == 14
    unreached = {"self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj"}  # by gradients, next to what is nothing
    assert {name.removeprefix("model.layers.1.") for name in written["skipped"]} <= unreached
    assert set(written["skipped"].values()) <= {"no usable gradient reached it"}
    assert found.report.kl_mean < 10


def test_activations_that_overflow(changed, quantize, tmp_path: Path) -> None:
    source = changed(layers__0__mlp__up_proj=lambda W: W.mul_(1e38))
    with pytest.raises(NumericalError, match="no usable gradient"):
        quantize(source, tmp_path / "out", **GIVEN, curvature="kfac")
    assert not (tmp_path / "out").exists()


def test_text_of_one_token(model, quantize, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("eeee" * 4000)
    found = quantize(model(), tmp_path / "out", **GIVEN, curvature="kfac", calibration=str(text))
    assert finite(found.details)


def test_a_vocabulary_of_one_token(quantize, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(**{**tiny.MODERN, "vocab_size": 1, "bos_token_id": None, "eos_token_id": None})
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    core = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="a").save_pretrained(tmp_path / "model")
    with pytest.raises(NumericalError, match="no usable gradient"):
        quantize(tmp_path / "model", tmp_path / "out", **GIVEN, curvature="kfac")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["compressed-tensors", "native", "gguf"])
def test_settings_that_are_infinite_are_written_as_they_are(form, changed, quantize, tmp_path: Path) -> None:
    """Transformers has written `time_step_limit` of Mamba and its kin so."""
    source = changed()
    config = json.loads((source / "config.json").read_text()) | {"time_step_limit": [0.0, math.inf]}
    (source / "config.json").write_text(json.dumps(config))
    scheme = "q8_0" if form == "gguf" else "int8-g32"
    found = quantize(source, tmp_path / "out", **{**GIVEN, "scheme": scheme}, format=form, curvature="identity")
    assert json.loads((found.path / "config.json").read_text())["time_step_limit"] == [0.0, math.inf]


def test_a_model_that_does_not_run_is_one_error(quantize, tmp_path: Path) -> None:
    """Latent attention with fewer heads of keys than of queries: its weights fit, its products do not."""
    tokenizer = tiny.make_tokenizer(starts=False)
    original("deepseek-v3", len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "num_key_value_heads": config["num_attention_heads"] // 2}))
    with pytest.raises(ModelError, match=r"the model cannot be run \(RuntimeError: .*\): is its config.json right\?"):
        quantize(tmp_path / "model", tmp_path / "out", **GIVEN)
