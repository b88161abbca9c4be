"""`roundel compare`: its rows are what `quantize` measures, an interrupted comparison goes on, and its files hold what it returns."""

from __future__ import annotations

import base64
import csv
import dataclasses
import io
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import roundel.commands.compare as compare_module
from e2e import tiny
from e2e.conftest import SETTINGS
from roundel.calibration import Split
from roundel.commands.compare import compare
from roundel.curvature.sketches import Auto, Candidate, Sketch
from roundel.errors import ModelError, OutputError, SchemeError
from roundel.evaluate import comparison
from roundel.evaluate.comparison import COMPARED, compared_rows, summary_rows
from roundel.models import load, load_model
from roundel.progress import Progress
from roundel.recipes import GPTQ, NEAREST, Recipe
from roundel.stages.text import split_text
from roundel.types import KroneckerFactors

FEW: dict[str, Any] = {key: value for key, value in SETTINGS.items() if key != "sequences"}
SECONDS = {"collect_seconds", "rounding_seconds"}
METHODS = ("auto", "gptq", "sketch-b:rounds=2", "nearest")
SCHEMES = ("int3-g32", "int4-g64")
"""Groups of 64 do not divide the width of down_proj, 96."""
RECIPES: dict[str, dict[str, Any]] = {"gptq": GPTQ, "nearest": NEAREST}


@pytest.fixture(scope="module")
def other_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("other") / "text.txt"
    path.write_text(tiny.make_text(3000, seed=1), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def compared(model, text, other_text, tmp_path_factory) -> tuple[dict[str, Any], Path]:
    output = tmp_path_factory.mktemp("compared") / "out"
    sizes = {"curvatures": METHODS, "schemes": SCHEMES, "sequences": (16, 64), "seeds": 1}
    details = compare(model(), output=output, calibration=str(text), eval_data=str(other_text), **sizes, **FEW)
    return details, output


def row_of(details: dict[str, Any], **wanted: Any) -> dict[str, Any]:
    found = [row for row in details["rows"] if all(row[key] == value for key, value in wanted.items())]
    assert len(found) == 1
    return found[0]


def without_seconds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in SECONDS} for row in rows]


def in_the_order_of_auto(recipe: Recipe, *args: Any, **settings: Any) -> Split:
    """What a comparison gives all methods: the same sequences as alone, in another order, by which sums differ in their last bits."""
    split = split_text(dataclasses.replace(recipe, curvature="auto"), *args, **settings)
    assert set(split.used.sequence_ids) == set(split_text(recipe, *args, **settings).calibration.sequence_ids)
    return dataclasses.replace(split, calibration=split.used, choice=split.used[:0])


@pytest.mark.parametrize(
    ("method", "sequences", "scheme"),
    [
        pytest.param("auto", 64, "int3-g32", marks=pytest.mark.slow),
        ("auto", 16, "int4-g64"),
        ("gptq", 16, "int4-g64"),
        ("gptq", 64, "int3-g32"),
        ("sketch-b:rounds=2", 16, "int3-g32"),
        ("nearest", 64, "int4-g64"),
    ],
)
def test_a_row_is_what_quantize_measures(
    method: str, sequences: int, scheme: str, compared, model, quantize, other_text, tmp_path, monkeypatch
) -> None:
    settings = RECIPES.get(method, {"curvature": method})
    if method != "auto":
        monkeypatch.setattr("roundel.stages.text.split_text", in_the_order_of_auto)
    whole = {"scheme": scheme, "sequences": sequences, "eval_data": str(other_text)}
    result = quantize(model(), tmp_path / "out", **whole, **settings)
    row = row_of(compared[0], method=method, scheme=scheme, sequences=sequences)
    assert row["kl"] == pytest.approx(result.report.kl_mean, rel=1e-5)
    assert row["kl_stderr"] == pytest.approx(result.report.kl_stderr, rel=1e-4)
    assert row["sequence_kl"] == pytest.approx(result.report.sequence_kl, rel=1e-4)
    assert row["top1_agreement"] == result.report.top1_agreement
    assert row["perplexity"] == pytest.approx(result.report.perplexity_model, rel=1e-5)
    assert row["proxy_kl"] == pytest.approx(sum(layer["proxy_loss"] for layer in result.details["layers"].values()), rel=1e-5)
    assert row["quantized_linears"] == len(result.details["layers"]) == {"int3-g32": 14, "int4-g64": 12}[scheme]
    assert row["heldout_sha256"] == result.details["evaluation"]["sha256"]
    assert row["tokens"] == sequences * 32
    if (method, sequences) == ("auto", 16):
        assert row["tokens_sha256"] == result.details["calibration"]["sha256"]


