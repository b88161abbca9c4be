"""`--sequences auto`: the number that it finds, and a job that is then that of this number."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import roundel
from roundel.errors import DataError, StorageError
from roundel.stages import sequences

FEW = {"seq_len": 32, "eval_sequences": 4, "sweeps": 1, "curvature": "kfac", "scheme": "int3-g32"}


@pytest.fixture(autouse=True)
def few(monkeypatch) -> None:
    monkeypatch.setattr(sequences, "LEAST", 4)
    monkeypatch.setattr(sequences, "JUDGES", 6)


@pytest.fixture
def run(model, text, tmp_path):
    def quantized(name: str, **settings: Any) -> roundel.Quantized:
        return roundel.quantize(model(), output=tmp_path / name, **{"calibration": str(text), **FEW, **settings})

    return quantized


def test_the_job_is_that_of_the_number(run, tmp_path) -> None:
    found = run("auto", sequences="auto", work=tmp_path / "work")
    tried = found.details["calibration"]["sequences_tried"]
    assert [row["sequences"] for row in tried] == [4, 8, 16][: len(tried)]  # of 28 that are never held out, 6 judge
    assert all(row["held_out_loss"] > 0 for row in tried)
    for row, after in itertools.pairwise(tried):
        assert row["fall"] == pytest.approx(row["held_out_loss"] - after["held_out_loss"])
        assert row["enough"] == (row["fall"] <= row["fall_stderr"])
        assert not row["enough"] or row is tried[-2]  # it stops there
    number = next((row["sequences"] for row in tried if row["enough"]), 16)
    assert found.details["recipe"]["sequences"] == number
    plain = run("plain", sequences=number)
    assert (found.path / "model.safetensors").read_bytes() == (plain.path / "model.safetensors").read_bytes()
    assert found.report == plain.report
    assert "sequences_tried" not in plain.details["calibration"]


@pytest.mark.parametrize("enough", [0, 1, None])
def test_it_stops_when_more_is_of_no_use(enough, run, monkeypatch, tmp_path) -> None:
    """Losses that stop falling at the second number, at the third, or never."""
    losses = iter([10.0, 9.0, 8.0] if enough is None else [10.0, 10.0] if enough == 0 else [10.0, 9.0, 9.0])
    spread = torch.linspace(0, 1, 6, dtype=torch.float64)
    monkeypatch.setattr(sequences, "_losses", lambda *_args: next(losses) + spread)
    found = run("out", sequences="auto", work=tmp_path / "work")
    assert found.details["recipe"]["sequences"] == {0: 4, 1: 8, None: 16}[enough]
    assert any("--sequences auto" in warning for warning in found.details["warnings"]) == (enough is None)
    monkeypatch.setattr(sequences, "_tried", None)  # what is known is not tried again
    assert run("again", sequences="auto", work=tmp_path / "work").details["calibration"] == found.details["calibration"]
    (tmp_path / "work/sequences.json").write_text("[]", encoding="utf-8")
    with pytest.raises(StorageError, match="is damaged"):
        run("third", sequences="auto", work=tmp_path / "work")


def test_without_text_to_try_on_it_asks_for_a_number(run, command, model, text, tmp_path) -> None:
    with pytest.raises(DataError, match="needs calibration text"):
        run("self", sequences="auto", calibration="self")
    with pytest.raises(DataError, match="too little text"):
        run("short", sequences="auto", eval_sequences=500)
    outcome = command("quantize", model(), "-o", tmp_path / "out", "--calibration", text, "--sequences", "some")
    assert outcome.code != 0
    assert "--sequences 'some'" in outcome.err
    outcome = command(
        *("quantize", model(), "-o", tmp_path / "out", "--calibration", text, "--sequences", "auto"),
        *("--seq-len", 32, "--eval-sequences", 4, "--sweeps", 1, "--curvature", "kfac", "--scheme", "int3-g32"),
    )
    assert outcome.code == 0
