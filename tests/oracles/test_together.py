"""Several estimators over the same gradients get what each gets alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import nn

from oracles import tiny
from oracles.tiny import random_tokens, tiny_llama
from roundel.curvature import Sketch, collect
from roundel.curvature.collect import Measured, collect_together, factors_of, runs_of
from roundel.curvature.sketches import ESTIMATORS, parse_curvature
from roundel.curvature.sketches.kfac import KfacSums
from roundel.curvature.sketches.sketch_b import SketchBSums
from roundel.sweeps import Layers, Visit
from roundel.types import LayerGrad, TokenBatch

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
LAYERS = 2


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Two of each layer: of its attention and of its MLP."""
    return {name: linear for name, linear in tiny.linears(model).items() if name.endswith(("k_proj", "down_proj"))}


def run(tokens: TokenBatch = TOKENS, *, specs: list[str] = SPECS, batch_size: int = 1, **settings: Any) -> dict[str, Measured]:
    model = tiny_llama()
    estimators = {spec: parse_curvature(spec) for spec in specs}
    return collect_together(Layers(model), linears(model), tokens, estimators, seed=3, batch_size=batch_size, **settings)


def alone(spec: str, **settings: Any) -> dict[str, Sketch]:
    """The sums of the last pass that was run."""
    model = tiny_llama()
    tokens = TOKENS[: SEQUENCES - HELD_OUT] if spec.startswith("auto") else TOKENS
    return collect(Layers(model), linears(model), tokens, parse_curvature(spec), seed=3, batch_size=1, **settings)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[tuple[int, ...]]]:
    """The sequences of every batch that goes through each group of layers for its gradients."""
    batches: dict[int, list[tuple[int, ...]]] = {}
    original = Visit.replay

    def recorded(visit: Visit, rows: Sequence[int], consume: Callable[[str, LayerGrad], None]) -> None:
        batches.setdefault(visit.index, []).append(tuple(rows))
        original(visit, rows, consume)

    monkeypatch.setattr(Visit, "replay", recorded)
    return batches


@pytest.mark.parametrize(
    ("specs", "labels"),
    [(SPECS[::4], "sampled"), pytest.param(SPECS, "sampled", marks=pytest.mark.slow), (["auto:holdout=2", "guided"], "data")],
)
def test_sums_and_passes_are_those_of_each_alone_bit_for_bit(specs: list[str], labels: str, seen) -> None:
    found = run(specs=specs, labels=labels)
    assert list(found) == specs
    for spec, measured in found.items():
        seen.clear()
        sketches = alone(spec, labels=labels)
        done = max(sum(map(len, batches)) for batches in seen.values())
        assert measured.passes * (SEQUENCES - HELD_OUT * spec.startswith("auto")) == done, spec
        assert list(measured.sketches) == list(sketches) == list(linears(tiny_llama()))
        assert all(factors.scale > 0 for factors in factors_of(measured.sketches).values())
        for name, sketch in measured.sketches.items():
            assert sketch.tokens == sketches[name].tokens > 0
            assert sketch.sums.keys() == sketches[name].sums.keys()
            for key, total in sketches[name].sums.items():
                assert torch.equal(sketch.sums[key], total), (spec, name, key)


def test_each_estimator_replays_a_group_as_often_as_it_needs(seen) -> None:
    done: list[int] = []
    specs = ["kfac", "sketch-a:rounds=1", EARLY]
    passes = {spec: measured.passes for spec, measured in run(specs=specs, advance=done.append).items()}
    assert passes == {"kfac": 1, "sketch-a:rounds=1": 2, EARLY: passes[EARLY]}
    assert 2 < passes[EARLY] < 6
    assert list(seen) == [1, 0]
    own = [len(batches) // SEQUENCES for batches in seen.values()]
    assert max(own) == sum(passes.values())
    assert list(seen.values()) == [[(k,) for _ in range(count) for k in range(SEQUENCES)] for count in own]
    assert sum(done) == SEQUENCES * (2 * LAYERS + 1)


def test_a_pilot_is_one_pass_over_the_data_and_nothing_is_replayed_in_vain(seen) -> None:
    assert run(specs=["auto:holdout=2"])["auto:holdout=2"].passes == 1
    assert list(seen) == [1, 0]
    assert all(batches == [(k,) for k in range(SEQUENCES - HELD_OUT)] for batches in seen.values())


def test_a_group_is_left_when_all_have_converged(seen) -> None:
    found = run(specs=["fastkron:steps=6:tolerance=0.99", "kfac"])
    assert [measured.passes for measured in found.values()] == [2, 1]
    assert [len(batches) for batches in seen.values()] == [3 * SEQUENCES] * LAYERS


def test_batches_never_cross_the_end_of_a_run(seen) -> None:
    parts = runs_of(SEQUENCES, [parse_curvature("auto:holdout=2")])
    pilot = [range(2)]  # a quarter of the 10 that auto sums up
    rest = [range(2, 4), range(4, 6), range(6, 8), range(8, 10)]
    assert parts == [*pilot, *rest, range(10, 12), range(12, 14), range(14, 16), range(16, 19)]
    run(specs=["kfac", "auto:holdout=2"], batch_size=2)
    every = [rows[start : start + 2] for rows in runs_of(SEQUENCES, [parse_curvature("kfac")]) for start in range(0, len(rows), 2)]
    assert all(batches == [tuple(rows) for rows in [*every, *pilot, *rest]] for batches in seen.values())


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

    monkeypatch.setattr(import_module("roundel.curvature.collect"), "_now", lambda _device: clock)
    monkeypatch.setattr(Visit, "replay", ticking(Visit.replay, 1000))
    monkeypatch.setattr(KfacSums, "add_sequence", ticking(KfacSums.add_sequence, 1))
    monkeypatch.setattr(SketchBSums, "add_sequence", ticking(SketchBSums.add_sequence, 10))
    found = run(specs=["kfac", "sketch-b", "power:rounds=2", "pilot"], batch_size=1)
    layers = len(linears(tiny_llama()))
    assert found["kfac"].seconds == SEQUENCES * (1000 * LAYERS + layers)
    assert found["sketch-b"].seconds == SEQUENCES * (1000 * LAYERS + 10 * layers)
    assert found["power:rounds=2"].seconds == SEQUENCES * (2000 * LAYERS + 10 * layers)  # the second pass is another sketch's
    pilot = parse_curvature("pilot").pilot(SEQUENCES)
    expected = SEQUENCES * (1000 * LAYERS + layers) + pilot * 10 * layers  # each sequence once, in either pass
    assert found["pilot"].seconds == pytest.approx(expected)
