"""Later layers make up for the errors of earlier ones: less loss on other text, for every kind of grid and of factors."""

from __future__ import annotations

import copy

import pytest
import torch

from e2e import tiny
from roundel.errors import SchemeError
from roundel.models import load_model
from roundel.recipes import Recipe
from roundel.stages.rounding import error_aware
from roundel.stages.rounding.error_aware import Targets
from roundel.types import Factors, GroupedFactors, KroneckerFactors, RoundedWeight, TokenBatch

SETTINGS = {"curvature": "kfac", "sweeps": 1, "sequences": 8, "eval_sequences": 4}


def test_the_loss_on_other_text_falls(model, quantize, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(error_aware, "TOKENS", 512)
    monkeypatch.setattr(error_aware, "STEPS", 8)
    text = tmp_path / "text.txt"
    text.write_text(tiny.make_text(30_000))
    given = {**SETTINGS, "scheme": "int2-g16", "calibration": str(text), "sequences": 64, "eval_sequences": 12}
    plain = quantize(model(), tmp_path / "plain", **given)
    aware = quantize(model(), tmp_path / "aware", **given, error_aware=True)
    assert aware.report.kl_mean < 0.95 * plain.report.kl_mean
    assert aware.details["bits_per_weight"] == plain.details["bits_per_weight"]
    moved = [row["error_aware"] for row in aware.details["layers"].values() if "error_aware" in row]
    assert 0 < len(moved) < len(aware.details["layers"])  # nothing follows the last layer
    assert all(row["taken"] and row["held_out_kl"][1] < row["held_out_kl"][0] for row in moved)


def test_targets_that_do_not_help_are_dropped(model, quantize, tmp_path, monkeypatch) -> None:
    def away(self: Targets, ids: torch.Tensor, part: float) -> None:
        for name, value in self.values.items():
            self.values[name] = 3 * value
            self._weight(name).copy_(self.values[name])

    plain = quantize(model(), tmp_path / "plain", scheme="int4-g16", **SETTINGS)
    monkeypatch.setattr(error_aware, "STEPS", 1)
    monkeypatch.setattr(Targets, "_step", away)
    aware = quantize(model(), tmp_path / "aware", scheme="int4-g16", error_aware=True, **SETTINGS)
    assert not any(row["error_aware"]["taken"] for row in aware.details["layers"].values() if "error_aware" in row)
    assert sum("does not make up" in warning for warning in aware.details["warnings"]) == 1
    assert (aware.path / "model.safetensors").read_bytes() == (plain.path / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("scheme", "curvature"), [("lattice2", "kfac"), ("int3-g16-asym", "guided:groups=2")])
def test_every_grid_and_every_kind_of_factors(model, quantize, tmp_path, monkeypatch, scheme: str, curvature: str) -> None:
    monkeypatch.setattr(error_aware, "STEPS", 1)
    given = {**SETTINGS, "sequences": 24, "eval_sequences": 4, "scheme": scheme, "curvature": curvature, "error_aware": True}
    result = quantize(model(dtype=torch.bfloat16), tmp_path / "out", **given)
    found = [row["error_aware"]["held_out_kl"] for row in result.details["layers"].values() if "error_aware" in row]
    assert len(found) == 7  # of the first of two layers
    assert all(0 < kl < 20 for pair in found for kl in pair)


def kronecker(d_out: int, d_in: int) -> KroneckerFactors:
    H_out, H_in = (torch.eye(d) + 0.1 * torch.randn(d, 2 * d) @ torch.randn(2 * d, d) / d for d in (d_out, d_in))
    return KroneckerFactors.normalised(H_out @ H_out.T, H_in @ H_in.T, trace=7.0)


def test_steps_solve_the_damped_factors_and_have_the_best_length(model, monkeypatch) -> None:
    torch.manual_seed(0)
    original = load_model(model(), device=torch.device("cpu"), dtype=torch.float32)
    first, second = (f"model.layers.1.mlp.{own}" for own in ("gate_proj", "up_proj"))
    d_out, d_in = original.get_submodule(first).weight.shape
    grouped = GroupedFactors(groups=(kronecker(d_out // 2, d_in), kronecker(d_out // 2, d_in)))
    factors: dict[str, Factors] = {first: kronecker(d_out, d_in), second: grouped}
    text = TokenBatch.of(torch.randint(5, 45, (8, 16)))
    changed = copy.deepcopy(original)
    changed.model.layers[0].mlp.down_proj.weight.data.mul_(0.5)
    targets = Targets(changed, factors, text, text, seed=0, batch_size=8)
    targets._original = original  # the model that is to be approached is another one
    _, gradients = targets._gradients(text.ids)
    for name, G in gradients.items():
        N, slope = targets._natural(name, G)
        for rows, group in factors[name].row_groups():
            H_out, H_in = (H + error_aware.DAMPING * torch.eye(len(H)) for H in (group.H_out, group.H_in))
            torch.testing.assert_close(group.scale * H_out @ N[rows] @ H_in, G[rows], rtol=1e-3, atol=1e-3 * G.abs().max().item())
        assert slope == pytest.approx(float((G * N).sum()), rel=1e-4)
    kl = targets._held_out_kl()
    start, kls = dict(targets.values), []
    for part in (0.5, 1.0, 1.5):
        for name, value in start.items():
            targets.values[name] = value
            targets._weight(name).copy_(value)
        targets._step(text.ids, part)
        kls.append(targets._held_out_kl())
    assert kls[1] < min(kl, kls[0], kls[2])


def test_one_scheme_for_all() -> None:
    with pytest.raises(SchemeError, match="error-aware"):
        Recipe(scheme="int4-g32", bits=3.5, error_aware=True)


def test_nothing_is_left_after_the_last_layer(model) -> None:
    original = load_model(model(), device=torch.device("cpu"), dtype=torch.float32)
    name = "model.layers.1.mlp.gate_proj"
    d_out, d_in = original.get_submodule(name).weight.shape
    text = TokenBatch.of(torch.randint(5, 45, (2, 8)))
    targets = Targets(original, {name: kronecker(d_out, d_in)}, text, text, seed=0, batch_size=2)
    codes = torch.zeros(d_out, d_in, dtype=torch.int8)
    rounded = RoundedWeight(scheme="int4-g16", codes=codes, scales={"scale": torch.ones(d_out, d_in // 16)}, shape=(d_out, d_in))
    assert targets.follow({name: rounded}) == {}
