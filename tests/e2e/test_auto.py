"""The default: one sequence in eight is kept out of the sums, and each linear's rounding is chosen by the KL predicted there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import roundel
from roundel.artifacts.factors import FactorsDirectory
from roundel.calibration import Split, read_documents, split_tokens, windows
from roundel.curvature import Candidate, Sketch, collect, predicted_kl
from roundel.curvature.sketches import ESTIMATORS, Auto
from roundel.errors import ModelError
from roundel.grids import parse_scheme
from roundel.models import load_model, load_tokenizer, select_linears
from roundel.stages import collecting
from roundel.stages import text as text_stage
from roundel.stages.collecting import collect_factors
from roundel.stages.drafts import DRAFT_SWEEPS
from roundel.sweeps import Layers
from roundel.types import KroneckerFactors, TokenBatch

SCHEME = "int3-g32"
ENOUGH: dict[str, Any] = {"sequences": 64, "seq_len": 32, "eval_sequences": 4}
"""The fewest sequences of which some are held out: 8."""
MANY: dict[str, Any] = {"sequences": 640, "seq_len": 8, "eval_sequences": 4}
"""80 are held out: with 8 the squares of even the best candidate's inner products scatter so much that hardly anything is significant."""
(BASE,) = Auto.__bases__
"""The estimator whose factors `auto` prefers, and its name."""
(NAME,) = (name for name, kind in ESTIMATORS.items() if kind is BASE)
CANDIDATES = {NAME, f"{NAME}, damped", "kfac", "input only"}


def parts(source: Path, text: Path, seed: int = 0) -> Split:
    """The sequences to fit on and to choose by, drawn apart from any run."""
    available = windows(read_documents(str(text), load_tokenizer(source)), load_tokenizer(source), 32, most=4 * 68)
    return split_tokens(available, calibration=64, heldout=4, choice=8, seed=seed, source="text")


@pytest.fixture(scope="module")
def chosen(model, quantize, tmp_path_factory) -> roundel.Quantized:
    return quantize(model(), tmp_path_factory.mktemp("auto") / "out", scheme=SCHEME, **ENOUGH)


def weights(result: roundel.Quantized) -> bytes:
    return (result.path / "model.safetensors").read_bytes()


def choices(result: roundel.Quantized) -> dict[str, tuple[str, dict[str, float]]]:
    return {name: (row["candidate"], row["candidates_predicted_kl"]) for name, row in result.details["layers"].items()}


def test_the_report_says_what_was_chosen_and_from_what(chosen) -> None:
    assert chosen.details["curvature"] == "auto"
    assert chosen.details["calibration"]["sequences"] == 56
    assert chosen.details["calibration"]["sequences_to_choose_by"] == 8
    assert chosen.details["calibration"]["tokens"] == 56 * 32
    assert chosen.details["recipe"]["sequences"] == 64
    for candidate, predicted in choices(chosen).values():
        assert set(predicted) == CANDIDATES
        assert all(value > 0 for value in predicted.values())
        assert candidate == NAME or predicted[candidate] < predicted[NAME]


@pytest.mark.usefixtures("exact")
def test_the_predictions_are_those_of_the_errors_of_the_drafts(model, quantize, text, tmp_path) -> None:
    """Without a sweep a draft is what is written in the end, if the held-out gradients, whose labels are others, do not join the sums."""
    chosen = quantize(model(), tmp_path / "out", scheme=SCHEME, sweeps=DRAFT_SWEEPS, labels="data", **ENOUGH)
    original = load_model(model(), device=torch.device("cpu"), dtype=torch.float32)
    linears = {name: original.get_submodule(name) for name in chosen.details["layers"]}
    packed = load_model(chosen.path, device=torch.device("cpu"), dtype=torch.float32)
    errors = {name: linear.weight.detach() - packed.get_submodule(name).weight.detach() for name, linear in linears.items()}
    found = predicted_kl(Layers(original), linears, errors.__getitem__, parts(model(), text).choice, seed=0, batch_size=1).layers
    for name, (candidate, predicted) in choices(chosen).items():
        assert predicted[candidate] == pytest.approx(found[name], rel=1e-4)


def test_collected_factors_give_the_same_checkpoint_and_the_same_choices(model, quantize, text, tmp_path) -> None:
    direct = quantize(model(), tmp_path / "direct", scheme=SCHEME, seed=4, **ENOUGH)
    header = collect_factors(model(), output=tmp_path / "factors", calibration=str(text), seed=4, **ENOUGH)
    assert (header.curvature, header.sequences, len(header.sequence_ids)) == ("auto", 64, 56)
    known = {"factors": tmp_path / "factors", "eval_sequences": 4, "sweeps": 1}
    reused = roundel.quantize(model(), output=tmp_path / "reused", scheme=SCHEME, **known)
    assert weights(direct) == weights(reused)
    assert choices(direct) == choices(reused)
    assert direct.details["calibration"] == reused.details["calibration"]
    assert direct.report == reused.report


