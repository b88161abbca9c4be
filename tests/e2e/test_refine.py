"""`refine`: the KL falls in the same bytes, whatever the layout, also of mixtures of experts, from the disk and where it was stopped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import roundel
from e2e import tiny
from e2e.layouts import LEFT, NEAREST, files
from roundel.errors import ModelError
from roundel.stages import refine
from roundel.stages.judge import Judge

SETTINGS = {"sequences": 8, "seq_len": 32, "eval_sequences": 6, "sweeps": 1, "curvature": "kfac", "prefix_sequences": 8}


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """Text that is measured on in the place of the standard library, which takes longer to read than a tiny model to be refined."""
    path = tmp_path_factory.mktemp("other") / "other.txt"
    path.write_text(tiny.make_text(200, seed=1), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def refined(made, text, other, tmp_path_factory) -> Callable[..., roundel.Quantized]:
    """`refined(path or layout)`: once for each layout."""
    known: dict[str, roundel.Quantized] = {}

    def run(given: Path | str, output: Path | None = None, **settings: object) -> roundel.Quantized:
        if isinstance(given, str) and given in known:
            return known[given]
        path = made(given) if isinstance(given, str) else given
        output = output or tmp_path_factory.mktemp("refined") / "out"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(refine, "OTHER_TEXT", str(other))
            patch.setattr(refine, "JUDGED", 6)
            result = roundel.refine(path, output=output, **{"reference": made.wide, "calibration": str(text), **SETTINGS, **settings})
        if isinstance(given, str):
            known[given] = result
        return result

    return run


def open_file(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: tensor.data for tensor in GGUFReader(path).tensors}


def kl(result: roundel.Quantized, text: str = "held out") -> tuple[float, float]:
    both = result.details["refined"]["texts"][text]
    return both["before"]["kl"]["mean"], both["after"]["kl"]["mean"]


@pytest.mark.parametrize("kind", ["shards", "act-order", "nvfp4", "gguf", "mlx"])
def test_the_kl_falls_in_the_same_bytes(kind, made, refined) -> None:
    result = refined(kind)
    before, after = kl(result)
    assert after < before
    assert result.details["refined"]["better"]
    given, own = files(made(kind)), files(result.path)
    own["README.md"], card = own.pop("README.original.md"), own["README.md"].decode()
    assert json.loads(own.pop("refined.json")) == result.details
    assert {name: len(data) for name, data in given.items()} == {name: len(data) for name, data in own.items()}
    assert {name for name, data in given.items() if own[name] != data} == {name for name in given if name.endswith(("safetensors", "gguf"))}
    assert str(made(kind)) in card
    assert str(made.wide) in card
    rows = [row for row in result.details["layers"].values() if "end" not in row]
    assert min(row["judged_kl"] for row in rows) == [row["judged_kl"] for row in rows if row["taken"]][-1]


def test_linears_of_types_without_a_grid_count_as_they_are(made, refined, other) -> None:
    result = refined("gguf")
    assert set(result.details["refined"]["left"]) == {LEFT}
    for path, expected in zip((made("gguf"), result.path), kl(result, str(other)), strict=True):
        found = roundel.evaluate(path / "model.gguf", reference=made.wide, data=str(other), seq_len=32)
        assert found.report.kl_mean == pytest.approx(expected, rel=1e-4)


def test_what_would_be_refined_is_said_before_work(made, text, command, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(refine, "measure_curvature", None)
    line = ["refine", made("gguf"), "--reference", made.wide, "-o", tmp_path / "out", "--calibration", text, "--seq-len", 32]
    found = command(*line, "--dry-run", "--json", "-")
    assert found.code == 0, found.err
    about = json.loads(found.out)
    assert about["schemes"] == {"q4_0": 11, "q8_0": 2, "q5_0": 1}
    assert list(about["left"]) == [LEFT]
    assert about["bytes"] == sum(map(len, files(made("gguf")).values()))
    assert about["disk"] > 0
    assert about["memory"] > 500_000_000
    assert list(tmp_path.iterdir()) == []
    assert command(*line, "--dry-run").out.count("would be refined") == 3


def test_they_keep_another_model_out(made, refined, tmp_path) -> None:
    with pytest.raises(ModelError, match=f"--transplant: {LEFT}"):
        refined(made("gguf"), tmp_path / "out", transplant=True)


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> Path:
    """A mixture of one layer with a tied head."""
    directory = tmp_path_factory.mktemp("experts")
    torch.manual_seed(0)
    own = {
        "num_hidden_layers": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "tie_word_embeddings": True,
        "norm_topk_prob": True,
    }
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**tiny.MODERN, **own})).to(torch.bfloat16).save_pretrained(directory)
    tiny.make_tokenizer(starts=True).save_pretrained(directory)
    return directory


@pytest.mark.parametrize(("scheme", "form"), [("q4_0", "gguf"), ("int4-g32", "compressed-tensors")])
def test_mixtures_of_experts(scheme, form, experts, quantize, refined, other, tmp_path) -> None:
    given = quantize(experts, tmp_path / "given", scheme=scheme, format=form, **NEAREST).path
    result = refined(given, tmp_path / "out", reference=experts, memory="1K")
    before, after = kl(result)
    assert after < before
    assert any(".experts.3.down_proj" in name for name, row in result.details["layers"].items() if row["taken"])
    assert result.details["refined"]["linears"] == 4 + 3 * 4 + (form == "gguf")  # the tied matrix
    file = result.path / "model.gguf" if form == "gguf" else result.path
    found = roundel.evaluate(file, reference=experts, data=str(other), seq_len=32)
    assert found.report.kl_mean == pytest.approx(kl(result, str(other))[1], rel=2e-3)


def test_a_linear_that_is_two_tensors_of_the_file(quantize, refined, other, tmp_path) -> None:
    """Granite 4's shared gate and up; what is written is what was measured."""
    torch.manual_seed(0)
    states = {"mamba_n_heads": 4, "mamba_d_state": 32, "mamba_n_groups": 1, "mamba_chunk_size": 16, "num_local_experts": 0}
    settings = {**tiny.GROUPED, **states, "shared_intermediate_size": 96, "layer_types": ["linear_attention", "full_attention"]}
    source = tmp_path / "source"
    GraniteMoeHybridForCausalLM(GraniteMoeHybridConfig(**settings)).to(torch.bfloat16).save_pretrained(source)
    tiny.make_tokenizer(starts=True).save_pretrained(source)
    given = quantize(source, tmp_path / "given", scheme="q4_0", format="gguf", **NEAREST).path
    result = refined(given, tmp_path / "out", reference=source)
    before, after = kl(result)
    assert after < before
    assert "model.layers.0.shared_mlp.input_linear" in result.details["layers"]
    old, new = (open_file(path / "model.gguf") for path in (given, result.path))
    assert all((old[name] != new[name]).any() for name in ("blk.0.ffn_gate.weight", "blk.0.ffn_up.weight"))
    found = roundel.evaluate(result.path / "model.gguf", reference=source, data=str(other), seq_len=32)
    assert found.report.kl_mean == pytest.approx(kl(result, str(other))[1], rel=2e-3)