@pytest.mark.slow
def test_a_choice_is_that_of_quantize(model, text, quantize, tmp_path, monkeypatch) -> None:
    """Nearest rounding is the first candidate, so that not all stand."""

    def offered(_self: Auto, sketch: Sketch) -> dict[str, Candidate]:
        mean = sketch.factors()
        nearest = KroneckerFactors(H_out=torch.eye(sketch.d_out), H_in=torch.eye(sketch.d_in), scale=mean.scale)
        return {"nearest": Candidate(factors=nearest), "mean": Candidate(factors=mean)}

    monkeypatch.setattr(Auto, "candidates", offered)
    sizes: dict[str, Any] = {"seq_len": 16, "eval_sequences": 4, "sweeps": 0}
    details = compare(
        model(),
        output=tmp_path / "out",
        calibration=str(text),
        curvatures=["identity", "auto"],
        schemes=["int3-g32"],
        sequences=[96],
        seeds=1,
        **sizes,
    )
    result = quantize(model(), tmp_path / "quantized", scheme="int3-g32", sequences=96, **sizes)
    taken = [layer["candidate"] for layer in result.details["layers"].values()]
    assert 0 < taken.count("mean") < len(taken)
    nearest, chosen = details["rows"]
    assert chosen["kl"] == pytest.approx(result.report.kl_mean, rel=1e-5)
    assert chosen["kl"] < 0.99 * nearest["kl"]


def test_methods_differ_and_carry_their_diagnoses(compared) -> None:
    rows = compared[0]["rows"]
    assert len(rows) == len(METHODS) * len(SCHEMES) * 2
    for row in rows:
        assert row["kl"] > 0
        assert row["passes"] == (2 if row["method"] == "sketch-b:rounds=2" else 1)
        assert (row["j_ratio"] == pytest.approx(1, abs=1e-6)) == (row["method"] == "nearest")
        assert 0 < row["cosine"] < 1
    assert len({row["kl"] for row in rows}) >= len(rows) - 4  # nearest rounding does not depend on calibration


def test_the_models_are_as_before_and_only_the_scheme_s_linears_were_replaced(model, text, tmp_path, monkeypatch) -> None:
    fresh = load_model(model(), device=torch.device("cpu"), dtype=torch.float32).state_dict()
    seen: list[tuple[torch.nn.Module, torch.nn.Module]] = []
    replaced: list[set[str]] = []

    def spied(twin: Any, reference: Any, *args: Any, **settings: Any) -> Any:
        seen.append((twin, reference))
        replaced.append({name for name, value in twin.state_dict().items() if not torch.equal(value, fresh[name])})
        return original(twin, reference, *args, **settings)

    original = compare_module.compare_models
    monkeypatch.setattr(compare_module, "compare_models", spied)
    compare(
        model(),
        output=tmp_path / "out",
        calibration=str(text),
        curvatures=["mean", "nearest"],
        schemes=SCHEMES,
        sequences=[8],
        seeds=1,
        **FEW,
    )
    every = {f"{name}.weight" for name in tiny.architectures()["llama"]().linears}
    fitting = {name for name in every if "down_proj" not in name}
    assert replaced == [every, every, fitting, fitting]
    for twin, reference in seen:
        for ours in (twin.state_dict(), reference.state_dict()):
            assert ours.keys() == fresh.keys()
            assert all(torch.equal(value, fresh[name]) for name, value in ours.items())


