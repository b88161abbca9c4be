"""How much text is used: numbers that nobody has given shrink with a warning where there is less, given ones are an error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import roundel
from e2e import tiny
from roundel.artifacts.factors import FactorsDirectory
from roundel.calibration import read_documents, windows
from roundel.errors import DataError
from roundel.models import load_tokenizer
from roundel.recipes import Recipe
from roundel.settings import EFFORTS

CHEAP: dict[str, Any] = {"scheme": "int4-g32", "curvature": "identity", "sweeps": 0, "prefix_aware": False, "seq_len": 32}
OPTIONS = ("--scheme", "int4-g32", "--curvature", "identity", "--sweeps", 0, "--no-prefix-aware", "--seq-len", 32, "--quiet")


@pytest.fixture(scope="module")
def short(model, tmp_path_factory) -> tuple[Path, int]:
    """Text, and how many sequences of 32 tokens it has: fewer than any default asks for."""
    path = tmp_path_factory.mktemp("short") / "short.txt"
    path.write_text(tiny.make_text(2500))
    count = len(windows(read_documents(str(path), load_tokenizer(model())), load_tokenizer(model()), 32))
    assert 40 < count < Recipe().sequences
    return path, count


@pytest.fixture
def run(model, short, tmp_path) -> Callable[..., roundel.Quantized]:
    def quantized(**settings: Any) -> roundel.Quantized:
        return roundel.quantize(model(), output=tmp_path / "out", **{"calibration": str(short[0]), **CHEAP, **settings})

    return quantized


def used(result: roundel.Quantized) -> tuple[int, int]:
    found = result.details["calibration"]
    return found["sequences"] + found["sequences_to_choose_by"], result.details["evaluation"]["sequences"]


def test_defaults_shrink_with_a_warning(run, short) -> None:
    path, count = short
    result = run()
    heldout = count // 8
    assert used(result) == (count - heldout, heldout)
    (warning,) = result.details["warnings"]
    assert f"{path} has {count} sequences of 32 tokens: {count - heldout} calibrate and {heldout} are held out" in warning
    assert f"instead of {Recipe().sequences} and {Recipe().eval_sequences}" in warning
    assert result.details["evaluation"]["overlap_with_calibration"] < 0.01


def test_so_do_those_of_an_effort(run, short) -> None:
    assert EFFORTS["quick"]["sequences"] + EFFORTS["quick"]["eval_sequences"] > short[1]
    result = run(effort="quick")
    assert used(result) == (min(EFFORTS["quick"]["sequences"], short[1] - short[1] // 8), short[1] // 8)
    assert len(result.details["warnings"]) == 1


def test_a_number_that_is_given_stays_and_the_other_shrinks(run, short) -> None:
    assert used(run(sequences=20)) == (20, min(short[1] - 20, Recipe().eval_sequences))


def test_the_other_way_round(run, short) -> None:
    assert used(run(eval_sequences=20)) == (short[1] - 20, 20)


def test_with_evaluation_text_of_its_own_all_of_it_calibrates(run, short, text) -> None:
    result = run(eval_data=str(text))
    assert used(result) == (short[1], Recipe().eval_sequences)
    assert any(f"{short[1]} calibrate, instead of" in warning for warning in result.details["warnings"])


@pytest.mark.parametrize(
    "settings",
    [
        {"sequences": Recipe().sequences},
        {"eval_sequences": 128},
        {"sequences": 60, "eval_sequences": 60},
        {"effort": "quick", "sequences": 100},
    ],
    ids=str,
)
def test_given_numbers_that_are_too_large_are_an_error(settings, run, short, tmp_path) -> None:
    """Also where they are the defaults."""
    with pytest.raises(DataError, match=f"too little text .* {short[1]} sequences of 32; needed are"):
        run(**settings)
    assert not (tmp_path / "out").exists()


def test_where_there_is_enough_nothing_is_said(model, text, tmp_path) -> None:
    result = roundel.quantize(model(), output=tmp_path / "out", calibration=str(text), **{**CHEAP, "seq_len": 16})
    assert used(result) == (Recipe().sequences, Recipe().eval_sequences)
    assert result.details["warnings"] == []


def test_without_a_single_sequence_it_is_an_error(model, tmp_path) -> None:
    (tmp_path / "text.txt").write_text("Hi.")
    for settings in ({}, {"effort": "best"}):
        with pytest.raises(DataError, match="too little text"):
            roundel.quantize(model(), output=tmp_path / "out", calibration=str(tmp_path / "text.txt"), **CHEAP, **settings)


def test_the_command_line_knows_what_was_given(command, model, short, tmp_path) -> None:
    path, count = short
    arguments = ("quantize", model(), "--calibration", path, *OPTIONS)
    outcome = command(*arguments, "-o", tmp_path / "given", "--sequences", Recipe().sequences)
    assert outcome.code == 2
    assert "too little text" in outcome.err
    assert command(*arguments, "-o", tmp_path / "default").code == 0
    outcome = command(*(word for word in arguments if word != "--quiet"), "-o", tmp_path / "loud")
    assert f"has {count} sequences of 32 tokens" in " ".join(outcome.err.split())


def test_factors_of_shrunk_text_are_used_with_the_same_text(model, short, tmp_path) -> None:
    path, count = short
    roundel.collect_factors(model(), output=tmp_path / "factors", calibration=str(path), seq_len=32, curvature="kfac")
    header = FactorsDirectory.open(tmp_path / "factors").header
    assert len(header.sequence_ids) == count - count // 8
    given = {"scheme": "int4-g32", "sweeps": 0, "prefix_aware": False}
    reused = roundel.quantize(model(), output=tmp_path / "reused", factors=tmp_path / "factors", **given)
    direct = roundel.quantize(model(), output=tmp_path / "direct", calibration=str(path), seq_len=32, curvature="kfac", **given)
    assert (reused.path / "model.safetensors").read_bytes() == (direct.path / "model.safetensors").read_bytes()
    assert used(reused) == used(direct)
    assert reused.report == direct.report
