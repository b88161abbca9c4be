"""One rounding in every format: exported weights are those that were rounded, and the reports' KL is that of the files."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import GemmaConfig, GemmaForCausalLM, LlamaConfig, LlamaForCausalLM

import roundel
from e2e import tiny
from roundel.artifacts.checkpoints import load_written, read
from roundel.errors import ModelError, OutputError, SchemeError
from roundel.models import load_model
from roundel.models.checkpoint import Checkpoint
from roundel.rounding.round import dequantized


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A Llama of widths that are multiples of 128."""
    directory = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    sizes = {**tiny.SIZES, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "head_dim": 32}
    LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=4)).save_pretrained(directory)
    tiny.make_tokenizer(starts=False).save_pretrained(directory)
    return directory


def logits(path) -> torch.Tensor:
    model = load_written(path, device=torch.device("cpu"), dtype=torch.float32)
    with torch.no_grad():
        return model(torch.arange(5, 45).view(2, 20)).logits


@pytest.fixture(scope="module")
def integers(wide, quantize, tmp_path_factory) -> roundel.Quantized:
    return quantize(wide, tmp_path_factory.mktemp("integers") / "out", scheme="int4-g32", curvature="kfac", sweeps=1)


@pytest.mark.parametrize("form", ["native", "gptq", "awq", "auto-round", "mlx", "dense", "compressed-tensors"])
def test_codes_are_carried_over(form, integers, tmp_path) -> None:
    details = roundel.export(integers.path, output=tmp_path / "out", to=form)
    assert torch.equal(logits(tmp_path / "out"), logits(integers.path))
    assert details["format"] == form
    assert details["exported_from"] == "compressed-tensors"
    assert details["evaluation"] == integers.details["evaluation"]
    assert json.loads((tmp_path / "out" / "roundel.json").read_text()) == details
    if form != "dense":
        again, before = read(tmp_path / "out").rounded, read(integers.path).rounded
        assert {name: weight.scheme for name, weight in again.items()} == {name: weight.scheme for name, weight in before.items()}
        assert all(torch.equal(again[name].codes, before[name].codes) for name in before)
        there_and_back = roundel.export(tmp_path / "out", output=tmp_path / "back", to="compressed-tensors")
        assert there_and_back["layers"] == integers.details["layers"]
        written = (tmp_path / "back" / "model.safetensors").read_bytes()
        assert written == (integers.path / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("scheme", "settings", "form"),
    [
        ("int3-g32-asym", {}, "compressed-tensors"),
        ("nvfp4", {}, "compressed-tensors"),
        ("mxfp4", {}, "compressed-tensors"),
        ("fp8", {}, "compressed-tensors"),
        ("q4_0", {}, "gguf"),
        ("lattice2", {}, "native"),
        ("int8-g32", {"format": "gptq"}, "gptq"),
        ("int3-g32-affine", {"format": "mlx"}, "mlx"),
        ("int4-g32-asym", {"format": "awq"}, "awq"),
        ("int3-g32-asym", {"format": "auto-round"}, "auto-round"),
        ("int4-g32", {"rotate": "fused"}, "compressed-tensors"),
        (
            "trellis2",
            {"format": "exl3", "include": ("*.0.self_attn.q_proj", "*.0.self_attn.k_proj"), "curvature": "auto", "sequences": 64},
            "exl3",
        ),
    ],
    ids=str,
)
def test_the_reported_kl_is_that_of_the_file(scheme, settings, form, wide, quantize, text, tmp_path) -> None:
    given = {"curvature": "kfac", "sweeps": 0, "eval_data": str(text), **settings}
    result = quantize(wide, tmp_path / "out", scheme=scheme, **given)
    assert result.details["format"] == form
    measured = roundel.evaluate(result.path, reference=wide, data=str(text), sequences=4, seq_len=32)
    assert measured.report.kl_mean == pytest.approx(result.report.kl_mean, rel=0.01)
    assert result.report.kl_mean > 1e-6


def test_a_tuned_trellis_is_read_from_exl3(wide, quantize, text, tmp_path) -> None:
    given = {"scheme": "trellis2", "format": "exl3", "include": ("*.0.self_attn.q_proj",), "curvature": "kfac", "sweeps": 0}
    result = quantize(wide, tmp_path / "out", **given, tune="end-to-end", tune_steps=8, eval_data=str(text))
    assert result.details["tuning"]["best_step"] > 0
    (weight,) = read(result.path).rounded.values()
    assert weight.rotation.has_vectors
    measured = roundel.evaluate(result.path, reference=wide, data=str(text), sequences=4, seq_len=32)
    assert measured.report.kl_mean == pytest.approx(result.report.kl_mean, rel=0.01)


