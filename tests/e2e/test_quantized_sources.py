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
from roundel.models.decode import decoded
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


def words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Rows of codes, least significant bits first, as int32 words: by Python's integers."""
    rows = []
    for row in codes.tolist():
        stream = sum(code << bits * i for i, code in enumerate(row))
        rows.append([(stream >> 32 * i & 0xFFFFFFFF) - (1 << 32 if stream >> 32 * i + 31 & 1 else 0) for i in range(len(row) * bits // 32)])
    return torch.tensor(rows, dtype=torch.int32)


def gptq(bits: int, version: str, *, ordered: bool) -> Callable[[int, int], tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """Random codes and zero points; columns in groups in any order where an activation order was used."""

    def make(d_out: int, d_in: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        groups = d_in // BLOCK
        q, zeros = torch.randint(2**bits, (d_out, d_in)), torch.randint(2**bits, (groups, d_out))
        scales, of_column = (torch.rand(groups, d_out) + 0.5).half() / 2**bits, torch.arange(d_in) // BLOCK
        if ordered:
            of_column = of_column[torch.randperm(d_in)]
        stored = {
            "qweight": words(q, bits).T.contiguous(),
            "qzeros": words((zeros - int(version == "gptq")) % 2**bits, bits),
            "scales": scales,
        }
        if version != "auto_round":
            stored["g_idx"] = of_column.int()
        return stored, ((q - zeros[of_column].T) * scales.float()[of_column].T).half()

    return make


def awq(d_out: int, d_in: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    q, zeros = torch.randint(16, (d_in, d_out)), torch.randint(16, (d_in // BLOCK, d_out))
    scales, order = (torch.rand(d_in // BLOCK, d_out) + 0.5).half() / 16, [0, 2, 4, 6, 1, 3, 5, 7]

    def packed(codes: torch.Tensor) -> torch.Tensor:
        return words(codes.unflatten(1, (-1, 8))[..., order].flatten(1), 4)

    spread = [part.repeat_interleave(BLOCK, 0) for part in (zeros, scales.float())]
    return {"qweight": packed(q), "qzeros": packed(zeros), "scales": scales}, ((q - spread[0]) * spread[1]).T.half()


def nvfp4(d_out: int, d_in: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    codes, whole = torch.randint(16, (d_out, d_in)), torch.tensor(0.01)
    scales = (torch.rand(d_out, d_in // 16) * 8 + 1).to(torch.float8_e4m3fn)
    numbers = FP4[codes & 7] * torch.where(codes > 7, -1.0, 1.0)
    stored = {
        "weight": (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8),
        "weight_scale": scales,
        "weight_scale_2": whole,
        "input_scale": torch.tensor(1.0),
    }
    return stored, (numbers * (scales.float() * whole).repeat_interleave(16, 1)).bfloat16()


def fp8_scaled(shape: str) -> Callable[[int, int], tuple[dict[str, torch.Tensor], torch.Tensor]]:
    def make(d_out: int, d_in: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        q = (torch.randn(d_out, d_in) * 50).to(torch.float8_e4m3fn)
        scale = {"one": torch.tensor(0.001), "row": torch.rand(d_out, 1) / 500, "rows": torch.rand(d_out) / 500}[shape]
        return {"weight": q, "weight_scale": scale}, (q.float() * (scale[:, None] if shape == "rows" else scale)).bfloat16()

    return make


FOREIGN: dict[str, tuple[dict[str, object], Callable[[int, int], tuple[dict[str, torch.Tensor], torch.Tensor]]]] = {
    "gptq 4 bits": ({"quant_method": "gptq", "bits": 4, "group_size": BLOCK}, gptq(4, "gptq", ordered=False)),
    "gptq 3 bits, act-order": ({"quant_method": "gptq", "bits": 3, "group_size": BLOCK, "desc_act": True}, gptq(3, "gptq", ordered=True)),
    "gptq v2": ({"quant_method": "gptq", "bits": 2, "checkpoint_format": "gptq_v2"}, gptq(2, "gptq_v2", ordered=False)),
    "auto-round": (
        {"quant_method": "auto-round", "bits": 8, "packing_format": "auto_round:auto_gptq"},
        gptq(8, "gptq", ordered=False),
    ),
    "auto-round, other bits than most": (
        {"quant_method": "auto-round", "bits": 4, "group_size": 2 * BLOCK, "sym": False, "packing_format": "auto_round"},
        gptq(3, "auto_round", ordered=False),
    ),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": BLOCK, "version": "gemm", "zero_point": True}, awq),
    "modelopt nvfp4": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, nvfp4),
    "modelopt fp8": ({"quant_method": "modelopt", "quant_algo": "FP8"}, fp8_scaled("one")),
    "fp8 by row": ({"quant_method": "fp8"}, fp8_scaled("row")),
    "fp8 by row, one dimension": ({"quant_method": "fp8"}, fp8_scaled("rows")),
}
"""What config.json says, and parts and values of a random weight."""


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
    (made,) = (tmp_path / "work").glob("decoded-*")
    plain = load_file(made / "model.safetensors")
    for stored, W in values.items():
        assert torch.equal(plain[stored], W)
    for stored in plain.keys() & before.keys() - values.keys():
        assert torch.equal(plain[stored], before[stored])
    load_model(result.path, device=CPU, dtype=torch.float32)


@pytest.mark.parametrize("name", FOREIGN)
def test_weights_of_others_are_what_their_formats_say(name: str, model, tmp_path: Path) -> None:
    settings, make = FOREIGN[name]
    tensors, config = load_file(model() / "model.safetensors"), json.loads((model() / "config.json").read_text())
    torch.manual_seed(0)
    path, stored, values = tmp_path / "model", {}, {}
    for tensor, W in tensors.items():
        if tensor.endswith("proj.weight"):
            parts, values[tensor] = make(*W.shape)
            stored |= {f"{tensor.removesuffix('weight')}{end}": part for end, part in parts.items()}
        else:
            stored[tensor] = W
    path.mkdir()
    save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    assert values
    assert quantization_of(path) == settings["quant_method"]
    plain = decoded(path, str(settings["quant_method"]), tmp_path / "work")
    found = load_file(plain / "model.safetensors")
    assert found.keys() == tensors.keys()
    for tensor, W in found.items():
        assert torch.equal(W, values.get(tensor, tensors[tensor])), tensor
    assert quantization_of(plain) is None
    load_model(plain, device=CPU, dtype=torch.float32)
    assert decoded(path, str(settings["quant_method"]), tmp_path / "work") == plain


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "gptq", "checkpoint_format": "marlin"},
        {"quant_method": "awq", "version": "gemv"},
        {"quant_method": "auto-round", "packing_format": "auto_round:llm_compressor"},
        {"quant_method": "auto-round", "packing_format": "auto_round", "data_type": "mx_int"},
        {"quant_method": "bitsandbytes"},
    ],
)
def test_other_packings_are_refused_by_config_json_alone(settings: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": settings}))
    with pytest.raises(ModelError, match=r"cannot be decoded here .*start from the original"):
        decoded(tmp_path, settings["quant_method"], tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_parts_that_do_not_fit_together_are_named(model, tmp_path: Path) -> None:
    config, parts = json.loads((model() / "config.json").read_text()), awq(64, 64)[0]
    stored = {f"model.layers.0.mlp.up_proj.{end}": part[:-1] if end == "qzeros" else part for end, part in parts.items()}
    save_file({name: part.contiguous() for name, part in stored.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq", "bits": 4}}))
    with pytest.raises(ModelError, match=r"model.layers.0.mlp.up_proj.qweight cannot be decoded: The size of tensor"):
        decoded(tmp_path, "awq", tmp_path / "work")


@pytest.mark.parametrize("method", ["fp8", *(pytest.param(other, marks=pytest.mark.slow) for other in ("gptq", "bitsandbytes", "another"))])
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
