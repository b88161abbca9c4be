"""`refine` over layouts of all tools: what was read is what was written, only bytes of codes and scales change, and the KL falls."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import roundel
from e2e import tiny
from roundel.artifacts.checkpoints import read
from roundel.artifacts.source import load_source
from roundel.errors import ModelError
from roundel.formats.bits import pack_rows, unpack_rows
from roundel.formats.gptq import pack_groups
from roundel.given import open_given
from roundel.grids import parse_scheme
from roundel.recipes import Recipe
from roundel.rounding.nearest import nearest
from roundel.rounding.round import dequantized
from roundel.stages.judge import Judge

NEAREST = {"curvature": "identity", "sweeps": 0, "prefix_aware": False}
SETTINGS = {"sequences": 8, "seq_len": 32, "eval_sequences": 8, "sweeps": 2, "curvature": "kfac", "prefix_sequences": 8}


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """A Llama of widths that are multiples of 128, of two layers."""
    directory = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    sizes = {**tiny.SIZES, "hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=4)).to(torch.bfloat16).save_pretrained(directory)
    tiny.make_tokenizer(starts=False).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def source(wide):
    return load_source(str(wide), Recipe.of(scheme="int8-channel", format="dense"), "cpu", "float32")


@pytest.fixture(scope="module")
def made(wide, quantize, tmp_path_factory):
    """`made(scheme, form)`: rounded to nearest, once."""
    known: dict[tuple[str, str], Path] = {}

    def make(scheme: str, form: str) -> Path:
        if (scheme, form) not in known:
            path = tmp_path_factory.mktemp(f"{scheme}-{form}") / "out"
            some = {"include": ("*.1.self_attn.o_proj",)} if form == "exl3" else {}  # trellises take long
            known[scheme, form] = quantize(wide, path, scheme=scheme, format=form, **NEAREST, **some).path
        return known[scheme, form]

    return make


def as_version_2(path: Path, _wide: Path) -> None:
    """Zero points of GPTQ as they are, no longer one less."""
    tensors = load_file(path / "model.safetensors")
    for name in [name for name in tensors if name.endswith("qzeros")]:
        zeros = unpack_rows(tensors[name], 4, tensors[name].shape[1] * 8)
        tensors[name] = pack_rows(zeros + 1, 4)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["checkpoint_format"] = "gptq_v2"
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def in_activation_order(path: Path, wide: Path) -> None:
    """GPTQ's groups are of columns that are anywhere."""
    tensors, original = load_file(path / "model.safetensors"), load_file(wide / "model.safetensors")
    grid = parse_scheme("int4-g64")
    for name in [name for name in tensors if name.endswith("g_idx")]:
        stem = name.removesuffix("g_idx")
        W = original[f"{stem}weight"].float()
        order = torch.randperm(W.shape[1], generator=torch.Generator().manual_seed(0))
        scales = grid.fit_scales(W[:, order], torch.ones(W.shape[1]), torch.float16)
        codes = nearest(W[:, order], grid, scales)[:, torch.argsort(order)]
        zeros = torch.full(scales["scale"].shape, 7, dtype=torch.int16)
        own = pack_groups(codes.to(torch.int16) + 8, zeros, scales["scale"], 4)
        tensors |= {f"{stem}{part}": value for part, value in own.items()}
        tensors[name] = (torch.argsort(order) // 64).int()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


LAYOUTS = {
    "compressed-tensors": ("int3-g32", "compressed-tensors", None),
    "asymmetric": ("int4-g64-asym", "compressed-tensors", None),
    "nvfp4": ("nvfp4", "compressed-tensors", None),
    "mxfp4": ("mxfp4", "compressed-tensors", None),
    "fp8": ("fp8", "compressed-tensors", None),
    "gptq": ("int4-g64", "gptq", None),
    "gptq_v2": ("int4-g64", "gptq", as_version_2),
    "act-order": ("int4-g64", "gptq", in_activation_order),
    "auto-round": ("int4-g64-asym", "auto-round", None),
    "awq": ("int4-g32-asym", "awq", None),
    "mlx": ("int3-g64-affine", "mlx", None),
    "exl3": ("trellis2", "exl3", None),
    "gguf": ("q4_0", "gguf", None),
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_what_is_read_can_be_written_back(kind, made, wide, source, tmp_path) -> None:
    scheme, form, change = LAYOUTS[kind]
    path = tmp_path / "given"
    shutil.copytree(made(scheme, form), path)
    if change is not None:
        change(path, wide)
    given = open_given(str(path), source)
    ends = {"model.embed_tokens", "lm_head"} if kind in ("mlx", "gguf") else set()
    assert set(given) == ({"model.layers.1.self_attn.o_proj"} if kind == "exl3" else set(source.linears) | ends)
    assert not given.left
    if form not in ("gguf", "gptq") or kind == "gptq":
        for name, weight in read(path).rounded.items():
            assert torch.equal(dequantized(given[name]), dequantized(weight))
            assert torch.equal(given[name].codes, weight.codes)
    if kind == "gptq_v2":
        for name, weight in read(made(scheme, form)).rounded.items():
            assert torch.equal(given[name].codes, weight.codes)
    if kind == "act-order":
        W = load_file(wide / "model.safetensors")["model.layers.0.mlp.down_proj.weight"].float()
        assert (dequantized(given["model.layers.0.mlp.down_proj"]) - W).norm() < 0.2 * W.norm()
    (tmp_path / "same").mkdir()
    given.copy_to(tmp_path / "same", dict(given), {})
    assert files(tmp_path / "same") == files(path)
    name = "model.layers.1.self_attn.o_proj"
    other = given[name]
    codes = other.codes.roll(1, 0)
    (tmp_path / "changed").mkdir()
    given.copy_to(tmp_path / "changed", {name: type(other)(**{**vars(other), "codes": codes})}, {})
    again = open_given(str(tmp_path / "changed"), source)
    assert torch.equal(again[name].codes, codes)
    assert all(torch.equal(again[own].codes, given[own].codes) for own in given if own != name)
    assert {file: len(data) for file, data in files(tmp_path / "changed").items()} == {
        file: len(data) for file, data in files(path).items()
    }


def files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


@pytest.mark.parametrize("kind", ["asymmetric", "act-order", "nvfp4", "gguf", "mlx"])
def test_the_kl_falls_in_the_same_bytes(kind, made, wide, text, tmp_path) -> None:
    scheme, form, change = LAYOUTS[kind]
    path = tmp_path / "given"
    shutil.copytree(made(scheme, form), path)
    if change is not None:
        change(path, wide)
    result = roundel.refine(path, reference=wide, output=tmp_path / "out", calibration=str(text), **SETTINGS)
    refined = result.details["refined"]
    texts = refined["texts"]["held out"]
    assert texts["after"]["kl"]["mean"] < texts["before"]["kl"]["mean"]
    assert refined["better"]
    before, after = files(path), files(tmp_path / "out")
    assert {name: len(data) for name, data in before.items()}.items() <= {
        ("README.md" if name == "README.original.md" else name): len(data) for name, data in after.items() if name != "README.md"
    }.items() | {("README.md", len(before["README.md"]))}
    card = (tmp_path / "out" / "README.md").read_text()
    assert str(path) in card
    assert str(wide) in card
    rows = [row for row in result.details["layers"].values() if "end" not in row]
    assert min(row["judged_kl"] for row in rows) == [row["judged_kl"] for row in rows if row["taken"]][-1]
    assert json.loads((tmp_path / "out" / "refined.json").read_text()) == result.details


def test_nothing_changes_where_nothing_is_better(made, wide, text, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Judge, "__call__", lambda self, _index, _decided, _found: self.start)
    path = made("int4-g64", "gptq")
    result = roundel.refine(path, reference=wide, output=tmp_path / "out", calibration=str(text), **SETTINGS)
    assert not result.details["refined"]["better"]
    assert result.details["refined"]["linears_changed"] == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (path / "model.safetensors").read_bytes()
    assert any("byte for byte" in warning for warning in result.details["warnings"])


def test_it_goes_on_where_it_was_stopped(made, wide, text, tmp_path, monkeypatch) -> None:
    path = made("int4-g64", "gptq")
    given = {"reference": wide, "calibration": str(text), **SETTINGS}
    whole = roundel.refine(path, output=tmp_path / "whole", **given)
    real = Judge.__call__

    def stopped(self, index, decided, found) -> float:
        if index == 1:
            raise KeyboardInterrupt
        return real(self, index, decided, found)

    monkeypatch.setattr(Judge, "__call__", stopped)
    with pytest.raises(KeyboardInterrupt):
        roundel.refine(path, output=tmp_path / "out", work=tmp_path / "work", **given)
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    again = roundel.refine(path, output=tmp_path / "out", work=tmp_path / "work", **given)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert again.details["refined"]["texts"] == whole.details["refined"]["texts"]


def scaled_as_awq_does(wide: Path, target: Path) -> None:
    """The same function with other weights: channels divided between norms and what reads them, and between v, o and up, down."""
    shutil.copytree(wide, target)
    tensors = {name: value.float() for name, value in load_file(target / "model.safetensors").items()}
    draw = torch.Generator().manual_seed(1)
    for layer in range(2):
        stem = f"model.layers.{layer}."
        readers = {"input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")}
        readers["post_attention_layernorm"] = ("mlp.gate_proj", "mlp.up_proj")
        for norm, own in readers.items():
            s = torch.exp(0.5 * torch.randn(128, generator=draw))
            tensors[f"{stem}{norm}.weight"] /= s
            for name in own:
                tensors[f"{stem}{name}.weight"] *= s
        for first, second in (("self_attn.v_proj", "self_attn.o_proj"), ("mlp.up_proj", "mlp.down_proj")):
            s = torch.exp(0.5 * torch.randn(tensors[f"{stem}{first}.weight"].shape[0], generator=draw))
            tensors[f"{stem}{first}.weight"] /= s[:, None]
            tensors[f"{stem}{second}.weight"] *= s
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))


