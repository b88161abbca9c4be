"""Every family of grids through the whole pipeline; rotation; checkpoints with dense weights or several schemes; bits for each linear."""

from __future__ import annotations

import json

import pytest
import torch

import roundel
from e2e import tiny
from roundel.artifacts.checkpoints import load_written
from roundel.errors import SchemeError
from roundel.grids import parse_scheme
from roundel.integration.linear import QuantizedLinear
from roundel.rounding.round import dequantized
from roundel.stages.rounding import model as rounding_model

FAMILIES = ["int4-g16-asym", "int3-tensor", "nvfp4", "mxfp4", "fp8", "q4_0", "lattice2", "trellis3-s6"]
WRITTEN = {"q4_0": "gguf", "lattice2": "native", "trellis3-s6": "native"}
"""What `--format auto` writes where it is not compressed-tensors."""


@pytest.fixture
def seen(monkeypatch):
    """The rounded weights that `quantize` writes, by linear."""
    kept = {}
    original = rounding_model.round_linears

    def spy(recipe, grid, linears, device, **options):
        results = original(recipe, grid, linears, device, **options)
        kept.update({(linear.name, rounded.scheme): rounded for linear, (rounded, _) in zip(linears, results, strict=True)})
        return results

    monkeypatch.setattr(rounding_model, "round_linears", spy)
    return kept


def found(path) -> dict[str, torch.Tensor]:
    """Dense weights of a directory, as the engine of its format finds them."""
    model = load_written(path, device=torch.device("cpu"), dtype=torch.float32)
    kinds = {True: lambda module: module.dequantized(), False: lambda module: module.weight.detach()}
    return {
        name: kinds[isinstance(module, QuantizedLinear)](module)
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear | torch.nn.Linear)
    }


@pytest.mark.parametrize("scheme", FAMILIES)
def test_a_scheme_goes_through_the_whole_pipeline(scheme, model, quantize, tmp_path, seen) -> None:
    result = quantize(model(), tmp_path / "out", scheme=scheme, sweeps=1, curvature="mean")
    details, grid = result.details, parse_scheme(scheme)
    assert details["format"] == WRITTEN.get(scheme, "compressed-tensors")
    assert 0 < result.report.kl_mean < (3 if grid.bits < 4 else 1)
    loaded = found(result.path)
    bits, linears = 0.0, {name: row for name, row in details["layers"].items() if "end" not in row}
    for name, row in linears.items():
        rounded = seen[name, scheme]
        assert (rounded.rotation is not None) == grid.rotates
        assert torch.equal(loaded[name], dequantized(rounded)), name
        stored = row["bits_per_weight"] * loaded[name].numel()
        scale_type = next((s.dtype for s in rounded.scales.values() if s.dtype in (torch.float16, torch.bfloat16)), torch.float16)
        least = grid.stored_bits(rounded.shape, scale_type) + (sum(rounded.shape) if grid.rotates else 0)
        assert least <= stored <= 1.02 * least + 32 * sum(rounded.shape)  # rows are filled up to words
        bits += stored
    weights = sum(loaded[name].numel() for name in linears)
    assert details["bits_per_weight"]["quantized"] == pytest.approx(bits / weights)


