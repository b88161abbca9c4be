"""Experts that saw too little text borrow the curvature of the others."""

from __future__ import annotations

import pytest
import torch

from oracles.test_estimators import gradient_stream
from roundel.curvature import parse_curvature
from roundel.curvature.pooling import ENOUGH, Pooled
from roundel.curvature.sketches.base import Sketch
from roundel.types import LayerGrad, LayerInput

D_OUT, D_IN = 5, 6


def sums(rows: int, seed: int, text: int = 100) -> Sketch:
    """An expert's, that was given so many rows of a sequence."""
    sketch = parse_curvature("kfac").sketch(D_OUT, D_IN, torch.device("cpu"), index=0, previous=None)
    x, g = gradient_stream(D_OUT, D_IN, sequences=1, seed=seed)
    x, g = x.repeat(1, 1 + rows // x.shape[1], 1)[:, :rows], g.repeat(1, 1 + rows // g.shape[1], 1)[:, :rows]
    sketch.update(LayerGrad(input=LayerInput(x.contiguous()), g=g.contiguous(), text=text))
    return sketch


@pytest.fixture
def sketches() -> dict[str, Sketch]:
    rows = {"experts.0.up": 40, "experts.1.up": 6, "experts.2.up": 0, "other": 3}
    return {name: sums(count, seed) for seed, (name, count) in enumerate(rows.items())}


def family(name: str) -> str | None:
    return "experts.up" if name.startswith("experts") else None


def test_rows_say_how_much_is_borrowed_and_tokens_stay_those_of_the_text(sketches) -> None:
    pooled = Pooled(parse_curvature("kfac"), sketches, family)
    assert [sketch.rows for sketch in sketches.values()] == [40, 6, 0, 3]
    assert [sketch.tokens for sketch in sketches.values()] == [100] * 4
    assert [pooled.borrowed(name) for name in sketches] == [0.0, 1 - 6 / (ENOUGH * D_IN), 1.0, 0.0]


def test_factors_are_blended_with_the_weighted_mean(sketches) -> None:
    pooled = Pooled(parse_curvature("kfac"), sketches, family)
    own = {name: sketch.factors() for name, sketch in sketches.items()}
    found = {name: pooled.candidates(name)[next(iter(pooled.candidates(name)))].factors for name in sketches}
    total = sum(own[name].scale for name in ("experts.0.up", "experts.1.up"))
    mean = {side: sum(own[n].scale * getattr(own[n], side) for n in ("experts.0.up", "experts.1.up")) / total for side in ("H_out", "H_in")}
    for side in ("H_out", "H_in"):
        for name in ("experts.0.up", "other"):
            assert torch.equal(getattr(found[name], side), getattr(own[name], side))
        part = pooled.borrowed("experts.1.up")
        blend = (1 - part) * getattr(own["experts.1.up"], side) + part * mean[side]
        torch.testing.assert_close(getattr(found["experts.1.up"], side), blend)
        torch.testing.assert_close(getattr(found["experts.2.up"], side), mean[side])
    assert found["experts.1.up"].scale == own["experts.1.up"].scale
    assert own["experts.2.up"].scale == 0
    assert found["experts.2.up"].scale == pytest.approx(total / (2 * 46))


def test_without_any_row_in_the_family_nothing_can_be_borrowed() -> None:
    alone = {f"experts.{expert}.up": sums(0, expert) for expert in range(2)}
    pooled = Pooled(parse_curvature("kfac"), alone, family)
    assert all(candidate.factors.scale == 0 for name in alone for candidate in pooled.candidates(name).values())