@pytest.mark.parametrize("batch_size", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_no_batch_size_changes_a_choice_or_a_prediction(batch_size: int, chosen, model, quantize, tmp_path) -> None:
    other = quantize(model(), tmp_path / "out", scheme=SCHEME, batch_size=batch_size, **ENOUGH)
    assert choices(other) == choices(chosen)
    assert weights(other) == weights(chosen)


@pytest.mark.usefixtures("exact")
def test_what_is_held_out_is_not_in_the_sums(model, text, tmp_path, monkeypatch) -> None:
    split_text, splits = collecting.split_text, []
    monkeypatch.setattr(collecting, "split_text", lambda *args, **settings: splits.append(split_text(*args, **settings)) or splits[-1])
    collect_factors(model(), output=tmp_path / "auto", calibration=str(text), **ENOUGH)
    (split,), expected = splits, parts(model(), text)
    stored = FactorsDirectory.open(tmp_path / "auto")
    header, sketches = stored.header, stored.sketches(stored.header.layers, torch.device("cpu"))
    assert header.sequence_ids == split.calibration.sequence_ids
    assert set(header.sequence_ids) == set(expected.calibration.sequence_ids)
    assert split.choice.sequence_ids == expected.choice.sequence_ids
    assert not set(header.sequence_ids) & set(expected.choice.sequence_ids)
    original = load_model(model(), device=torch.device("cpu"), dtype=torch.float32)
    linears = select_linears(original, parse_scheme("int8-channel").check).linears
    fitted, all_of_them = (
        collect(Layers(original), linears, tokens, BASE(), seed=0, batch_size=1) for tokens in (split.calibration, split.used)
    )
    assert sketches.keys() == fitted.keys()
    for name, sketch in sketches.items():
        assert sketch.tokens == fitted[name].tokens < all_of_them[name].tokens
        for key, total in fitted[name].sums.items():
            assert torch.equal(sketch.sums[key], total.tril() if total.ndim == 2 else total), (name, key)
            assert not torch.equal(all_of_them[name].sums[key], total)


def scrambled(size: int, *, least: float) -> Tensor:
    """Curvature that has nothing to do with the model: a random basis, eigenvalues over four decades, the last one `least`."""
    basis = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size)))[0]
    spectrum = torch.logspace(0, -4, size, dtype=torch.float64)
    spectrum[-1] = least
    H = basis @ torch.diag(spectrum) @ basis.T
    return (H / H.diagonal().mean()).float()


def offering(monkeypatch: pytest.MonkeyPatch, candidates: Callable[[Sketch], dict[str, KroneckerFactors]]) -> None:
    """Takes the place of the candidates of `auto`."""

    def offered(_self: Auto, sketch: Sketch) -> dict[str, Candidate]:
        return {label: Candidate(factors=factors) for label, factors in candidates(sketch).items()}

    monkeypatch.setattr(Auto, "candidates", offered)


@pytest.mark.slow
def test_where_the_first_factors_mislead_the_better_ones_are_taken(model, text, quantize, tmp_path, monkeypatch) -> None:
    """Only those of `down_proj`, whose width is 96. They are also indefinite, of which whoever does not take them hears nothing."""

    def misleading(sketch: Sketch) -> dict[str, KroneckerFactors]:
        good = sketch.factors()
        bad = KroneckerFactors(H_out=scrambled(sketch.d_out, least=1e-4), H_in=scrambled(sketch.d_in, least=-0.05), scale=good.scale)
        return {"first": bad if sketch.d_in == 96 else good, "second": good}

    roundel.collect_factors(model(), output=tmp_path / "factors", calibration=str(text), **MANY)
    known = {"scheme": SCHEME, "factors": tmp_path / "factors"}
    offering(monkeypatch, misleading)
    result = quantize(model(), tmp_path / "misled", **known, **MANY)
    for name, (candidate, predicted) in choices(result).items():
        if name.endswith("down_proj"):
            assert candidate == "second"
            assert predicted["second"] < 0.8 * predicted["first"]
        else:  # a tie
            assert candidate == "first"
            assert predicted["second"] == predicted["first"]
    assert result.details["warnings"] == []
    offering(monkeypatch, lambda sketch: {"second": sketch.factors()})
    assert weights(quantize(model(), tmp_path / "second", **known, **MANY)) == weights(result)
    offering(monkeypatch, lambda sketch: {"first": misleading(sketch)["first"]})
    misled = quantize(model(), tmp_path / "first", **known, **MANY)
    assert weights(misled) != weights(result)
    assert {warning.split(":")[0] for warning in misled.details["warnings"]} == {n for n in choices(result) if n.endswith("down_proj")}


def test_with_few_sequences_nothing_is_held_out_and_nothing_chosen(model, quantize, tmp_path) -> None:
    few = {**ENOUGH, "sequences": 63}
    auto, base = (quantize(model(), tmp_path / name, scheme=SCHEME, curvature=name, **few) for name in ("auto", NAME))
    assert auto.details["calibration"]["sequences"] == 63
    assert auto.details["calibration"]["sequences_to_choose_by"] == 0
    assert all("candidate" not in row and "candidates_predicted_kl" not in row for row in auto.details["layers"].values())
    assert auto.details["calibration"] == base.details["calibration"]
    assert weights(auto) == weights(base)


def test_other_estimators_hold_nothing_out(model, quantize, tmp_path) -> None:
    result = quantize(model(), tmp_path / "out", scheme=SCHEME, curvature=NAME, **ENOUGH)
    assert result.details["calibration"]["sequences"] == 64
    assert all("candidate" not in row for row in result.details["layers"].values())


def test_a_token_beyond_the_vocabulary_is_found_there_too(model, quantize, tmp_path, monkeypatch) -> None:
    split_text = text_stage.split_text

    def stray(*args: Any, **settings: Any) -> Split:
        split = split_text(*args, **settings)
        ids = split.choice.ids.clone()
        ids[-1, 3] = 300
        return dataclasses.replace(split, choice=TokenBatch.of(ids))

    monkeypatch.setattr(text_stage, "split_text", stray)
    with pytest.raises(ModelError, match="token 300, but the model's vocabulary has 300"):
        quantize(model(), tmp_path / "out", scheme=SCHEME, **ENOUGH)
