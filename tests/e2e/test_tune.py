"""Tuning codes and scales under the KL: less loss on text that it has not seen, never more, and the same formats."""

from __future__ import annotations

import json

import pytest
import torch

import roundel
from e2e import tiny
from roundel import tune
from roundel.checkpoints import load_written, read
from roundel.errors import DataError, SchemeError
from roundel.grids import parse_scheme
from roundel.rounding import nearest
from roundel.rounding.round import dequantized
from roundel.types import RoundedWeight

SETTINGS = {"curvature": "kfac", "sweeps": 1, "sequences": 24, "eval_sequences": 6}


def test_the_loss_on_other_text_falls(model, quantize, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tune, "TOKENS", 1024)
    monkeypatch.setattr(tune, "STEP", 1e-2)
    text = tmp_path / "text.txt"
    text.write_text(tiny.make_text(60_000))
    given = {**SETTINGS, "scheme": "int2-g16-asym", "rotate": "online", "calibration": str(text), "sequences": 500, "eval_sequences": 40}
    plain = quantize(model(), tmp_path / "plain", **given)
    tuned = quantize(model(), tmp_path / "tuned", **given, tune="end-to-end", tune_steps=60)
    assert tuned.report.kl_mean < 0.95 * plain.report.kl_mean
    assert plain.details["tuning"] is None
    found = tuned.details["tuning"]
    assert [row["step"] for row in found["history"]] == [0, 7, 14, 21, 28, 35, 42, 49, 56, 60]
    best = min(found["history"], key=lambda row: row["held_out_kl"])
    assert found["best_step"] == best["step"] > 0
    assert tuned.details["bits_per_weight"] == plain.details["bits_per_weight"]


def test_a_start_that_is_not_improved_is_kept(model, quantize, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tune, "STEP", 5.0)  # throws everything about
    plain = quantize(model(), tmp_path / "plain", scheme="int4-g16", **SETTINGS)
    tuned = quantize(model(), tmp_path / "tuned", scheme="int4-g16", tune="end-to-end", tune_steps=3, **SETTINGS)
    assert tuned.details["tuning"]["best_step"] == 0
    assert any("tuning did not lower" in warning for warning in tuned.details["warnings"])
    assert tuned.report == plain.report
    written = (tuned.path / "model.safetensors").read_bytes()
    assert written == (plain.path / "model.safetensors").read_bytes()


def test_tuned_codes_go_into_every_format(model, quantize, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tune, "TOKENS", 128)
    result = quantize(model(), tmp_path / "out", scheme="int4-g32", tune="end-to-end", tune_steps=8, **SETTINGS)
    for form in ("native", "gptq"):
        roundel.export(result.path, output=tmp_path / form, to=form)
        again = load_written(tmp_path / form, device=torch.device("cpu"), dtype=torch.float32)
        with torch.no_grad():
            ids = torch.arange(5, 45).view(2, 20)
            expected = load_written(result.path, device=torch.device("cpu"), dtype=torch.float32)(ids).logits
            torch.testing.assert_close(again(ids).logits, expected, rtol=1e-6, atol=1e-6)
    assert json.loads((result.path / "roundel.json").read_text())["recipe"]["tune"] == "end-to-end"
    assert len(read(result.path).rounded) == len(result.details["layers"])


@pytest.mark.parametrize("scheme", ["int3-g8", "int2-channel", "int3-g8-asym", "int8-tensor"])
def test_the_start_of_the_steps_is_the_rounded_weight(scheme: str) -> None:
    """Whatever the original is, the latent codes round to the given ones, and the forward pass is that of the dense weight."""
    grid = parse_scheme(scheme)
    linear = torch.nn.Linear(24, 10)
    W = linear.weight.detach()
    scales = grid.fit_scales(W, torch.ones(24), torch.float16)
    weight = RoundedWeight(scheme=scheme, codes=nearest(W.roll(1, 0), grid, scales), scales=scales, shape=(10, 24))
    latent = tune._Latent(linear, weight)
    assert torch.equal(latent.stored().codes, weight.codes)
    assert torch.equal(latent.stored().scales["scale"], scales["scale"])
    x = torch.randn(3, 24)
    torch.testing.assert_close(latent(x), torch.nn.functional.linear(x, dequantized(weight), linear.bias))
    latent(x).square().sum().backward()
    assert latent.latent.grad is not None
    assert latent.factor.grad is not None
    assert (latent.factor.grad != 0).any()


def test_what_cannot_be_tuned_is_refused(model, quantize, tmp_path) -> None:
    for scheme in ("trellis2", "nvfp4", "q4_k"):
        with pytest.raises(SchemeError, match="tuning moves the codes of integers"):
            roundel.Recipe(scheme=scheme, tune="end-to-end")
    with pytest.raises(SchemeError, match="expected one of none, end-to-end"):
        roundel.Recipe(tune="blocks")
    with pytest.raises(DataError, match="two calibration sequences"):
        quantize(model(), tmp_path / "out", scheme="int4-g32", tune="end-to-end", curvature="kfac", sequences=1)
