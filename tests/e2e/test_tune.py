"""Tuning under the KL: less loss on text that it has not seen, never more, the same formats, and the same end after a crash."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import roundel
from e2e import tiny
from roundel import tuning
from roundel.artifacts.checkpoints import load_written, read
from roundel.errors import DataError, ModelError, SchemeError, StorageError
from roundel.grids import parse_scheme
from roundel.rotation import Rotation
from roundel.rounding import nearest
from roundel.rounding.round import dequantized
from roundel.tuning import end_to_end, steps, teacher
from roundel.tuning.trained import trained
from roundel.types import RoundedWeight

SETTINGS = {"curvature": "kfac", "sweeps": 1, "sequences": 24, "eval_sequences": 6, "tune_tokens": 128}


@pytest.fixture(scope="module")
def much_text(tmp_path_factory) -> str:
    text = tmp_path_factory.mktemp("much") / "text.txt"
    text.write_text(tiny.make_text(60_000))
    return str(text)


@pytest.mark.parametrize(
    ("method", "scheme"), [("end-to-end", "int2-g16-asym"), pytest.param("blocks", "lattice2", marks=pytest.mark.slow)]
)
def test_the_loss_on_other_text_falls(model, quantize, tmp_path, much_text, method: str, scheme: str) -> None:
    few = 8 if method == "blocks" else 40
    text = {"calibration": much_text, "sequences": 160 if method == "blocks" else 300, "eval_sequences": 40, "tune_tokens": 1024}
    given = {**SETTINGS, **text, "scheme": scheme, "rotate": "online", "prefix_aware": False}
    plain = quantize(model(), tmp_path / "plain", **given)
    tuned = quantize(model(), tmp_path / "tuned", **given, tune=method, tune_steps=few, tune_rest=True)
    assert tuned.report.kl_mean < (0.99 if method == "blocks" else 0.96) * plain.report.kl_mean
    assert plain.details["tuning"] is None
    found = tuned.details["tuning"]
    assert found["best_step"] > 0
    assert found["held_out_kl"]["after"] < found["held_out_kl"]["before"]
    assert tuned.details["predicted_kl"]["by"] == "joint"
    assert plain.details["predicted_kl"]["by"] == "total"
    assert found["other_parameters"] == (4 if method == "blocks" else 7)  # no layer has the last norm, embedding and head
    if method == "end-to-end":
        assert [row["step"] for row in found["history"]] == list(range(0, few + 1, few // 8))
        assert found["best_step"] == min(found["history"], key=lambda row: row["held_out_kl"])["step"]
        assert tuned.details["bits_per_weight"] == plain.details["bits_per_weight"]
    else:
        assert [row["layer"] for row in found["history"]] == ["model.layers.0", "model.layers.1"]
        for row in found["history"]:
            assert row["best_step"] == min(row["checks"], key=lambda check: check["loss"])["step"]


def test_a_start_that_is_not_improved_is_kept(model, quantize, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(steps, "SMALLEST", 5.0)  # throws everything about
    monkeypatch.setattr(steps, "NEW_TEXT", 5.0)
    monkeypatch.setattr(steps, "LARGEST", 5.0)
    monkeypatch.setattr(steps, "SCALE_STEP", 5.0)
    plain = quantize(model(), tmp_path / "plain", scheme="int4-g16", **SETTINGS)
    for method in ("end-to-end", "blocks"):
        tuned = quantize(model(), tmp_path / method, scheme="int4-g16", tune=method, tune_steps=3, **SETTINGS)
        assert tuned.details["tuning"]["best_step"] == 0
        assert any("tuning did not lower" in warning for warning in tuned.details["warnings"])
        assert tuned.report == plain.report
        written = (tuned.path / "model.safetensors").read_bytes()
        assert written == (plain.path / "model.safetensors").read_bytes()


FORMATS_OF = {
    "int4-g32": ("native", "gptq", "dense"),
    "nvfp4": ("native",),
    "lattice2": ("native",),
    "q4_0": ("native", "gguf"),
}


@pytest.mark.parametrize("scheme", [pytest.param(each, marks=[pytest.mark.slow] if each == "nvfp4" else []) for each in FORMATS_OF])
def test_tuned_weights_go_into_every_format(model, quantize, tmp_path, scheme: str) -> None:
    """Also norms, and vectors in place of signs; `quantize` has measured the KL of what its own format's reader gives."""
    form = "native" if scheme == "q4_0" else "auto"
    given = {**SETTINGS, "sweeps": 0, "scheme": scheme, "format": form}  # what is left to gain is more than a processor's rounding
    plain = quantize(model(), tmp_path / "plain", **given)
    steps = 40 if "4" in scheme else 8  # 4 bits are hardest to make better
    result = quantize(model(), tmp_path / "out", **given, tune="end-to-end", tune_steps=steps, tune_rest=True)
    assert result.details["tuning"]["best_step"] > 0
    assert (result.path / "model.safetensors").read_bytes() != (plain.path / "model.safetensors").read_bytes()
    ids = torch.arange(5, 45).view(2, 20)
    with torch.no_grad():
        expected = load_written(result.path, device=torch.device("cpu"), dtype=torch.float32)(ids).logits
        for to in FORMATS_OF[scheme]:
            roundel.export(result.path, output=tmp_path / to, to=to)
            again = load_written(tmp_path / to, device=torch.device("cpu"), dtype=torch.float32)
            close = {"rtol": 1e-2, "atol": 5e-3} if to == "gguf" else {"rtol": 1e-5, "atol": 1e-5}  # whose embeddings are in 16 bits
            torch.testing.assert_close(again(ids).logits, expected, **close)
    assert len(read(result.path).rounded) == len(result.details["layers"])


