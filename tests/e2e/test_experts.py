"""Mixtures of experts: Transformers fuses the experts' weights, so they stay in their precision, and the checkpoint still loads."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedConfig, Qwen3MoeConfig

import roundel
from e2e import tiny
from roundel.models.load import load_model

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}


def configurations(vocabulary: int) -> dict[str, PreTrainedConfig]:
    return {
        "mixtral": MixtralConfig(vocab_size=vocabulary, num_local_experts=4, **SMALL),
        "qwen3-moe": Qwen3MoeConfig(
            vocab_size=vocabulary, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16, **SMALL
        ),
    }


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_experts_stay_and_the_rest_is_quantized(name: str, quantize, tmp_path: Path) -> None:
    tokenizer = tiny.make_tokenizer(starts=False)
    torch.manual_seed(0)
    original = AutoModelForCausalLM.from_config(configurations(len(tokenizer))[name])
    original.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    result = quantize(tmp_path / "model", tmp_path / "out", scheme="int4-g32")
    assert len(result.details["layers"]) == 8
    assert all("self_attn" in layer for layer in result.details["layers"])
    reasons = {layer: reason for layer, reason in result.details["skipped"].items() if "experts" in layer}
    assert len(reasons) == 2
    assert all("fused experts" in reason for reason in reasons.values())
    coverage = result.details["coverage"]
    of_experts = sum(value.numel() for parameter, value in original.named_parameters() if "experts" in parameter)
    assert coverage["left"]["fused experts: their weights are one tensor of three dimensions"] == of_experts
    assert coverage["quantized"] == 2 * (2 * 64 * 64 + 2 * 32 * 64)
    assert coverage["share"] == coverage["quantized"] / coverage["decoder_weights"] < 0.4
    (warning,) = (line for line in result.details["warnings"] if "of the decoder layers' matrices" in line)
    assert warning.startswith(f"only {100 * coverage['share']:.0f} %")
    assert "fused experts" in warning
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"decoder's weights that is quantized | {100 * coverage['share']:.1f} %" in card
    loaded = load_model(tmp_path / "out", device=torch.device("cpu"), dtype=torch.float32)
    for parameter, value in original.named_parameters():
        if "experts" in parameter:
            assert torch.equal(loaded.get_parameter(parameter), value)
    assert isinstance(result, roundel.Quantized)
    assert 0 < result.report.kl_mean < 1
