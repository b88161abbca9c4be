"""Factors directories: reused, resumed after a kill, merged, split over processes, refused when they do not fit."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import roundel
from e2e import ranks, tiny
from e2e.conftest import SETTINGS
from roundel.artifacts.factors import FactorsDirectory, merge
from roundel.errors import FactorsError
from roundel.stages.collecting import collect_factors

ENOUGH = {"sequences": 64, "seq_len": 32, "eval_sequences": 4}
"""The fewest sequences of which the default estimator holds some out: 8."""


def options(settings: dict[str, int]) -> list[object]:
    """As on the command line."""
    return [part for name, value in settings.items() for part in ("--" + name.replace("_", "-"), value)]


@pytest.fixture
def collect(model: Callable[..., Path], text: Path, tmp_path: Path) -> Callable[..., Path]:
    def run(name: str, **settings: Any) -> Path:
        source = settings.pop("source", None) or model()
        collect_factors(source, output=tmp_path / name, **{"calibration": str(text), **SETTINGS, **settings})
        return tmp_path / name

    return run


def sums(directory: Path) -> dict[str, torch.Tensor]:
    """Of all groups of layers, by name."""
    found: dict[str, torch.Tensor] = {}
    for path in directory.glob("sums-*.safetensors"):
        own = load_file(path)
        assert not found.keys() & own.keys()
        found |= own
    return found


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def assert_same(first: Path, second: Path, *, exactly: bool = True) -> None:
    ours, theirs = sums(first), sums(second)
    assert ours.keys() == theirs.keys()
    for key, total in ours.items():
        if exactly:
            assert torch.equal(total, theirs[key]), key
        else:
            torch.testing.assert_close(total, theirs[key], rtol=1e-5, atol=1e-6 * float(total.abs().max()))


def test_quantizing_from_factors_gives_the_same_checkpoint(collect, model, quantize, tmp_path) -> None:
    direct = quantize(model(), tmp_path / "direct", scheme="int3-g32", seed=3)
    reused = roundel.quantize(
        model(),
        output=tmp_path / "reused",
        factors=collect("factors", seed=3),
        scheme="int3-g32",
        eval_sequences=SETTINGS["eval_sequences"],
        sweeps=SETTINGS["sweeps"],
    )
    assert (direct.path / "model.safetensors").read_bytes() == (reused.path / "model.safetensors").read_bytes()
    assert direct.details["calibration"]["sha256"] == reused.details["calibration"]["sha256"]
    assert direct.report == reused.report


class KilledError(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize("curvature", ["auto", "sketch-a:rounds=1", "fastkron:steps=2:batch=3"])
def test_interrupted_and_resumed_equals_uninterrupted(curvature: str, collect, tmp_path, monkeypatch) -> None:
    whole = collect("whole", curvature=curvature)
    save = FactorsDirectory.save
    for stop in (0, 1, 0):  # before the first group, after it, and again before the second
        saves: list[int] = []

        def killed(self: FactorsDirectory, index: int, *args: Any, stop: int = stop, saves: list[int] = saves) -> None:
            saves.append(index)
            if len(saves) > stop:
                raise KilledError
            save(self, index, *args)

        monkeypatch.setattr(FactorsDirectory, "save", killed)
        with pytest.raises(KilledError):
            collect("parts", curvature=curvature, resume=True, batch_size=1)
        assert not FactorsDirectory.open(tmp_path / "parts").complete
    assert saves == [0]  # the second layer, which comes first, is not visited again
    monkeypatch.setattr(FactorsDirectory, "save", save)
    assert_same(whole, collect("parts", curvature=curvature, resume=True))
    assert files(whole) == files(tmp_path / "parts")
    monkeypatch.setattr(FactorsDirectory, "save", None)
    collect("parts", curvature=curvature, resume=True)  # nothing is left to do
    assert files(whole) == files(tmp_path / "parts")


def test_files_appear_group_by_group_from_the_last_and_are_whole(collect, tmp_path, monkeypatch) -> None:
    save, seen = FactorsDirectory.save, []

    def watched(self: FactorsDirectory, *args: Any) -> None:
        save(self, *args)
        seen.append(sorted(path.name for path in self.path.iterdir()))
        stored = FactorsDirectory.open(self.path)
        assert all(stored.restore(name, torch.device("cpu"))[0].tokens > 0 for name in stored.files)

    monkeypatch.setattr(FactorsDirectory, "save", watched)
    collect("factors")
    last, first = "sums-0001.safetensors", "sums-0000.safetensors"
    assert seen == [["header.json", last], ["header.json", first, last]]


@pytest.mark.slow
def test_a_real_kill_at_random_points(collect, text, tmp_path) -> None:
    """By the default estimator, with enough sequences that some are held out, of a model of eight layers."""
    model, target = tmp_path / "model", tmp_path / "killed"
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**tiny.MODERN, "num_hidden_layers": 8})).save_pretrained(model)
    tiny.make_tokenizer(starts=False).save_pretrained(model)
    line = ["collect", model, "-o", target, "--calibration", text, *options(ENOUGH)]
    line += ["--batch-size", 1, "--resume", "--quiet"]
    generator = random.Random(7)
    for wanted in (0, generator.randrange(1, 3), generator.randrange(3, 6)):
        job = ranks.Job(1, *line)
        (process,) = job.processes
        while process.is_alive() and _done(target) < wanted:
            time.sleep(0.002)
        time.sleep(generator.random() * 0.05)
        process.kill()
        assert job.wait()[0].code == -signal.SIGKILL
        assert _done(target) >= wanted
        if wanted:
            assert not FactorsDirectory.open(target).complete
    collect("killed", resume=True, source=model, **ENOUGH)
    whole = collect("whole", source=model, **ENOUGH)
    assert_same(whole, target)
    assert (whole / "header.json").read_bytes() == (target / "header.json").read_bytes()
    assert {path.name for path in whole.iterdir()} == {path.name for path in target.iterdir() if not path.name.startswith(".")}
    ours, theirs = (_factors(directory) for directory in (whole, target))
    assert all(torch.equal(ours[name], factor) for name, factor in theirs.items())


def _factors(directory: Path) -> dict[str, torch.Tensor]:
    found = FactorsDirectory.open(directory).factors()
    return {f"{name}.{side}": getattr(factors, side) for name, factors in found.items() for side in ("H_out", "H_in")}


def _done(directory: Path) -> int:
    """Grows with every group of layers."""
    return len(list(directory.glob("sums-*.safetensors")))


@pytest.mark.parametrize("settings", [SETTINGS, pytest.param(ENOUGH, marks=pytest.mark.slow)], ids=["few", "enough"])
def test_halves_merged_equal_the_whole(settings: dict[str, Any], collect, tmp_path) -> None:
    whole = collect("whole", **settings)
    halves = [collect(f"half-{k}", part=(k, 2), **settings) for k in (1, 2)]
    merge(halves, tmp_path / "merged")
    assert_same(whole, tmp_path / "merged", exactly=False)
    merged, expected = (FactorsDirectory.open(directory).header for directory in (tmp_path / "merged", whole))
    assert set(merged.sequence_ids) == set(expected.sequence_ids)
    assert merged.sequences == expected.sequences == settings["sequences"]


def test_windows_of_layers_join_to_the_whole(collect, tmp_path) -> None:
    whole = collect("whole")
    merge([collect("low", layers=(0, 1)), collect("high", layers=(1, 2))], tmp_path / "joined")
    assert_same(whole, tmp_path / "joined")


def test_two_processes_equal_one(collect, model, text, tmp_path) -> None:
    line = ["collect", model(), "-o", tmp_path / "two", "--calibration", text, *options(ENOUGH), "--quiet"]
    found = ranks.run(2, *line)
    assert [rank.code for rank in found] == [0, 0], found
    one = collect("one", **ENOUGH)
    assert_same(one, tmp_path / "two")
    headers = [FactorsDirectory.open(directory).header for directory in (one, tmp_path / "two")]
    assert headers[0] == headers[1]
    assert (headers[0].curvature, len(headers[0].sequence_ids)) == ("auto", 56)


def test_what_does_not_fit_is_refused(collect, model, tmp_path) -> None:
    good = collect("good")
    with pytest.raises(FactorsError, match="another model"):
        roundel.quantize(model("qwen2"), output=tmp_path / "out", factors=good, scheme="int4-g32")
    with pytest.raises(FactorsError, match="share sequences"):
        merge([good, collect("part", part=(1, 2))], tmp_path / "merged")
    with pytest.raises(FactorsError, match="same sequences"):
        merge([good, good], tmp_path / "merged")
    with pytest.raises(FactorsError, match="differ in seed"):
        merge([good, collect("other", seed=1)], tmp_path / "merged")
    with pytest.raises(FactorsError, match="differ in curvature"):
        collect("good", curvature="kfac", resume=True)
    path = good / "sums-0000.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FactorsError, match="damaged"):
        roundel.quantize(model(), output=tmp_path / "out", factors=good, scheme="int4-g32")
    header = good / "header.json"
    header.write_text(header.read_text().replace('"schema_version": 3', '"schema_version": 99'))
    with pytest.raises(FactorsError, match="version"):
        FactorsDirectory.open(good)
    with pytest.raises(FactorsError, match="no factors directory"):
        FactorsDirectory.open(tmp_path)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "merged").exists()


def test_half_of_the_space(collect, model, quantize, tmp_path) -> None:
    whole, half = collect("whole", curvature="pilot"), collect("half", curvature="pilot", factor_type="bfloat16")
    ours, theirs = sums(half), sums(whole)
    assert ours.keys() == theirs.keys()
    assert any(key.split("::")[1].startswith("carry.lower.") for key in ours)
    for key, total in ours.items():
        assert torch.equal(total, theirs[key].to(total.dtype)), key
    for name in FactorsDirectory.open(half).header.layers:
        assert ours[f"{name}::kfac.xx"].dtype == torch.bfloat16
    assert sum(map(len, files(half).values())) < 0.6 * sum(map(len, files(whole).values()))
    settings = {"scheme": "int3-g32", "eval_sequences": SETTINGS["eval_sequences"], "sweeps": SETTINGS["sweeps"]}
    found = {
        path: roundel.quantize(model(), output=tmp_path / f"from-{path.name}", factors=path, **settings).report.kl_mean
        for path in (whole, half)
    }
    found[tmp_path] = quantize(model(), tmp_path / "direct", scheme="int3-g32", curvature="pilot", factor_type="bfloat16").report.kl_mean
    for kl in found.values():
        assert kl == pytest.approx(found[whole], rel=0.2)
    with pytest.raises(FactorsError, match="differ in factor_type"):
        collect("half", curvature="pilot", resume=True)


@pytest.mark.parametrize("labels", ["probe", "data"])
def test_labels_are_those_of_the_factors(labels: str, collect, model, quantize, tmp_path) -> None:
    direct = quantize(model(), tmp_path / "direct", scheme="int3-g32", labels=labels)
    factors = collect("factors", labels=labels)
    reused = roundel.quantize(model(), output=tmp_path / "reused", factors=factors, scheme="int3-g32", eval_sequences=4, sweeps=1)
    assert direct.details["recipe"]["labels"] == reused.details["recipe"]["labels"] == labels
    assert direct.details["predicted_kl"] == reused.details["predicted_kl"]
    assert (direct.path / "model.safetensors").read_bytes() == (reused.path / "model.safetensors").read_bytes()
    with pytest.raises(FactorsError, match=f"differ in labels: {labels} and sampled"):
        merge([factors, collect("sampled", part=(1, 2))], tmp_path / "merged")
    with pytest.raises(FactorsError, match="differ in labels"):
        collect("factors", resume=True)


def test_a_copy_of_the_model_elsewhere_is_the_same_model(collect, model, tmp_path) -> None:
    whole, halves = collect("whole"), [collect("half-1", part=(1, 2))]
    copy = tmp_path / "snapshots" / "0123abcd"  # as the Hub's cache has it
    shutil.copytree(model(), copy)
    halves.append(collect("half-2", part=(2, 2), source=copy))
    stored = json.loads((halves[1] / "header.json").read_text())
    # 2 sequences of the pilot, which each part repeats, and half of the other 6
    assert (stored["model"], stored["revision"], stored["labels"], stored["tokens"]) == (str(copy), "0123abcd", "sampled", 5 * 32)
    merge(halves, tmp_path / "merged")
    assert_same(whole, tmp_path / "merged", exactly=False)
    merged = json.loads((tmp_path / "merged" / "header.json").read_text())
    assert (merged["model"], merged["revision"], merged["tokens"]) == (str(model()), None, 8 * 32)
    assert collect_factors(copy, output=whole, resume=True, calibration=merged["calibration"], **SETTINGS).layers


def test_commands(command, model, text, tmp_path) -> None:
    options = ["--calibration", text, "--sequences", 8, "--seq-len", 32, "--eval-sequences", 4]
    for part in ("1/2", "2/2"):
        assert command("collect", model(), "-o", tmp_path / part[0], *options, "--part", part).code == 0
    assert command("merge", tmp_path / "1", tmp_path / "2", "-o", tmp_path / "both").code == 0
    outcome = command(
        "quantize", model(), "-o", tmp_path / "out", "--factors", tmp_path / "both", "--scheme", "int4-g32", "--eval-sequences", 4
    )
    assert outcome.code == 0
    assert (tmp_path / "out" / "roundel.json").exists()
    assert command("collect", model(), "-o", tmp_path / "probe", *options, "--labels", "probe").code == 0
    assert json.loads((tmp_path / "probe" / "header.json").read_text())["labels"] == "probe"
    for wrong in (["--labels", "hard"], ["--part", "3/2"], ["--layers", "2:2"], ["--layers", "x"]):
        assert command("collect", model(), "-o", tmp_path / "wrong", *options, *wrong).code == 2
    assert command("collect", model(), "-o", tmp_path / "wrong", *options, "--layers", "7:9").code == 2