def test_widths_that_128_does_not_divide_are_filled_up_in_exl3(quantize, text, tmp_path) -> None:
    """A Qwen2 64 wide, with biases: written, tuned, read, and run by our own module in the format native."""
    tiny.save_model(tmp_path / "model", "qwen2")
    some = {"include": ("*.0.self_attn.q_proj", "*.0.self_attn.v_proj"), "curvature": "kfac", "sweeps": 0, "eval_data": str(text)}
    for form, more in (("exl3", {}), ("exl3", {"tune": "end-to-end", "tune_steps": 2}), ("native", {"rotate": "online128"})):
        out = tmp_path / f"{form}-{len(more)}"
        result = quantize(tmp_path / "model", out, scheme="trellis2", format=form, **some, **more)
        measured = roundel.evaluate(out, reference=tmp_path / "model", data=str(text), sequences=4, seq_len=32)
        assert measured.report.kl_mean == pytest.approx(result.report.kl_mean, rel=0.01)
        assert result.report.kl_mean > 1e-6
    tensors, original = Checkpoint.open(tmp_path / "exl3-0"), Checkpoint.open(tmp_path / "model")
    name = "model.layers.0.self_attn.q_proj"
    bias = original.read(f"{name}.bias")
    assert tensors.read(f"{name}.trellis").shape[:2] == (8, 8)
    assert torch.equal(tensors.read(f"{name}.bias"), torch.nn.functional.pad(bias, (0, 128 - len(bias))))
    roundel.export(tmp_path / "native-1", output=tmp_path / "again", to="exl3")
    torch.testing.assert_close(logits(tmp_path / "again"), logits(tmp_path / "native-1"), rtol=1e-5, atol=1e-5)
    roundel.export(tmp_path / "exl3-0", output=tmp_path / "back", to="native")
    torch.testing.assert_close(logits(tmp_path / "back"), logits(tmp_path / "exl3-0"), rtol=1e-5, atol=1e-5)


def test_a_trellis_is_exported_to_exl3(wide, quantize, tmp_path) -> None:
    result = quantize(
        wide, tmp_path / "out", scheme="trellis2", rotate="online128", curvature="kfac", sweeps=0, include=("*.q_proj",), eval_sequences=1
    )
    assert result.details["format"] == "native"
    roundel.export(result.path, output=tmp_path / "exl3", to="exl3")
    torch.testing.assert_close(logits(tmp_path / "exl3"), logits(result.path), rtol=1e-5, atol=1e-5)  # one of them rotates at run time
    before, after = read(result.path).rounded, read(tmp_path / "exl3").rounded
    assert all(torch.equal(dequantized(after[name]), dequantized(weight)) for name, weight in before.items())
    assert (tmp_path / "exl3" / "quantization_config.json").is_file()
    with pytest.raises(SchemeError, match="trellis2"):
        roundel.export(result.path, output=tmp_path / "ct", to="compressed-tensors")


def test_a_fused_rotation_leaves_nothing_for_the_engine(wide, quantize, tmp_path) -> None:
    result = quantize(wide, tmp_path / "out", scheme="int8-g32", rotate="fused", curvature="kfac", sweeps=0)
    assert all(weight.rotation is None for weight in read(result.path).rounded.values())
    plain = load_model(wide, device=torch.device("cpu"), dtype=torch.float32)
    with torch.no_grad():
        expected = plain(torch.arange(5, 45).view(2, 20)).logits
    assert (logits(result.path) - expected).abs().max() < 0.05 * expected.abs().max()
    assert result.details["fused_rotation"]["logits_difference"] < 1e-5


def test_dequantized_weights_are_what_the_engine_finds(integers) -> None:
    found = load_model(integers.path, device=torch.device("cpu"), dtype=torch.float32)
    for name, weight in read(integers.path).rounded.items():
        assert torch.equal(found.get_submodule(name).weight, dequantized(weight))


