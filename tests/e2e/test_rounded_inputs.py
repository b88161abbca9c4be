"""Schemes whose inputs engines round too (`-a8`): what is measured is what plain Transformers computes, and rounding knows of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import roundel
from e2e import tiny
from roundel.artifacts.checkpoints import load_written
from roundel.artifacts.source import load_source
from roundel.errors import SchemeError
from roundel.evaluate import compare_models
from roundel.grids.inputs import round_inputs
from roundel.models import load_model
from roundel.progress import Silent
from roundel.recipes import Recipe
from roundel.stages.notes import Notes
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


@pytest.mark.parametrize("scheme", ["int8-channel-a8", "fp8-a8", "nvfp4-a4"])
def test_the_report_has_the_kl_of_plain_transformers(scheme: str, place) -> None:
    recipe = Recipe.of(scheme=scheme, calibration=str(place / "text.txt"), **SHORT)
    split = read_text(recipe, load_source(str(place / "model"), recipe, "cpu", "float32"), Notes(Silent()), known=frozenset(), given={})
    found = quantized(place, scheme)
    kind = {"device": torch.device("cpu"), "dtype": torch.float32}
    own = compare_models(load_written(found.path, **kind), load_model(place / "model", **kind), split.heldout, batch_size=2)
    assert found.report.kl_mean == pytest.approx(own.kl_mean, rel=1e-3)
    assert "of rounded weights alone" in (found.path / "README.md").read_text()
    plain = quantized(place, scheme.rpartition("-")[0])
    assert found.report.kl_mean > 1.2 * plain.report.kl_mean, "what inputs lose is in the number"


def test_targets_know_the_rounded_inputs(place) -> None:
    """Weights of 8 bits lose next to nothing themselves, but can take back a part of what inputs lose."""
    aware = quantized(place, "fp8-a8", "-aware", prefix_aware=True)
    blind = quantized(place, "fp8-a8", "-blind", prefix_aware=False)
    assert aware.report.kl_mean < blind.report.kl_mean
    aware = quantized(place, "nvfp4-a4", "-aware", prefix_aware=True)
    blind = quantized(place, "nvfp4-a4", "-blind", prefix_aware=False)
    assert aware.report.kl_mean < 0.95 * blind.report.kl_mean


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
