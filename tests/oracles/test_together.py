"""Several estimators over one gradient stream get what each gets alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from oracles.tiny import linears, random_tokens, tiny_llama
from roundel.curvature import collect, together
from roundel.curvature.sketches import ESTIMATORS, parse_curvature
from roundel.curvature.sketches.kfac import KfacSums
from roundel.curvature.sketches.sketch_b import SketchBSums
from roundel.curvature.together import collect_together, segments
from roundel.types import TokenBatch

SMALL = {
    "auto": "auto:holdout=2",
    "power": "power:rounds=3",
    "fastkron": "fastkron:steps=3:batch=4:tolerance=0",
    "sketch-a": "sketch-a:rounds=1",
    "triangular": "triangular:rounds=2",
    "diagonal": "diagonal:of=fastkron",
}
EARLY = "fastkron:steps=6:tolerance=0.2"
SPECS = [*(SMALL.get(name, name) for name in ESTIMATORS), EARLY]
SEQUENCES, LENGTH, HELD_OUT = 19, 6, 9
TOKENS = random_tokens(SEQUENCES, LENGTH)


def run(tokens: TokenBatch = TOKENS, *, specs: list[str] = SPECS, batch_size: int = 1, **settings: Any) -> dict[str, together.Measured]:
    model = tiny_llama()
    estimators = {spec: parse_curvature(spec) for spec in specs}
    return collect_together(model, linears(model), tokens, estimators, seed=3, batch_size=batch_size, **settings)


def alone(spec: str, **settings: Any) -> tuple[dict[str, dict[str, Tensor]], dict[str, int], int]:
    """Sums and tokens of each linear in the last pass that was run, and how many sequences went through the model."""
    model, done = tiny_llama(), 0

    def count(_state: object) -> None:
        nonlocal done
        done += 1

    tokens = TOKENS[: SEQUENCES - HELD_OUT] if spec.startswith("auto") else TOKENS
    state = collect(model, linears(model), tokens, parse_curvature(spec), seed=3, batch_size=1, each_batch=count, **settings)
    sums = {name: sketch.sums for name, sketch in state.sketches.items()}
    return sums, {name: sketch.tokens for name, sketch in state.sketches.items()}, done


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The sequences of every batch that goes through the model."""
    batches: list[tuple[int, ...]] = []
    original = together.backward

    def recorded(model: Any, batch: TokenBatch, *args: Any, **settings: Any) -> None:
        batches.append(batch.sequence_ids)
        original(model, batch, *args, **settings)

    monkeypatch.setattr(together, "backward", recorded)
    return batches


@pytest.mark.parametrize(("specs", "labels"), [(SPECS, "sampled"), (["auto:holdout=2", "guided"], "data")])
def test_sums_and_passes_are_those_of_each_alone_bit_for_bit(specs: list[str], labels: str) -> None:
    found = run(specs=specs, labels=labels)
    assert list(found) == specs
    for spec, measured in found.items():
        sums, tokens, done = alone(spec, labels=labels)
        assert measured.passes * (SEQUENCES - HELD_OUT * spec.startswith("auto")) == done, spec
        assert measured.sketches.keys() == sums.keys()
        assert all(factors.scale > 0 for factors in (sketch.factors() for sketch in measured.sketches.values()))
        for name, sketch in measured.sketches.items():
            assert sketch.tokens == tokens[name] > 0
            assert sketch.sums.keys() == sums[name].keys()
            for key, total in sums[name].items():
                assert torch.equal(sketch.sums[key], total), (spec, name, key)


def test_passes_end_with_the_longest_estimator(seen) -> None:
    done: list[int] = []
    specs = ["kfac", "sketch-a:rounds=1", EARLY]
    passes = {spec: measured.passes for spec, measured in run(specs=specs, advance=done.append).items()}
    assert passes == {"kfac": 1, "sketch-a:rounds=1": 2, EARLY: passes[EARLY]}
    assert 2 < passes[EARLY] < 6
    assert seen == [(k,) for _ in range(passes[EARLY]) for k in TOKENS.sequence_ids]
    assert sum(done) == SEQUENCES * passes[EARLY]