@pytest.mark.parametrize(
    ("to", "reason"),
    [
        ("gguf", "q4_0"),
        ("exl3", "trellis"),
        ("hqq", "expected one of"),
        ("gguf:q4_k", "int4-g32"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(to, reason, integers, tmp_path) -> None:
    with pytest.raises(SchemeError, match=reason):
        roundel.export(integers.path, output=tmp_path / "out", to=to)
    assert not (tmp_path / "out").exists()


def test_what_keeps_no_codes_is_refused(integers, wide, tmp_path) -> None:
    roundel.export(integers.path, output=tmp_path / "dense", to="dense")
    with pytest.raises(ModelError, match="does not keep the codes"):
        roundel.export(tmp_path / "dense", output=tmp_path / "out", to="native")
    with pytest.raises(ModelError, match=r"no roundel\.json"):
        roundel.export(wide, output=tmp_path / "out", to="native")
    with pytest.raises(OutputError, match="not an empty directory"):
        roundel.export(integers.path, output=wide, to="native")
    shutil.copytree(integers.path, tmp_path / "damaged")
    report = json.loads((tmp_path / "damaged" / "roundel.json").read_text())
    del report["layers"]["model.layers.0.self_attn.q_proj"]["scheme"]
    (tmp_path / "damaged" / "roundel.json").write_text(json.dumps(report))
    with pytest.raises(ModelError, match="does not say how each linear was rounded"):
        roundel.export(tmp_path / "damaged", output=tmp_path / "out", to="native")


def test_the_command_line_exports(command, integers, tmp_path) -> None:
    done = command("export", str(integers.path), "--to", "gptq", "-o", str(tmp_path / "out"))
    assert done.code == 0, done.err
    assert "linears in gptq" in done.out
    refused = command("export", str(integers.path), "--to", "exl3", "-o", str(tmp_path / "other"))
    assert refused.code == 2
    assert refused.err.startswith("error: ")


def test_blocks_are_exported_to_gguf(wide, quantize, tmp_path) -> None:
    result = quantize(wide, tmp_path / "out", scheme="q4_0", format="native", curvature="kfac", sweeps=0)
    roundel.export(result.path, output=tmp_path / "gguf", to="gguf:q4_0")
    other = load_written(tmp_path / "gguf", device=torch.device("cpu"), dtype=torch.float32)
    for name, weight in read(result.path).rounded.items():
        assert torch.equal(other.get_submodule(name).weight, dequantized(weight))
    with pytest.raises(ModelError, match="does not keep the codes"):
        roundel.export(tmp_path / "gguf", output=tmp_path / "again", to="native")


def test_size_and_speed(command, integers, wide) -> None:
    settings = ("--reference", wide, "--lengths", "16,4096", "--batches", "1,2", "--tokens", "2", "--json", "-")
    done = command("bench", integers.path, *settings)
    assert done.code == 0, done.err
    details = json.loads(done.out)
    assert "lengths are cut to 126 tokens" in done.err
    assert [(row["length"], row["batch"]) for row in details["speed"]] == [(16, 1), (16, 2), (126, 1), (126, 2)]
    own, original = details["models"]["quantized"], details["models"]["original"]
    assert own["disk_bytes"] == (integers.path / "model.safetensors").stat().st_size < original["disk_bytes"]
    assert own["memory_bytes"] >= original["memory_bytes"]  # decompressed when it is loaded, with the scales beside it
    assert all(
        row[name][f"{what}_seconds_per_token"] > 0
        for row in details["speed"]
        for name in details["models"]
        for what in ("prefill", "decode")
    )
    assert command("bench", integers.path, "--tokens", "9000").code == 2


@pytest.mark.parametrize("kind", ["mistral", "gemma"])
def test_a_gguf_that_transformers_does_not_read_is_measured_by_its_bytes(kind, model, quantize, tmp_path) -> None:
    source = model("mistral") if kind == "mistral" else tmp_path / "gemma"
    if kind == "gemma":
        GemmaForCausalLM(GemmaConfig(**tiny.MODERN, tie_word_embeddings=True)).save_pretrained(source)
        tiny.make_tokenizer(starts=True).save_pretrained(source)
    found = {}
    for form in ("gguf", "native"):
        given = {"scheme": "q4_0", "curvature": "kfac", "sweeps": 0, "embedding": "none", "head": "none"}
        found[form] = quantize(source, tmp_path / form, **given, format=form)
    assert found["gguf"].report.kl_mean == pytest.approx(found["native"].report.kl_mean, rel=0.01)
    weights = read(tmp_path / "native").rounded
    loaded = load_written(tmp_path / "gguf", device=torch.device("cpu"), dtype=torch.float32)
    assert all(torch.equal(loaded.get_submodule(name).weight, dequantized(weight)) for name, weight in weights.items())
    damaged = tmp_path / "gguf" / "model.gguf"
    damaged.write_bytes(damaged.read_bytes()[:300])
    with pytest.raises(ModelError):
        load_written(tmp_path / "gguf", device=torch.device("cpu"), dtype=torch.float32)
