"""`roundel plan`: what it says of sizes is what `quantize` makes, and it needs no weights."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from roundel.errors import ModelError, SchemeError
from roundel.recipes import Recipe
from roundel.stages import plan as planning
from roundel.stages import timing
from roundel.stages.plan import duration, plan
from roundel.stages.timing import Timing, Units, seconds

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "torch_dtype": "bfloat16",
}
MIXTURE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "vocab_size": 151936,
    "torch_dtype": "bfloat16",
}
RATES = Timing(
    what="nothing",
    waited=0.0,
    product=1e-12,
    product32=1e-12,
    inverse=1e-15,
    gradients=1e-10,
    forward=1e-10,
    moments=1e-10,
    predicted=1e-10,
    factors=1e-12,
    rounding=1e-8,
    sweep=1e-8,
    writing=1e-9,
    head_gradients=1e-12,
    head=1e-12,
    reading=1e-10,
)


def test_a_busy_machine_is_warned_of(monkeypatch, model) -> None:
    monkeypatch.setattr(planning, "timing_of", lambda *_given: dataclasses.replace(RATES, waited=0.5))
    (warning,) = (line for line in plan(model(), scheme="int4-g32")["warnings"] if "other programs" in line)
    assert "for 50% of the time" in warning


def test_time_that_others_took_does_not_count() -> None:
    began, alone = time.monotonic(), timing.undisturbed()
    sum(range(1_000_000))
    passed, own = time.monotonic() - began, timing.undisturbed() - alone
    assert own <= passed + 1e-3


def test_a_given_matrix_costs_no_gradients(untimed, model, tmp_path) -> None:
    plain = plan(model(), scheme="int4-g32", curvature="imatrix")["seconds"]
    given = plan(model(), scheme="int4-g32", curvature=f"imatrix:{tmp_path / 'm.gguf'}")["seconds"]
    assert 0 < given.pop("curvature") < plain.pop("curvature")
    assert given == plain


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "timing_of", lambda *_given: RATES)


def outline(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("scheme", ["int4-g32", "int3-g32-asym", "fp8"])
def test_sizes_are_those_that_quantize_writes(scheme: str, model, quantize, untimed, tmp_path: Path) -> None:
    given = {"scheme": scheme, "sequences": 8, "seq_len": 32}
    found = plan(model(dtype=torch.bfloat16), **given)
    result = quantize(model(dtype=torch.bfloat16), tmp_path / "out", **given)
    assert found["bits_per_weight"] == pytest.approx(result.details["bits_per_weight"]["quantized"])
    assert found["coverage"] == result.details["coverage"]
    assert found["linears"] == len(result.details["layers"])
    assert found["format"] == result.details["format"]
    with safe_open(result.path / "model.safetensors", framework="pt") as tensors:
        written = sum(tensors.get_tensor(name).nbytes for name in tensors.keys())  # noqa: SIM118
    assert found["bytes"]["output"] == pytest.approx(written, rel=0.01)
    assert result.details["resources"]["peak_memory"] > 100_000_000


def test_a_configuration_is_enough(untimed, tmp_path: Path) -> None:
    found = plan(outline(tmp_path / "model", LLAMA), scheme="int4-g128", memory="250G")
    assert found["parameters"] == 70_553_706_496
    assert found["linears"] == 560
    assert found["coverage"]["share"] == 1.0
    assert found["bits_per_weight"] == pytest.approx(4.125, rel=1e-5)
    assert found["bytes"]["output"] == pytest.approx((found["parameters"] - 68.5e9) * 2 + 68.5e9 * 4.125 / 8, rel=0.01)
    assert found["memory"]["main"] < 250e9  # layer by layer: the weights alone are 280
    assert plan(tmp_path / "model", memory="1000G")["memory"]["main"] > 280e9
    assert not any(path.suffix == ".safetensors" for path in tmp_path.rglob("*"))


@pytest.mark.slow
def test_experts_are_counted_and_cost_what_their_tokens_do(untimed, tmp_path: Path) -> None:
    found = plan(outline(tmp_path / "model", MIXTURE), scheme="int4-g128")
    assert found["linears"] == 4 * (4 + 3 * 128)
    assert found["coverage"]["share"] > 0.99
    dense = plan(outline(tmp_path / "all", {**MIXTURE, "num_experts_per_tok": 128}), scheme="int4-g128")
    assert dense["seconds"]["evaluation"] > 2 * found["seconds"]["evaluation"]
    assert dense["bytes"] == found["bytes"]


def test_what_quantize_refuses_is_refused(untimed, tmp_path: Path) -> None:
    path = outline(
        tmp_path / "model", {**LLAMA, "hidden_size": 96, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 4}
    )
    with pytest.raises(SchemeError, match="group size 128 does not divide the width 96"):
        plan(path, scheme="int4-g128")
    with pytest.raises(ModelError, match="no model at"):
        plan(tmp_path / "nowhere")


def test_a_number_of_sequences_that_text_will_decide(untimed, model) -> None:
    found = plan(model("llama"), scheme="int4-g32", sequences="auto")
    assert found["seconds"] == plan(model("llama"), scheme="int4-g32")["seconds"]
    assert any("--sequences auto" in warning for warning in found["warnings"])


def test_the_best_effort_that_fits(untimed, tmp_path: Path) -> None:
    path = outline(tmp_path / "model", LLAMA)
    fits = plan(path, memory="4000G", limit=1e9)["fits"]
    assert fits["best"] == "best"
    spent = [fits["efforts"][effort]["seconds"] for effort in ("quick", "normal", "best")]
    assert spent == sorted(spent)
    assert plan(path, memory="4000G", limit=(spent[0] + spent[1]) / 2)["fits"]["best"] == "quick"
    assert plan(path, memory="4000G", limit=1)["fits"]["best"] is None
    assert plan(path, memory="250G", limit=1e9)["fits"]["best"] == "normal"  # tuning needs the whole model


def test_seconds_grow_with_text_and_weights() -> None:
    units = Units(
        gradients=1e9,
        forward=1e8,
        moments=1e9,
        widths=1e5,
        products=1e12,
        cubes=1e10,
        squares=1e8,
        head=1e7,
        weights=10**8,
    )

    def of(**settings: Any) -> dict[str, float]:
        return seconds(Recipe.of(curvature="pilot", calibration="stdlib", **settings), units, RATES, item=4)

    few, many = of(sequences=64, prefix_sequences=64), of(sequences=128, prefix_sequences=128)
    assert many["curvature"] == pytest.approx(2 * few["curvature"], rel=1e-3)
    assert few["rounding"] < many["rounding"] < 2 * few["rounding"]
    assert of(sweeps=0)["rounding"] < of(sweeps=4)["rounding"]
    assert few["text"] == 0 < seconds(Recipe.of(calibration="self"), units, RATES, item=4)["text"]
    assert of(tune="end-to-end")["tuning"] > 0


def test_a_layer_is_timed(model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "MORE_VOCABULARY", 2048)
    found = plan(model(), scheme="int4-g32", curvature="pilot", sequences=8, seq_len=16)
    assert found["timed"].startswith("model.layers.0 of ")
    assert all(spent >= 0 for spent in found["seconds"].values())
    assert 0 < found["total_seconds"] < 600


def test_one_that_cannot_be_alone_is_taken_for_a_llamas(model, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def refuses(_settings: Any, layer: str, what: str, *_others: Any) -> Timing:
        seen.append(what)
        if len(seen) == 1:
            raise RuntimeError(layer)
        return RATES

    monkeypatch.setattr(timing, "_timed", refuses)
    assert plan(model(), scheme="int4-g32")["timed"] == "nothing"
    assert seen[1] == "a Llama's layer 384 wide, in the place of a larger one"


def test_on_the_command_line(command, model, untimed, tmp_path: Path) -> None:
    outcome = command("plan", model(), "--scheme", "int4-g32", "--time", "2h", "--json", tmp_path / "plan.json")
    assert outcome.code == 0
    assert "--effort best" in outcome.out
    assert "int4-g32 as compressed-tensors" in outcome.out
    assert json.loads((tmp_path / "plan.json").read_text())["fits"]["limit_seconds"] == 7200
    alone = command("plan", model(), "--scheme", "int4-g32", "--quiet", "--json", "-")
    assert json.loads(alone.out)["scheme"] == "int4-g32"
    assert "fits" not in json.loads(alone.out)
    wrong = command("plan", model(), "--time", "soon")
    assert wrong.code == 2
    assert "expected a duration such as 45m or 2h" in wrong.err


@pytest.mark.parametrize(("text", "expected"), [("90", 90), ("90s", 90), ("45m", 2700), ("1.5H", 5400), ("1d", 86400)])
def test_durations(text: str, expected: float) -> None:
    assert duration(text) == expected


@pytest.mark.parametrize("text", ["", "0", "-3m", "2 weeks", "h"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(SchemeError, match="expected a duration"):
        duration(text)