def test_tuning_what_is_written_is_tuning_at_once(model, quantize, tmp_path) -> None:
    given = {**SETTINGS, "scheme": "int3-g16"}
    plain = quantize(model(), tmp_path / "plain", **given)
    at_once = quantize(model(), tmp_path / "once", **given, tune="end-to-end", tune_steps=5)
    later = roundel.tune(plain.path, output=tmp_path / "later", tune_steps=5)
    assert (later.path / "model.safetensors").read_bytes() == (at_once.path / "model.safetensors").read_bytes()
    assert later.report == at_once.report
    assert later.details["tuning"] == at_once.details["tuning"]
    assert later.details["tuned_from"] == str(plain.path)
    with pytest.raises(ModelError, match="is not the original"):
        roundel.tune(plain.path, output=tmp_path / "no", model=model("qwen2"))
    with pytest.raises(SchemeError, match="nothing to do"):
        roundel.tune(plain.path, output=tmp_path / "no", tune="none")


@pytest.mark.parametrize("method", ["end-to-end", "blocks"])
def test_tuning_goes_on_from_all_that_an_earlier_one_has_moved(model, quantize, tmp_path, method: str) -> None:
    """The embedding and head too; without `tune_rest` they stay where they are."""
    original, text = model(), {**SETTINGS, "scheme": "int3-g16"}
    once = quantize(original, tmp_path / "once", **text, tune="end-to-end", tune_steps=8)
    assert once.details["tuning"]["best_step"] > 0
    twice = roundel.tune(once.path, output=tmp_path / "twice", tune=method, tune_steps=4, tune_rest=False)
    found = twice.details["tuning"]
    assert found["held_out_kl"]["before"] == pytest.approx(once.details["tuning"]["held_out_kl"]["after"], rel=1e-5)
    assert found["other_parameters"] == once.details["tuning"]["other_parameters"]
    first, second = (load_file(result.path / "model.safetensors") for result in (once, twice))
    named = load_file(Path(original) / "model.safetensors")
    rest = [name for name in first if name in named]
    assert sum(not torch.equal(first[name], named[name]) for name in rest) == found["other_parameters"]
    assert all(torch.equal(first[name], second[name]) for name in rest)


@pytest.mark.parametrize("method", ["end-to-end", "blocks"])
def test_killed_and_resumed_it_ends_in_the_same_place(model, quantize, tmp_path, monkeypatch, method: str) -> None:
    given = {**SETTINGS, "scheme": "int3-g16", "tune": method, "tune_steps": 8, "tune_rest": True}
    whole = quantize(model(), tmp_path / "whole", **given)
    work, taken = tmp_path / "work", 0
    take = steps.Steps.take

    def killed(self: steps.Steps) -> None:
        nonlocal taken
        taken += 1
        if taken == 11 if method == "blocks" else taken == 6:
            raise KeyboardInterrupt
        take(self)

    monkeypatch.setattr(steps.Steps, "take", killed)
    with pytest.raises(KeyboardInterrupt):
        quantize(model(), tmp_path / "out", **given, work=work)
    assert not (tmp_path / "out").exists()
    assert {"curvature", "rounded", "tuning.safetensors"} <= {path.name for path in work.iterdir()}
    first = taken
    monkeypatch.setattr("roundel.stages.rounding.model.round_linears", None)  # is not called again
    resumed = quantize(model(), tmp_path / "out", **given, work=work)
    assert taken - first == (8 if method == "blocks" else 3)  # no step of what was saved is taken again
    assert (resumed.path / "model.safetensors").read_bytes() == (whole.path / "model.safetensors").read_bytes()
    assert resumed.details["tuning"] == whole.details["tuning"]
    with pytest.raises(StorageError, match="another run"):
        quantize(model(), tmp_path / "other", **{**given, "tune_steps": 9}, work=work)
    (work / "tuning.safetensors").write_bytes(b"damaged")
    with pytest.raises(StorageError, match="cannot be read"):
        quantize(model(), tmp_path / "other", **given, work=work)