def test_a_pilot_is_one_pass_over_the_data_and_nothing_goes_through_in_vain(seen) -> None:
    done: list[int] = []
    assert run(specs=["auto:holdout=2"], advance=done.append)["auto:holdout=2"].passes == 1
    assert seen == [(k,) for k in range(SEQUENCES - HELD_OUT)]
    assert sum(done) == 2 * SEQUENCES


def test_the_stream_ends_when_all_have_converged(seen) -> None:
    found = run(specs=["fastkron:steps=6:tolerance=0.99", "kfac"])
    assert [measured.passes for measured in found.values()] == [2, 1]
    assert len(seen) == 2 * SEQUENCES


def test_batches_never_cross_the_end_of_an_estimator(seen) -> None:
    parts = segments(TOKENS, [parse_curvature(spec) for spec in ("kfac", "auto:holdout=2", "mean")])
    pilot = 2  # a quarter of the 10 that auto sums up
    assert [part.sequence_ids for part in parts] == [tuple(range(pilot)), tuple(range(pilot, 10)), tuple(range(10, 19))]
    run(specs=["kfac", "auto:holdout=2"], batch_size=5)
    first = [(0, 1), (2, 3, 4, 5, 6), (7, 8, 9), (10, 11, 12, 13, 14), (15, 16, 17, 18)]
    assert seen == [*first, *first[1:3]]


def test_bytes_are_those_of_the_sums_and_of_what_goes_on() -> None:
    specs = ["kfac", "mean", "sketch-b", "sketch-b:rounds=2", "fastkron:steps=1:batch=4"]
    found = {spec: measured.state_bytes for spec, measured in run(specs=specs).items()}
    shapes = [(linear.out_features, linear.in_features) for linear in linears(tiny_llama()).values()]
    pair, trace = sum(4 * (d_out**2 + d_in**2) for d_out, d_in in shapes), 8 * len(shapes)
    assert found["kfac"] == pair + trace
    assert found["sketch-b"] == pair + trace
    assert found["sketch-b:rounds=2"] == 2 * pair + trace  # the second pass has the factors of the first
    assert found["fastkron:steps=1:batch=4"] == pair + 2 * trace + sum(4 * d_out * d_in for d_out, d_in in shapes)
    assert 2 * pair <= found["mean"] <= 2 * pair + 2 * trace


def test_seconds_are_those_of_the_model_and_of_an_estimators_own_sums(monkeypatch) -> None:
    clock = 0.0

    def ticking(original: Callable[..., Any], seconds: float) -> Callable[..., Any]:
        def call(*args: Any, **settings: Any) -> Any:
            nonlocal clock
            clock += seconds
            return original(*args, **settings)

        return call

    monkeypatch.setattr(together, "_now", lambda _device: clock)
    monkeypatch.setattr(together, "backward", ticking(together.backward, 1000))
    monkeypatch.setattr(KfacSums, "add_sequence", ticking(KfacSums.add_sequence, 1))
    monkeypatch.setattr(SketchBSums, "add_sequence", ticking(SketchBSums.add_sequence, 10))
    found = run(specs=["kfac", "sketch-b", "power:rounds=2", "pilot"], batch_size=1)
    layers = len(linears(tiny_llama()))
    assert found["kfac"].seconds == SEQUENCES * (1000 + layers)
    assert found["sketch-b"].seconds == SEQUENCES * (1000 + 10 * layers)
    assert found["power:rounds=2"].seconds == SEQUENCES * (2000 + 10 * layers)  # the second pass is another sketch's
    pilot = parse_curvature("pilot").pilot(SEQUENCES)
    assert found["pilot"].seconds == pytest.approx(SEQUENCES * (1000 + layers) + pilot * 10 * layers)  # each sequence once, in either pass