@pytest.mark.parametrize("calibration", ["text", "self"])
def test_the_held_out_text_is_the_same_for_all_and_nobody_calibrates_on_it(
    calibration: str, model, text, quantize, tmp_path, monkeypatch
) -> None:
    splits = []

    def spied(_source: Any, _linears: Any, _twin: Any, _recipes: Any, split: Any, *args: Any) -> Any:
        splits.append(split)
        return original(_source, _linears, _twin, _recipes, split, *args)

    original = compare_module._one_setting
    monkeypatch.setattr(compare_module, "_one_setting", spied)
    source = str(text) if calibration == "text" else "self"
    details = compare(
        model(), output=tmp_path / "out", calibration=source, curvatures=["nearest"], schemes=["int3-g32"], sequences=[4, 8], seeds=2, **FEW
    )
    assert len({row["heldout_sha256"] for row in details["rows"]}) == 1
    assert len({row["kl"] for row in details["rows"]}) == 1
    assert len({row["tokens_sha256"] for row in details["rows"]}) == 4
    for split in splits:
        assert not set(split.heldout.sequence_ids) & set(split.used.sequence_ids)
    largest = quantize(model(), tmp_path / "quantized", calibration=source, scheme="int3-g32", **NEAREST)
    assert details["rows"][0]["heldout_sha256"] == largest.details["evaluation"]["sha256"]
    assert details["rows"][0]["kl"] == pytest.approx(largest.report.kl_mean, rel=1e-5)


class Interrupting(Progress):
    """Fails when the group that begins with `message` would start, and keeps what was said before."""

    def __init__(self, message: str | None = None) -> None:
        self.message, self.said = message, list[str]()

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        yield lambda _units: None

    def say(self, message: str) -> None:
        self.said.append(message)
        if message == self.message:
            raise KeyboardInterrupt

    def groups(self) -> list[str]:
        return [message for message in self.said if message.startswith("---")]


@pytest.mark.slow
def test_an_interrupted_comparison_goes_on_where_it_was(model, quantize, tmp_path, monkeypatch) -> None:
    text = tmp_path / "text.txt"
    text.write_text(tiny.make_text(1200), encoding="utf-8")
    settings: dict[str, Any] = {
        "calibration": str(text),
        "eval_data": str(text),  # so that there is a warning to keep
        "curvatures": ["auto", "nearest"],
        "schemes": ["int3-g32"],
        "sequences": [8, 12],
        "seeds": 2,
        **FEW,
    }
    whole = compare(model(), output=tmp_path / "whole", **settings)
    alone = quantize(
        model(), tmp_path / "alone", scheme="int3-g32", curvature="auto", sequences=12, seed=1, calibration=str(text), eval_data=str(text)
    )
    assert row_of(whole, method="auto", sequences=12, seed=1)["kl"] == pytest.approx(alone.report.kl_mean, rel=1e-5)
    assert len({row["kl"] for row in whole["rows"] if row["method"] == "auto"}) == 4
    stopped = Interrupting("--- seed 0, 12 sequences")
    with pytest.raises(KeyboardInterrupt):
        compare(model(), output=tmp_path / "out", progress=stopped, **settings)
    partial = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert len(partial["rows"]) == 2
    assert "occur in the calibration text" in partial["warnings"][0]
    shutil.copytree(tmp_path / "out", tmp_path / "partial")

    goes_on = Interrupting()
    resumed = compare(model(), output=tmp_path / "out", resume=True, progress=goes_on, **settings)
    assert goes_on.groups() == ["--- seed 0, 12 sequences", "--- seed 1, 8 sequences", "--- seed 1, 12 sequences"]
    assert resumed["rows"][:2] == partial["rows"]
    assert without_seconds(resumed["rows"]) == without_seconds(whole["rows"])
    assert without_seconds(resumed["summary"]) == without_seconds(whole["summary"])
    assert resumed["warnings"] == whole["warnings"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in (tmp_path / "whole").iterdir()}

    monkeypatch.setattr(load, "multiplies_bfloat16", lambda: True)
    other = {
        "sequences": {"sequences": [8, 16]},
        "seeds": {"seeds": 1},
        "schemes": {"schemes": ["int4-g32"]},
        "methods": {"curvatures": ["nearest", "auto"]},  # the others are compared with the first
        "recipe": {"labels": "probe"},
        "dtype": {"dtype": "bfloat16"},
    }
    for key, changed in other.items():
        with pytest.raises(OutputError, match=f"with other {key}"):
            compare(model(), output=tmp_path / "partial", resume=True, **{**settings, **changed})
    with pytest.raises(OutputError, match="with other model"):
        compare(model("qwen2"), output=tmp_path / "partial", resume=True, **settings)
    with pytest.raises(OutputError, match="not an empty directory"):
        compare(model(), output=tmp_path / "partial", **settings)
    for broken in ("{", "[]", "{}"):
        (tmp_path / "partial" / "compare.json").write_text(broken)
        with pytest.raises(OutputError, match="cannot be read"):
            compare(model(), output=tmp_path / "partial", resume=True, **settings)

    monkeypatch.setattr(compare_module, "load_source", None)  # what is complete needs no model
    (tmp_path / "out" / "index.html").unlink()
    assert compare(model(), output=tmp_path / "out", resume=True, **settings) == resumed
    assert (tmp_path / "out" / "index.html").exists()