def test_files_whose_channels_are_scaled(wide, quantize, text, tmp_path) -> None:
    scaled_as_awq_does(wide, tmp_path / "scaled")
    given = quantize(tmp_path / "scaled", tmp_path / "given", scheme="int4-g64-asym", format="awq", **NEAREST).path
    result = roundel.refine(given, reference=wide, output=tmp_path / "out", calibration=str(text), **SETTINGS)
    texts = result.details["refined"]["texts"]["held out"]
    assert texts["after"]["kl"]["mean"] < texts["before"]["kl"]["mean"]
    assert any("scaled" in warning for warning in result.details["warnings"])
    own = load_file(tmp_path / "out" / "model.safetensors")
    before = load_file(given / "model.safetensors")
    assert torch.equal(own["model.layers.0.input_layernorm.weight"], before["model.layers.0.input_layernorm.weight"])


def test_another_model_in_the_same_layout(wide, made, text, tmp_path) -> None:
    other = tmp_path / "other"
    shutil.copytree(wide, other)
    tensors = load_file(other / "model.safetensors")
    draw = torch.Generator().manual_seed(2)
    for name, value in tensors.items():
        tensors[name] = (value.float() + 0.3 * value.float().std().nan_to_num(1) * torch.randn(value.shape, generator=draw)).to(value.dtype)
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    given = made("int4-g64", "gptq")
    with pytest.raises(ModelError, match="--transplant"):
        roundel.refine(given, reference=other, output=tmp_path / "no", calibration=str(text), **SETTINGS)
    result = roundel.refine(given, reference=other, output=tmp_path / "out", transplant=True, calibration=str(text), **SETTINGS)
    texts = result.details["refined"]["texts"]["held out"]
    assert texts["after"]["kl"]["mean"] < 0.5 * texts["before"]["kl"]["mean"]
    own, theirs = load_file(tmp_path / "out" / "model.safetensors"), load_file(other / "model.safetensors")
    assert torch.equal(own["model.embed_tokens.weight"], theirs["model.embed_tokens.weight"])
    assert torch.equal(own["model.norm.weight"], theirs["model.norm.weight"])


@pytest.mark.parametrize("kind", ["gguf", "gptq"])
def test_other_models_and_damaged_files_are_refused(kind, made, model, text, tmp_path) -> None:
    scheme, form, _ = LAYOUTS[kind]
    with pytest.raises(ModelError, match=r"another model|nothing in it|lacks"):
        roundel.refine(made(scheme, form), reference=model("llama"), output=tmp_path / "out", calibration=str(text), **SETTINGS)
    path = tmp_path / "cut"
    shutil.copytree(made(scheme, form), path)
    weights = next(file for file in path.iterdir() if file.suffix in (".gguf", ".safetensors"))
    weights.write_bytes(weights.read_bytes()[:-2000])
    with pytest.raises(ModelError):
        roundel.refine(path, reference=model("llama"), output=tmp_path / "out", calibration=str(text), **SETTINGS)
    assert not (tmp_path / "out").exists()
