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
    """Sums and tokens of each linear in the last pass that was run, and the number of passes."""
    model, passes = tiny_llama(), []
    tokens = TOKENS[: SEQUENCES - HELD_OUT] if spec.startswith("auto") else TOKENS
    state = collect(
        model,
        linears(model),
        tokens,
        parse_curvature(spec),
        seed=3,
        batch_size=1,
        each_pass=lambda state: passes.append(state.index),
        **settings,
    )
    sums = {name: sketch.sums for name, sketch in state.sketches.items()}
    return sums, {name: sketch.tokens for name, sketch in state.sketches.items()}, len(passes)


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
        sums, tokens, passes = alone(spec, labels=labels)
        assert measured.passes == passes, spec
        assert measured.sketches.keys() == sums.keys()
        assert all(factors.scale > 0 for factors in (sketch.factors() for sketch in measured.sketches.values()))
        for name, sketch in measured.sketches.items():
            assert sketch.tokens == tokens[name] == LENGTH * (SEQUENCES - HELD_OUT * spec.startswith("auto"))
            assert sketch.sums.keys() == sums[name].keys()
            for key, total in sums[name].items():
                assert torch.equal(sketch.sums[key], total), (spec, name, key)


def test_passes_are_counted_once_and_stop_when_the_longest_is_done(seen) -> None:
    done: list[int] = []
    found = run(advance=done.append)
    passes = {spec: measured.passes for spec, measured in found.items()}
    assert passes == {spec: parse_curvature(spec).passes if spec != EARLY else passes[EARLY] for spec in SPECS}
    assert 1 < passes[EARLY] < 6
    assert seen == [(k,) for _ in range(max(passes.values())) for k in TOKENS.sequence_ids]
    assert sum(done) == SEQUENCES * max(passes.values())


def test_the_stream_ends_when_all_have_converged(seen) -> None:
    found = run(specs=["fastkron:steps=6:tolerance=0.99", "kfac"])
    assert [measured.passes for measured in found.values()] == [2, 1]
    assert len(seen) == 2 * SEQUENCES


def test_batches_never_cross_the_end_of_an_estimator(seen) -> None:
    parts = segments(TOKENS, [parse_curvature(spec) for spec in ("kfac", "auto:holdout=2", "mean")])
    assert [part.sequence_ids for part in parts] == [tuple(range(10)), tuple(range(10, 19))]
    run(specs=["kfac", "auto:holdout=2"], batch_size=4)
    assert seen == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9), (10, 11, 12, 13), (14, 15, 16, 17), (18,)]


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
    found = run(specs=["kfac", "sketch-b", "power:rounds=2"], batch_size=4)
    updates, batches = SEQUENCES * len(linears(tiny_llama())), 5
    assert found["kfac"].seconds == 1000 * batches + updates
    assert found["sketch-b"].seconds == 1000 * batches + 10 * updates
    assert found["power:rounds=2"].seconds == 2000 * batches + 10 * updates  # the second pass is another sketch's