def test_what_cannot_be_compared_is_refused(model, text, tmp_path) -> None:
    def run(**settings: Any) -> None:
        compare(model(), output=tmp_path / "out", **{"calibration": str(text), **FEW, "sequences": [8], "seeds": 1, **settings})

    refused: list[tuple[dict[str, Any], str]] = [
        ({"curvatures": []}, "curvatures is empty"),
        ({"curvatures": ["mean", "kfac", "mean"]}, "curvatures is mean, kfac, mean: expected one or more, each once"),
        ({"schemes": []}, "schemes is empty"),
        ({"schemes": ["int3-g32", "int3-g32"]}, "each once"),
        ({"schemes": ["int3-g32", "int9-g32"]}, "int9"),
        ({"sequences": []}, "sequences is empty"),
        ({"sequences": [8, 8]}, "each once"),
        ({"sequences": [0, 8]}, "sequences is 0"),
        ({"seeds": 0}, "seeds is 0"),
        ({"curvatures": ["mean", "hessian"]}, "unknown curvature 'hessian'"),
        ({"seed": 3}, "seed: a comparison takes several"),
    ]
    for settings, message in refused:
        with pytest.raises(SchemeError, match=message):
            run(**settings)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_another_model_is_found(model, text, tmp_path, monkeypatch) -> None:
    windows = compare_module.split_text

    def stray(*args: Any, **settings: Any) -> Any:
        split = windows(*args, **settings)
        split.heldout.ids[-1, 3] = 300
        return split

    monkeypatch.setattr(compare_module, "split_text", stray)
    with pytest.raises(ModelError, match="token 300"):
        compare(model(), output=tmp_path / "out", calibration=str(text), sequences=[8], seeds=1, **FEW)


def made_row(method: str, seed: int, by_sequence: list[float], **others: Any) -> dict[str, Any]:
    row = {
        "method": method,
        "scheme": "int3-g32",
        "sequences": 8,
        "seed": seed,
        "kl": sum(by_sequence) / len(by_sequence),
        "sequence_kl": by_sequence,
        "top1_agreement": 0.5,
        "perplexity": 3.0,
        "proxy_kl": 0.1,
        "collect_seconds": 1.0,
        "rounding_seconds": 2.0,
        "bits_per_weight": 3.5,
        "j_ratio": 0.6,
        "cosine": 0.8,
        "tokens": 256,
        "passes": 1,
        "state_bytes": 100,
    }
    return {**row, **others}


