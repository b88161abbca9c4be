"""Originals that are quantized themselves, and those that only say so."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import roundel
from e2e import test_experts, tiny
from roundel.errors import ModelError
from roundel.models.load import load_model, quantization_of

Quantize = Callable[..., roundel.Quantized]
CPU = torch.device("cpu")
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
BLOCK = 32


def blockwise(W: torch.Tensor) -> dict[str, torch.Tensor]:
    """FP8 in square blocks, as DeepSeek stores it."""
    blocks = W.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    scale = blocks.abs().amax((1, 3)) / 448
    return {"": (blocks / scale[:, None, :, None]).reshape(W.shape).to(torch.float8_e4m3fn), "_scale_inv": scale}


def fp8(path: Path) -> dict[str, torch.Tensor]:
    """Makes the weights of a directory FP8; what they decode to, by stored name."""
    tensors, config = load_file(path / "model.safetensors"), json.loads((path / "config.json").read_text())
    values, stored = {}, {}
    for name, W in tensors.items():
        inside = ".layers." in name and name.endswith("proj.weight") and not any(side % BLOCK for side in W.shape)
        if not inside:
            stored[name] = W
            continue
        parts = blockwise(W.float())
        stored |= {name + end: part for end, part in parts.items()}
        scale = parts["_scale_inv"].repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        values[name] = (parts[""].float() * scale).bfloat16()
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "fmt": "e4m3",
    }
    save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    return values


def mxfp4(path: Path) -> dict[str, torch.Tensor]:
    """Puts random MXFP4 weights in the place of gpt-oss' experts; what they decode to, by stored name."""
    tensors, config = load_file(path / "model.safetensors"), json.loads((path / "config.json").read_text())
    random, values = torch.Generator().manual_seed(0), {}
    for name in [name for name in tensors if name.endswith((".experts.gate_up_proj", ".experts.down_proj"))]:
        experts, d_in, d_out = tensors.pop(name).shape
        codes = torch.randint(16, (experts, d_out, d_in), generator=random, dtype=torch.uint8)
        scales = torch.randint(120, 124, (experts, d_out, d_in // 32), generator=random, dtype=torch.uint8)
        tensors[f"{name}_blocks"] = (codes[..., ::2] | codes[..., 1::2] << 4).unflatten(2, (-1, 16)).contiguous()
        tensors[f"{name}_scales"] = scales
        numbers = FP4[(codes & 7).long()] * torch.where(codes > 7, -1.0, 1.0)
        values[name] = (numbers * torch.exp2(scales.float() - 127).repeat_interleave(32, 2)).mT.bfloat16()
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    return values


@pytest.fixture
def source(tmp_path: Path) -> Callable[[str], Path]:
    def make(name: str) -> Path:
        tokenizer, path = tiny.make_tokenizer(starts=False), tmp_path / name
        test_experts.original(name, len(tokenizer)).to(torch.bfloat16).save_pretrained(path)
        tokenizer.save_pretrained(path)
        return path

    return make


@pytest.mark.parametrize(("name", "make", "method"), [("deepseek-v3", fp8, "fp8"), ("gpt-oss", mxfp4, "mxfp4")])
def test_weights_are_decoded_once_and_quantized_as_any_others(name, make, method, source, quantize: Quantize, tmp_path: Path) -> None:
    path = source(name)
    (path / "USE_POLICY.md").write_text("be kind")
    values = make(path)
    assert values
    assert quantization_of(path) == method
    before = load_file(path / "model.safetensors")
    result = quantize(path, tmp_path / "out", scheme="int4-g32", work=tmp_path / "work")
    assert result.details["model"]["quantized"] == method
    assert any(f"the original is itself quantized ({method})" in line for line in result.details["warnings"])
    assert result.details["coverage"]["share"] > 0.95
    assert result.details["layers"]["model.layers.1.mlp.experts.0.down_proj"]["dtype"] == "bfloat16"
    assert (result.path / "USE_POLICY.md").read_text() == "be kind"
    assert json.loads((result.path / "config.json").read_text())["quantization_config"]["quant_method"] != method
    (decoded,) = (tmp_path / "work").glob("decoded-*")
    plain = load_file(decoded / "model.safetensors")
    for stored, W in values.items():
        assert torch.equal(plain[stored], W)
    for stored in plain.keys() & before.keys() - values.keys():
        assert torch.equal(plain[stored], before[stored])
    load_model(result.path, device=CPU, dtype=torch.float32)


@pytest.mark.parametrize("method", ["fp8", "gptq", "bitsandbytes", "another"])
def test_settings_that_were_left_behind_over_plain_weights_are_none(method, model, quantize: Quantize, tmp_path: Path) -> None:
    path = tmp_path / "model"
    AutoModelForCausalLM.from_pretrained(model()).save_pretrained(path)
    tiny.make_tokenizer(starts=False).save_pretrained(path)
    plain = quantize(path, tmp_path / "plain", scheme="int4-g32")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": method, "bits": 4, "load_in_4bit": True}})
    )
    assert quantization_of(path) is None
    result = quantize(path, tmp_path / "out", scheme="int4-g32", memory="1K")
    assert result.details["model"]["quantized"] is None
    assert (result.path / "model.safetensors").read_bytes() == (plain.path / "model.safetensors").read_bytes()


def test_what_nothing_decodes_is_refused_before_any_weight_is_read(model, quantize: Quantize, tmp_path: Path) -> None:
    quantized = quantize(model(), tmp_path / "native", scheme="int4-g32", format="native")
    with pytest.raises(ModelError, match=r"quantized already \(roundel\), which cannot be decoded here.*start from the original"):
        quantize(quantized.path, tmp_path / "out", scheme="int4-g32")


def test_a_compressed_tensors_checkpoint_can_be_an_original(model, quantize: Quantize, tmp_path: Path) -> None:
    first = quantize(model(), tmp_path / "first", scheme="int8-channel")
    result = quantize(first.path, tmp_path / "out", scheme="int4-g32")
    assert result.details["model"]["quantized"] == "compressed-tensors"
    assert result.report.kl_mean > 0
