"""The commands, as a user types them."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from transformers.utils import logging

import roundel
from e2e import tiny
from roundel.commands.app import app

SHORT = ("--sequences", 8, "--seq-len", 32, "--eval-sequences", 4)
EVALUATION = {
    *("kl", "top1_agreement", "perplexity", "tokens", "sequences"),
    *("model", "reference", "data", "sha256", "seq_len", "overlap_with_calibration", "duplicate", "reference_logits", "versions"),
}


def test_quantize(command, model, text, tmp_path) -> None:
    out, report = tmp_path / "out", tmp_path / "report.json"
    arguments = ("quantize", model(), "-o", out, "--scheme", "int3-g32", "--calibration", text, *SHORT, "--json", report)
    code, stdout, stderr = command(*arguments, "--exclude", "*.down_proj", "--curvature", "sketch-a:rounds=2", "--seed", 3)
    assert code == 0
    details = json.loads(report.read_text())
    assert details == json.loads((out / "roundel.json").read_text())
    assert details["scheme"] == "int3-g32"
    assert details["curvature"] == "sketch-a:rounds=2"
    assert details["seed"] == 3
    assert details["recipe"]["exclude"] == ["*.down_proj"]
    assert details["skipped"] == {f"model.layers.{k}.mlp.down_proj": "excluded by pattern" for k in range(2)}
    assert len(details["layers"]) == 12
    assert "KL(original, quantized)" in stdout
    assert "written" in stdout
    stages = ("curvature", "rounding", "prediction", "writing", "evaluation")
    assert all(f"{stage}: done" in stderr for stage in stages)
    assert "\x1b" not in stdout + stderr
    assert "\r" not in stdout + stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "report.json"]


def test_quantize_into_an_empty_directory(command, model, text, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    code, *_ = command("quantize", model(), "-o", tmp_path / "out", "--scheme", "int4-g32", "--calibration", text, *SHORT)
    assert code == 0
    assert (tmp_path / "out" / "config.json").is_file()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_python_and_command_line_agree(command, model, text, quantized, tmp_path) -> None:
    out = tmp_path / "out"
    assert command("quantize", model(), "-o", out, "--scheme", "int4-g32", "--calibration", text, *SHORT).code == 0
    assert (out / "model.safetensors").read_bytes() == (quantized.path / "model.safetensors").read_bytes()


def test_evaluate_writes_json(command, model, text, quantized, tmp_path) -> None:
    report = tmp_path / "report.json"
    arguments = ("evaluate", quantized.path, "--reference", model(), "--data", text, "--sequences", 6, "--seq-len", 32)
    code, stdout, _stderr = command(*arguments, "--json", report)
    assert code == 0
    assert "KL(original, quantized)" in stdout
    details = json.loads(report.read_text())
    assert set(details) == EVALUATION
    assert set(details["kl"]) == {"mean", "stderr", "interval95", "median", "p99", "p999", "by_position"}
    assert set(details["perplexity"]) == {"model", "reference"}
    assert 0 < details["kl"]["median"] < details["kl"]["p99"] < 1
    assert 0 < details["kl"]["stderr"] < details["kl"]["mean"] < 1
    assert 0 < details["top1_agreement"] <= 1
    assert details["perplexity"]["model"] > 1
    assert (details["tokens"], details["sequences"], details["seq_len"]) == (6 * 32, 6, 32)
    in_python = roundel.evaluate(quantized.path, reference=model(), data=str(text), sequences=6, seq_len=32)
    assert in_python.report.as_json() == {key: details[key] for key in in_python.report.as_json()}


def test_json_on_standard_output_is_all_there_is(command, model, text, quantized, tmp_path) -> None:
    arguments = ("--data", text, "--sequences", 2, "--seq-len", 32, "--json", "-")
    code, stdout, _ = command("evaluate", quantized.path, "--reference", model(), *arguments)
    assert code == 0
    assert set(json.loads(stdout)) == EVALUATION
    arguments = ("--scheme", "int4-g32", "--calibration", text, *SHORT, "--json", "-")
    code, stdout, _ = command("quantize", model(), "-o", tmp_path / "out", *arguments)
    assert code == 0
    assert json.loads(stdout) == json.loads((tmp_path / "out" / "roundel.json").read_text())


def test_a_model_against_itself_has_no_divergence(command, model, text) -> None:
    code, stdout, _ = command("evaluate", model(), "--reference", model(), "--data", text, "--sequences", 4, "--seq-len", 32, "--json", "-")
    assert code == 0
    details = json.loads(stdout)
    assert {key: details["kl"][key] for key in ("mean", "stderr", "median", "p99", "p999")} == dict.fromkeys(
        ("mean", "stderr", "median", "p99", "p999"), 0
    )
    assert details["kl"]["interval95"] == [0, 0]
    assert all(span["mean"] == span["stderr"] == 0 for span in details["kl"]["by_position"])
    assert details["top1_agreement"] == 1
    assert details["perplexity"]["model"] == details["perplexity"]["reference"]
    assert details["overlap_with_calibration"] is None


def test_quiet_prints_nothing(model, text, tmp_path) -> None:
    """In a process of its own, because Transformers' bars and logs go to the standard error that it finds when it is imported."""
    short = tmp_path / "short.txt"
    short.write_text(text.read_text(encoding="utf-8")[:1500], encoding="utf-8")
    texts = ["--calibration", short, "--eval-data", short]
    arguments = [*texts, *SHORT, "--scheme", "int4-g32", "--quiet", "-o", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-m", "roundel", "quantize", model(), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    warnings = json.loads((tmp_path / "out" / "roundel.json").read_text())["warnings"]
    assert len(warnings) == 1  # the overlap of the two texts is on record all the same


def test_loading_restores_transformers_settings(model, text, quantized) -> None:
    logging.enable_progress_bar()
    verbosity = logging.get_verbosity()
    roundel.evaluate(quantized.path, reference=model(), data=str(text), sequences=1, seq_len=32)
    assert logging.is_progress_bar_enabled()
    assert logging.get_verbosity() == verbosity


def test_one_sequence_has_no_standard_error(command, model, text, quantized) -> None:
    arguments = ("--data", text, "--sequences", 1, "--seq-len", 32)
    code, stdout, _ = command("evaluate", quantized.path, "--reference", model(), *arguments, "--json", "-")
    assert code == 0
    kl = json.loads(stdout)["kl"]
    assert kl["stderr"] is kl["interval95"] is kl["by_position"][0]["stderr"] is None
    assert command("evaluate", quantized.path, "--reference", model(), *arguments).code == 0


def test_quantize_warns_of_overlapping_texts(command, model, text, tmp_path) -> None:
    arguments = ("quantize", model(), "--scheme", "int4-g32", "--calibration", text, *SHORT)
    code, _, stderr = command(*arguments, "-o", tmp_path / "same", "--eval-data", text, "--sequences", 40, "--eval-sequences", 40)
    assert code == 0
    assert "warning: " in stderr
    assert "occur in the calibration text" in stderr
    assert json.loads((tmp_path / "same" / "roundel.json").read_text())["evaluation"]["overlap_with_calibration"] > 0.1
    other = tmp_path / "other.txt"
    other.write_text(tiny.make_text(3000, seed=9), encoding="utf-8")
    code, _, stderr = command(*arguments, "-o", tmp_path / "other", "--eval-data", other)
    assert code == 0
    assert "warning" not in stderr


def test_evaluate_warns_of_the_calibration_text(command, model, tmp_path) -> None:
    text, other = tmp_path / "text.txt", tmp_path / "other.txt"
    text.write_text(tiny.make_text(20_000), encoding="utf-8")
    other.write_text(tiny.make_text(20_000, seed=9), encoding="utf-8")
    out = tmp_path / "out"
    cheap = ("--curvature", "identity", "--sweeps", 0, "--scheme", "int4-g32")
    long = ("--sequences", 40, "--seq-len", 128)
    assert command("quantize", model(), "-o", out, "--calibration", text, *long, "--eval-sequences", 4, *cheap).code == 0
    code, _, stderr = command("evaluate", out, "--reference", model(), "--data", text, *long)
    assert code == 0
    assert "was in the calibration text" in stderr
    code, _, stderr = command("evaluate", out, "--reference", model(), "--data", other, *long)
    assert code == 0
    assert "warning" not in stderr


def test_version(command) -> None:
    code, stdout, stderr = command("--version")
    assert (code, stdout, stderr) == (0, f"roundel {importlib.metadata.version('roundel')}\n", "")
    assert roundel.__version__ == importlib.metadata.version("roundel")


COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_every_default(name, command, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "600")
    monkeypatch.setenv("TERMINAL_WIDTH", "600")
    code, stdout, stderr = command(name, "--help")
    assert code == 0
    assert stderr == ""
    for option in COMMANDS[name].params:
        if option.param_type_name == "argument":
            continue
        flag = next(o for o in option.opts if o.startswith("--"))
        line = next(line for line in stdout.splitlines() if flag in line)
        if option.required:
            assert "required" in line, line
        elif option.default is not None and not option.is_flag:
            assert f"[default: {option.default}]" in line, line
    shown = {option.opts[-1] for option in COMMANDS[name].params if option.opts[-1].startswith("--")}
    assert shown <= set(stdout.replace(",", " ").split())  # an option may have two names


def test_help_lists_the_commands(command) -> None:
    code, stdout, _ = command("--help")
    assert code == 0
    assert all(name in stdout for name in ("quantize", "evaluate", "demo"))


@pytest.mark.parametrize(
    "arguments", [("quantize",), ("nothing",), ("quantize", "x", "-o", "y", "--nope"), ("quantize", "x", "-o", "y", "--seed", "z")], ids=str
)
def test_wrong_usage(arguments, command, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, stdout, stderr = command(*arguments)
    assert code == 2
    assert stdout == ""
    assert "Traceback" not in stderr
    assert not any(Path(tmp_path).iterdir())