def test_the_summary_by_hand() -> None:
    rows = [
        made_row("first", 0, [1, 2, 3], collect_seconds=1.0),
        made_row("other", 0, [2, 2, 2], j_ratio=None),
        made_row("first", 1, [1, 2, 6], collect_seconds=4.0),
        made_row("other", 1, [2, 4, 3]),
        made_row("other", 0, [7, 7, 7], scheme="int4-g32"),
    ]
    first, other, alone = summary_rows(rows)
    assert (first["method"], first["seeds"], first["kl"], first["collect_seconds"]) == ("first", 2, 2.5, 2.5)
    assert (first["ratio"], first["ratio_stderr"]) == (1, 0)
    # by sequence, the mean over seeds is 1, 2, 4.5; of the other method 2, 3, 2.5
    assert first["kl_stderr"] == pytest.approx(np.std([1, 2, 4.5], ddof=1) / math.sqrt(3))
    assert other["kl"] == 2.5
    assert other["kl_stderr"] == pytest.approx(np.std([2, 3, 2.5], ddof=1) / math.sqrt(3))
    # the ratios are 2 / 2 and 3 / 3; the paired differences 1, 1, -2
    assert other["ratio"] == 1
    assert other["ratio_stderr"] == pytest.approx(np.std([1, 1, -2], ddof=1) / math.sqrt(3) / 2.5)
    assert (first["j_ratio"], other["j_ratio"], other["cosine"]) == (pytest.approx(0.6), None, pytest.approx(0.8))
    # the only method with this scheme is its own reference; there is one seed and no spread over sequences
    assert (alone["scheme"], alone["seeds"], alone["kl"], alone["kl_stderr"], alone["ratio"]) == ("int4-g32", 1, 7, 0, 1)
    again = summary_rows([made_row("a", 0, [2, 2]), made_row("b", 0, [3, 3]), made_row("a", 1, [2, 2]), made_row("b", 1, [5, 5])])[1]
    # no spread over sequences: what is left is that of the ratios over seeds, 1.5 and 2.5
    assert (again["ratio"], again["ratio_stderr"]) == (2, pytest.approx(0.5))


def test_cells_have_two_digits_of_the_error() -> None:
    rows = summary_rows([made_row("a", 0, [0.1, 0.2]), made_row("b", 0, [0.3, 0.3], j_ratio=None, state_bytes=3 * 2**20)])
    cells = [dict(zip(COMPARED, row, strict=True)) for row in compared_rows(rows)]
    assert cells[0]["KL"] == "0.150 ± 0.050"
    assert cells[1] == {
        "scheme": "int3-g32",
        "bits": "3.500",
        "sequences": "8",
        "method": "b",
        "KL": "0.30000 ± 0.00000",
        "ratio to the first": "2.000 ± 0.333",
        "J ratio": "",
        "cosine": "0.800",
        "passes": "1",
        "seconds": "1.0",
        "rounding s": "2.0",
        "MiB": "3.0",
    }
    assert compared_rows(rows, ["MiB", "method"])[1] == ["3.0", "b"]


def test_the_files_hold_what_is_returned(compared) -> None:
    details, output = compared
    assert {path.name for path in output.iterdir()} == {
        "compare.json",
        "summary.csv",
        "summary.md",
        "index.html",
        "kl.png",
        "predicted.png",
        "ranking.png",
        "sequences.png",
    }
    assert json.loads((output / "compare.json").read_text(encoding="utf-8")) == details
    assert details["summary"] == summary_rows(details["rows"])
    table = list(csv.DictReader(io.StringIO((output / "summary.csv").read_text(encoding="utf-8"))))
    assert len(table) == len(METHODS) * len(SCHEMES) * 2
    for written, row in zip(table, details["summary"], strict=True):
        assert written == {key: "" if value is None else str(value) for key, value in row.items()}
    header, rule, *body = (output / "summary.md").read_text(encoding="utf-8").splitlines()
    assert header.count("|") == rule.count("|") == len(COMPARED) + 1
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in body] == compared_rows(details["summary"])
    pictures = {path.name: path.read_bytes() for path in output.glob("*.png")}
    for data in pictures.values():
        pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        assert pixels.shape[0] > 300
        assert 0.01 < (pixels < 255).any(-1).mean() < 0.6
        assert len(np.unique(pixels @ [1 << 16, 1 << 8, 1])) > 50
    html = (output / "index.html").read_text(encoding="utf-8")
    embedded = [base64.b64decode(data) for data in re.findall(r"data:image/png;base64,([^\"]+)", html)]
    assert sorted(embedded) == sorted(pictures.values())
    assert not re.search(r"(?:src|href)=\"(?!data:)", html)
    assert not re.search(r"<script|<link|url\(|@import", html)
    for cells in compared_rows(details["summary"]):
        assert "".join(f"<td>{cell}</td>" for cell in cells) in html