def test_a_rotation_changes_the_codes_and_is_undone(model, quantize, tmp_path) -> None:
    straight, rotated = (
        quantize(model(), tmp_path / kind, scheme="int4-g16", rotate=kind, curvature="mean") for kind in ("none", "online")
    )
    assert straight.details["format"] == "compressed-tensors"
    assert rotated.details["format"] == "native"
    assert rotated.details["predicted_kl"]["total"] != straight.details["predicted_kl"]["total"]
    assert rotated.report.kl_mean < 3 * straight.report.kl_mean


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"scheme": "trellis2", "format": "compressed-tensors"}, "cannot hold trellis2"),
        ({"scheme": "int4-g16", "rotate": "online", "format": "compressed-tensors"}, "cannot hold int4-g16, rotated"),
        ({"rotate": "fourier"}, "rotate 'fourier': expected one of auto, none"),
        ({"format": "ggml"}, "format 'ggml': expected one of auto, compressed-tensors"),
        ({"format": "gguf", "scheme": "int4-g16"}, "q4_0"),
        ({"format": "gptq", "scheme": "int3-g16"}, "compressed-tensors"),
        ({"format": "gptq", "scheme": "int4-g16", "bits": 6.0}, "gptq holds one scheme in a model, and here are int4-g16, int8-g16"),
        ({"format": "exl3", "scheme": "trellis2-hyb"}, "mul1"),
        ({"format": "gguf:q4_0", "scheme": "int3-g16"}, "expected gguf:TYPE"),
        ({"schemes": ("int3-g16", "int4-g16")}, "need bits"),
        ({"bits": 0.5}, "bits is 0.5"),
        ({"bits": 4.0, "scheme": "fp8"}, "give the schemes to choose from"),
        ({"bits": 1.5, "scheme": "int3-g16"}, "ask for more bits"),
        ({"scheme": "int4-g16", "rotate": "online", "curvature": "guided"}, "cannot be rotated together"),
        ({"scheme": "int3-tensor", "curvature": "guided"}, "need scales for each row"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_with_the_reason(settings, reason, model, quantize, tmp_path) -> None:
    with pytest.raises(SchemeError, match=reason):
        quantize(model(), tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_bits_are_allocated_within_the_average(model, quantize, tmp_path, seen) -> None:
    result = quantize(model(), tmp_path / "out", scheme="int3-g16", bits=4.8, sequences=64, seq_len=16, sweeps=1)
    details = result.details
    schemes = {name: row["scheme"] for name, row in details["layers"].items()}
    report = details["allocation"]
    assert details["bits_per_weight"]["quantized"] <= 4.8
    assert report["uniform"]["scheme"] in {"int3-g16", "int2-g16"}
    assert set(report) == {"bits", "schemes", "predicted_kl", "uniform"}
    assert 0 < report["predicted_kl"] < report["uniform"]["predicted_kl"]  # the best single scheme is one of the solutions
    assert len(set(schemes.values())) > 1
    for k in range(2):
        layer = f"model.layers.{k}."
        assert len({schemes[f"{layer}self_attn.{part}_proj"] for part in "qkv"}) == 1
        assert len({schemes[f"{layer}mlp.{part}_proj"] for part in ("gate", "up")}) == 1
    groups = json.loads((result.path / "config.json").read_text())["quantization_config"]["config_groups"]
    assert len(groups) == len(set(schemes.values()))
    loaded = found(result.path)
    for name, scheme in schemes.items():
        assert torch.equal(loaded[name], dequantized(seen[name, scheme])), name


@pytest.mark.slow
def test_mixed_schemes_lose_less_than_the_best_single_one(model, quantize, tmp_path) -> None:
    """Measured on other text, as predicted."""
    text = tmp_path / "text.txt"
    text.write_text(tiny.make_text(60_000))
    given = {"calibration": str(text), "sequences": 128, "seq_len": 32, "eval_sequences": 24, "sweeps": 1}
    mixed = quantize(model(), tmp_path / "mixed", scheme="int3-g16", bits=4.0, **given)
    uniform = mixed.details["allocation"]["uniform"]
    single = quantize(model(), tmp_path / "single", scheme=uniform["scheme"], **given)
    assert single.details["bits_per_weight"]["quantized"] <= mixed.details["bits_per_weight"]["quantized"] <= 4.0
    assert mixed.report.kl_mean < single.report.kl_mean


def test_where_only_one_scheme_fits_all_linears_get_it(model, quantize, tmp_path) -> None:
    given = {"format": "dense", "sequences": 64, "seq_len": 16, "sweeps": 1}
    result = quantize(model(), tmp_path / "out", schemes=("int3-g16", "int4-g16"), bits=4.0, **given)
    assert {row["scheme"] for row in result.details["layers"].values()} == {"int3-g16"}
    report = result.details["allocation"]
    assert report["uniform"] == {"scheme": "int3-g16", "predicted_kl": report["predicted_kl"]}


def test_the_command_line_allocates(command, model, text, tmp_path) -> None:
    settings = ["--sequences", "8", "--seq-len", "16", "--eval-sequences", "4", "--calibration", str(text), "--sweeps", "0"]
    options = ["--bits", "4.6", "--schemes", "int3-g16,int5-g16", "--format", "dense", "--json", "-"]
    done = command("quantize", str(model()), "-o", str(tmp_path / "out"), *settings, *options)
    assert done.code == 0, done.err
    details = json.loads(done.out)
    assert details["scheme"] == "4.6 bits"
    assert details["allocation"]["schemes"] == ["int3-g16", "int5-g16"]
    assert set(details["allocation"]["uniform"]) == {"scheme", "predicted_kl"}
    assert isinstance(roundel.Recipe(bits=4.6, schemes=("int3-g16", "int5-g16")).candidate_schemes(), tuple)