@pytest.mark.parametrize("scheme", ["int3-g8", "int2-channel", "int3-g8-asym", "int8-tensor", "nvfp4", "mxfp4", "fp8", "lattice2", "q4_0"])
@pytest.mark.parametrize("rotated", [False, True])
def test_the_start_of_the_steps_is_the_rounded_weight(scheme: str, rotated: bool) -> None:
    """Whatever the original is, parameters give the codes and the weight that they start from, and all take gradients."""
    grid = parse_scheme(scheme)
    linear = torch.nn.Linear(32, 10)
    W = linear.weight.detach()
    scales = grid.fit_scales(W, torch.ones(32), torch.float16)
    other = W.roll(1, 0)
    codes = (
        grid.encode_tiles(grid.to_tiles(other / scales["scale"])).unflatten(0, (-1, 4))
        if scheme == "lattice2"
        else nearest(other, grid, scales)
    )
    rotation = Rotation.draw(10, 32, "hadamard", seed=1) if rotated else None
    weight = RoundedWeight(scheme=scheme, codes=codes, scales=scales, shape=(10, 32), rotation=rotation)
    module = trained(linear, weight)
    torch.testing.assert_close(dequantized(module.stored()), dequantized(weight), rtol=2e-3, atol=1e-4)
    if not isinstance(rotation, Rotation) or scheme != "lattice2":
        assert torch.equal(module.stored().codes, weight.codes)
        for name, scale in scales.items():
            assert torch.equal(module.stored().scales[name], scale)
    x = torch.randn(3, 32)
    torch.testing.assert_close(module(x), torch.nn.functional.linear(x, dequantized(weight), linear.bias), rtol=1e-4, atol=1e-4)
    module(x).square().sum().backward()
    for parameter in (*module.codes, *module.scales):
        assert parameter.grad is not None
        assert (parameter.grad != 0).any()


def test_steps_in_parts_and_with_recomputed_layers_are_the_same(model, quantize, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(importlib.import_module("roundel.linalg.fast"), "_has_units", lambda: False)  # products rounded as a whole
    given = {**SETTINGS, "scheme": "int3-g16", "tune": "end-to-end", "tune_steps": 2, "tune_tokens": 256}
    whole = quantize(model(), tmp_path / "whole", **given)
    monkeypatch.setattr(end_to_end, "TOKENS", 96)  # 3 passes of 3, 3 and 2 sequences
    monkeypatch.setattr(end_to_end, "RECOMPUTED", 0)
    monkeypatch.setattr(teacher, "CACHE", 0)
    parts = quantize(model(), tmp_path / "parts", **given)
    for first, second in zip(whole.details["tuning"]["history"], parts.details["tuning"]["history"], strict=True):
        assert first == pytest.approx(second, rel=1e-4)


def test_what_cannot_be_tuned_is_refused(model, quantize, tmp_path) -> None:
    with pytest.raises(SchemeError, match="expected one of none, end-to-end, blocks"):
        roundel.Recipe(tune="layers")
    with pytest.raises(DataError, match="two calibration sequences"):
        quantize(model(), tmp_path / "out", **{**SETTINGS, "sequences": 1}, scheme="int4-g32", tune="end-to-end")
    with pytest.raises(SchemeError, match="one list of decoder layers"):
        tuning.blocks.layers_of(torch.nn.Linear(2, 2))


def test_the_command(model, quantize, tmp_path, command) -> None:
    plain = quantize(model(), tmp_path / "plain", scheme="int3-g16", **SETTINGS)
    outcome = command(
        "tune", plain.path, "-o", tmp_path / "tuned", "--tune-steps", 2, "--tune", "blocks", "--json", tmp_path / "report.json"
    )
    assert outcome.code == 0
    assert "KL on other text before and after tuning" in outcome.out
    report = json.loads(Path(tmp_path / "report.json").read_text())
    assert report["tuning"]["method"] == "blocks"
    assert report == json.loads((tmp_path / "tuned" / "roundel.json").read_text())
    assert command("tune", tmp_path / "nothing", "-o", tmp_path / "no").code == 2