def test_a_single_held_out_sequence_and_no_sweeps(model, text, tmp_path) -> None:
    settings: dict[str, Any] = {"schemes": ["int3-g32"], "sequences": [8], "seeds": 1, "seq_len": 32}
    compare(model(), output=tmp_path / "one", calibration=str(text), eval_sequences=1, curvatures=["mean", "nearest"], **settings)
    details = json.loads((tmp_path / "one" / "compare.json").read_text())
    assert [row["kl_stderr"] for row in details["rows"]] == [None, None]
    assert [(row["kl_stderr"], row["j_ratio"]) for row in details["summary"]] == [(0, None), (0, None)]
    assert not (tmp_path / "one" / "ranking.png").exists()
    drawn = []

    def spied(panels: Any, **_settings: Any) -> bytes:
        drawn.append(panels)
        return b""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison.plots, "scatter", spied)
        for sweeps in (0, 1):
            compare(
                model(),
                output=tmp_path / f"sweeps{sweeps}",
                calibration=str(text),
                eval_sequences=2,
                curvatures=["mean", "gptq"],
                sweeps=sweeps,
                **settings,
            )
    # only methods with equal sweeps are ranked
    assert [[[point[0] for point in points] for points in panels.values()] for panels in drawn] == [[["mean", "gptq"]] * 2, [["mean"]] * 2]


@pytest.mark.parametrize("columns", [40, pytest.param(None, marks=pytest.mark.slow)])
def test_command(columns: int | None, model, text, tmp_path, command, monkeypatch) -> None:
    if columns:
        monkeypatch.setenv("COLUMNS", str(columns))
    methods = "mean,fastkron:steps=2:batch=3:tolerance=0.5,nearest"
    line = ["compare", model(), "-o", tmp_path / "out", "--calibration", text, "--curvatures", methods, "--schemes", "int3-g32, int4-g64"]
    line += ["--seeds", 1, "--seq-len", 32, "--eval-sequences", 4]
    outcome = command(*line, "--sequences", "4,8" if columns else 4, "--json", tmp_path / "details.json")
    assert outcome.code == 0
    assert "…" not in outcome.out
    assert max(len(line) for line in outcome.out.splitlines() if "index.html" not in line) < 110
    details = json.loads((tmp_path / "details.json").read_text())
    assert details == json.loads((tmp_path / "out" / "compare.json").read_text())
    rows = [line.split() for line in outcome.out.splitlines()]
    for cells, row in zip(
        compared_rows(details["summary"], ["method", "KL", "ratio to the first", "J ratio", "seconds"]), details["summary"], strict=True
    ):
        expected = " ".join(cells).split()
        assert ([str(row["sequences"]), *expected] if columns else expected) in rows
    assert ("sequences" in outcome.out) == bool(columns)
    assert outcome.out.index("int3-g32: KL") < outcome.out.index("int4-g64: KL")
    assert "ratio: to the KL of mean" in outcome.out
    quiet = command(*line, "--sequences", "4,8" if columns else 4, "--resume", "--quiet")
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")
    refused = command(*line, "--sequences", "4,many")
    assert refused.code == 2
    assert "--sequences 'many': expected whole numbers" in refused.err
