"""Schemes whose inputs engines round too (`-a8`): what is measured is what plain Transformers computes, and rounding knows of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from safetensors import safe_open

import roundel
from e2e import tiny
from roundel.artifacts.checkpoints import load_written
from roundel.artifacts.source import load_source
from roundel.errors import ModelError, SchemeError
from roundel.evaluate import compare_models
from roundel.grids.inputs import round_inputs
from roundel.models import load_model
from roundel.progress import Silent
from roundel.recipes import Recipe
from roundel.stages.notes import Notes
from roundel.stages.plan import plan
from roundel.stages.text import read_text

SHORT = {"seq_len": 32, "sequences": 24, "eval_sequences": 8, "sweeps": 1, "curvature": "kfac"}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("inputs")
    tiny.save_model(path / "model", "llama")
    (path / "text.txt").write_text(tiny.make_text(60_000))
    return path


def quantized(place: Path, scheme: str, name: str = "", **settings):
    return roundel.quantize(
        place / "model", output=place / f"out-{scheme}{name}", scheme=scheme, calibration=str(place / "text.txt"), **{**SHORT, **settings}
    )


def lost_in_transformers(model: Path, directory: Path, **given) -> float:
    """The KL of what Transformers reads, on the text that is held out."""
    recipe, kind = Recipe.of(**given), {"device": torch.device("cpu"), "dtype": torch.float32}
    split = read_text(recipe, load_source(str(model), recipe, "cpu", "float32"), Notes(Silent()), known=frozenset(), given={})
    return compare_models(load_written(directory, **kind), load_model(model, **kind), split.heldout, batch_size=2).kl_mean


@pytest.mark.parametrize("scheme", ["int8-channel-a8", "fp8-a8", "nvfp4-a4"])
def test_the_report_has_the_kl_of_plain_transformers(scheme: str, place) -> None:
    found = quantized(place, scheme)
    lost = lost_in_transformers(place / "model", found.path, scheme=scheme, calibration=str(place / "text.txt"), **SHORT)
    assert found.report.kl_mean == pytest.approx(lost, rel=1e-3)
    assert "of rounded weights alone" in (found.path / "README.md").read_text()
    plain = quantized(place, scheme.rpartition("-")[0])
    assert found.report.kl_mean > 1.2 * plain.report.kl_mean, "what inputs lose is in the number"


def test_targets_know_the_rounded_inputs(place) -> None:
    """Weights can take back a part of what inputs lose."""
    aware = quantized(place, "nvfp4-a4", "-aware", prefix_aware=True)
    blind = quantized(place, "nvfp4-a4", "-blind", prefix_aware=False)
    assert aware.report.kl_mean < 0.95 * blind.report.kl_mean


@pytest.mark.parametrize("name", ["llama", "gemma3", pytest.param("qwen3", marks=pytest.mark.slow)])
def test_keys_and_values_in_fp8(name: str, place, tmp_path) -> None:
    """Transformers rounds them as it reads the directory, and loses what the report says."""
    tiny.save_model(tmp_path / "model", name)
    given = {"scheme": "int8-channel", "calibration": str(place / "text.txt"), **SHORT}
    found = roundel.quantize(tmp_path / "model", output=tmp_path / "out", kv_cache="fp8", **given)
    settings = json.loads((found.path / "config.json").read_text())["quantization_config"]
    assert settings["kv_cache_scheme"]["type"] == "float"
    with safe_open(found.path / "model.safetensors", framework="pt") as tensors:
        scales = {key: tensors.get_tensor(key) for key in tensors.keys() if key.endswith(("k_scale", "v_scale"))}  # noqa: SIM118
    assert len(scales) == 2 * sum(name.endswith("k_proj") for name in found.details["layers"])
    assert all((scale > 0).all() and scale.shape == (1,) for scale in scales.values())
    assert found.report.kl_mean == pytest.approx(lost_in_transformers(tmp_path / "model", found.path, **given), rel=1e-3)
    plain = roundel.quantize(tmp_path / "model", output=tmp_path / "plain", **given)
    assert found.report.kl_mean > 1.2 * plain.report.kl_mean
    roundel.export(found.path, to="compressed-tensors", output=tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (found.path / "model.safetensors").read_bytes()
    assert json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"] == settings
    roundel.export(found.path, to="native", output=tmp_path / "native")
    with safe_open(tmp_path / "native" / "model.safetensors", framework="pt") as tensors:
        assert not any(key.endswith(("k_scale", "v_scale")) for key in tensors.keys())  # noqa: SIM118


def test_a_format_without_a_place_for_the_scales(place, tmp_path) -> None:
    given = {"scheme": "mxfp4", "calibration": str(place / "text.txt"), **SHORT}
    found = roundel.quantize(place / "model", output=tmp_path / "out", kv_cache="fp8", format="compressed-tensors", **given)
    roundel.export(found.path, to="gguf:mxfp4", output=tmp_path / "gguf")
    names = [tensor.name for tensor in GGUFReader(tmp_path / "gguf" / "model.gguf").tensors]
    assert names
    assert not any("scale" in name for name in names)


def test_no_attention_whose_keys_could_be_kept(place, tmp_path) -> None:
    tiny.save_model(tmp_path / "model", "gpt-neox")
    with pytest.raises(ModelError, match="no attention of this model"):
        roundel.quantize(tmp_path / "model", output=tmp_path / "out", scheme="int4-g32", kv_cache="fp8", **SHORT)
    with pytest.raises(ModelError, match="no attention of this model"):
        plan(tmp_path / "model", scheme="int4-g32", kv_cache="fp8")


def test_mixed_with_others(place) -> None:
    found = quantized(place, "int4-channel", "-mixed", bits=6.5, schemes=("int4-channel", "int8-channel-a8"))
    config = json.loads((found.path / "config.json").read_text())["quantization_config"]
    groups = {group["weights"]["num_bits"]: group["input_activations"] for group in config["config_groups"].values()}
    assert groups[4] is None
    assert groups[8]["dynamic"] is True


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scheme": "int4-g32-a8"}, "try int8-channel-a8"),
        ({"scheme": "int8-channel-a8", "format": "gguf"}, "--scheme int8-channel"),
        ({"scheme": "fp8-a8", "format": "native"}, "--format compressed-tensors"),
        ({"scheme": "fp8-a8", "format": "dense"}, "--format compressed-tensors"),
        ({"scheme": "fp8-a8", "tune": "end-to-end"}, "cannot be tuned"),
        ({"scheme": "fp8-a8", "natural_places": 2}, "--natural-places 2"),
        ({"scheme": "int4-g32", "format": "native", "kv_cache": "fp8"}, "use compressed-tensors"),
        ({"scheme": "int4-g32", "kv_cache": "int8"}, "expected one of none, fp8"),
    ],
)
def test_what_cannot_be_is_refused(settings, message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        Recipe(**settings)


def test_tokens_are_rounded_by_themselves() -> None:
    x = torch.tensor([[0.0, 0.0], [1e-30, -1e-30], [3.0, -400.0], [1e30, 1.0]])
    for kind in ("int8", "fp8"):
        found = round_inputs(x, kind)
        assert torch.equal(found[0], x[0])
        assert torch.isfinite(found).all()
        assert ((found - x).abs() <= x.abs().amax(-1, keepdim=True) / 16).all()
        assert torch.equal(round_inputs(x[2:3], kind), found[2:3])
        assert round_inputs(x.to(torch.bfloat16), kind).dtype == torch.bfloat16