def test_nothing_changes_where_nothing_is_better(made, refined, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Judge, "__call__", lambda self, _index, _decided, _found: self.start)
    result = refined(made("gptq"), tmp_path / "out")
    assert not result.details["refined"]["better"]
    assert result.details["refined"]["linears_changed"] == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (made("gptq") / "model.safetensors").read_bytes()
    assert any("byte for byte" in warning for warning in result.details["warnings"])


def test_it_goes_on_where_it_was_stopped_with_the_weights_on_the_disk(made, refined, tmp_path, monkeypatch) -> None:
    """To the bytes of a run in memory that nothing stopped."""
    real = Judge.__call__

    def stopped(self, index, decided, found) -> float:
        if index == 1:
            raise KeyboardInterrupt
        return real(self, index, decided, found)

    given = {"work": tmp_path / "work", "memory": "1K"}
    monkeypatch.setattr(Judge, "__call__", stopped)
    with pytest.raises(KeyboardInterrupt):
        refined(made("shards"), tmp_path / "out", **given)
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    again, whole = refined(made("shards"), tmp_path / "out", **given), refined("shards")
    for file, data in files(whole.path).items():
        assert file.endswith((".md", "refined.json")) or (again.path / file).read_bytes() == data
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


def test_files_whose_channels_are_scaled(made, quantize, refined, tmp_path) -> None:
    scaled_as_awq_does(made.wide, tmp_path / "scaled")
    given = quantize(tmp_path / "scaled", tmp_path / "given", scheme="int4-g64-asym", format="awq", **NEAREST).path
    result = refined(given, tmp_path / "out")
    before, after = kl(result)
    assert after < before
    assert any("scaled" in warning for warning in result.details["warnings"])
    own = load_file(tmp_path / "out" / "model.safetensors")
    theirs = load_file(given / "model.safetensors")
    assert torch.equal(own["model.layers.0.input_layernorm.weight"], theirs["model.layers.0.input_layernorm.weight"])


def test_another_model_in_the_same_layout(made, refined, tmp_path) -> None:
    other = tmp_path / "other"
    shutil.copytree(made.wide, other)
    tensors = load_file(other / "model.safetensors")
    draw = torch.Generator().manual_seed(2)
    for name, value in tensors.items():
        tensors[name] = (value.float() + 0.3 * value.float().std().nan_to_num(1) * torch.randn(value.shape, generator=draw)).to(value.dtype)
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    given = made("gptq")
    with pytest.raises(ModelError, match="--transplant"):
        refined(given, tmp_path / "no", reference=other)
    result = refined(given, tmp_path / "out", reference=other, transplant=True)
    before, after = kl(result)
    assert after < 0.5 * before
    own, theirs = load_file(tmp_path / "out" / "model.safetensors"), load_file(other / "model.safetensors")
    assert torch.equal(own["model.embed_tokens.weight"], theirs["model.embed_tokens.weight"])
    assert torch.equal(own["model.norm.weight"], theirs["model.norm.weight"])
