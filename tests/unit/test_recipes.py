"""Settings are checked when a recipe is made."""

import json
import math
from typing import Any

import pytest

from roundel.errors import SchemeError
from roundel.recipes import BEST, ENOUGH_TOKENS, GPTQ, NEAREST, PREFIX_SEQUENCES, STEPPED_WEIGHTS, Recipe
from roundel.settings import EFFORTS


@pytest.mark.parametrize(
    "settings",
    [
        {"scheme": "int4"},
        {"scheme": "int9-g128"},
        {"curvature": "hessian"},
        {"curvature": "sketch-a:rounds=0"},
        {"sequences": 0},
        {"seq_len": 1},
        {"eval_sequences": 0},
        {"sweeps": -1},
        {"seed": -1},
        {"factor_type": "float16"},
        {"damping": 0},
        {"damping": -0.1},
        {"damping": 11.0},
        {"damping": math.nan},
        {"damping": math.inf},
    ],
    ids=str,
)
def test_invalid_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(SchemeError):
        Recipe(**settings)


@pytest.mark.parametrize(
    "settings", [{"sweeps": 0}, {"sequences": 1, "seq_len": 2, "eval_sequences": 1}, {"damping": 10}, {"seed": 2**31}], ids=str
)
def test_the_limits_themselves_are_allowed(settings: dict[str, Any]) -> None:
    Recipe(**settings)


@pytest.mark.parametrize("named", [NEAREST, GPTQ, BEST])
def test_named_recipes_are_valid(named: dict[str, Any]) -> None:
    Recipe(**named)


def test_a_recipe_is_json_and_back() -> None:
    recipe = Recipe(scheme="int3-g64", include=("*.mlp.*",), damping=0.2)
    stored = json.loads(json.dumps(recipe.as_json()))
    assert Recipe(**{k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}) == recipe


def test_rounding_is_prefix_aware_where_there_is_text_for_it() -> None:
    """By default; what is said counts."""
    for recipe in (Recipe(), Recipe(tune="blocks"), Recipe(bits=3.5)):
        assert recipe.corrects(ENOUGH_TOKENS)
        assert not recipe.corrects(ENOUGH_TOKENS - 1)
    assert not Recipe(**GPTQ).corrects(ENOUGH_TOKENS)
    assert not Recipe(**NEAREST).corrects(ENOUGH_TOKENS)
    assert Recipe(prefix_aware=True).corrects(1)
    assert not Recipe(prefix_aware=False).corrects(ENOUGH_TOKENS)
    assert Recipe(prefix_sequences=8).prefix_count == 8
    assert Recipe(sequences=5).prefix_count == PREFIX_SEQUENCES
    assert Recipe(sequences=PREFIX_SEQUENCES + 5).prefix_count == PREFIX_SEQUENCES + 5


@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [
        ("prefix_sequences", 0, "1 or more"),
        ("prefix_damping", 0.0, "more than 0"),
        ("prefix_strength", 1.1, "0 to 1"),
        ("stream_strength", -0.1, "0 to 1"),
    ],
)
def test_corrections_out_of_their_range_are_refused(setting: str, value: float, expected: str) -> None:
    with pytest.raises(SchemeError, match=f"{setting} is {value}: expected {expected}"):
        Recipe(**{setting: value})


def test_an_effort_is_what_it_sets_and_what_is_given_comes_first() -> None:
    assert Recipe.of() == Recipe()
    quick = Recipe.of(effort="quick", sweeps=3)
    assert (quick.effort, quick.curvature, quick.sweeps) == ("quick", "pilot", 3)
    with pytest.raises(SchemeError, match="effort 'slow': expected one of quick, normal, best"):
        Recipe.of(effort="slow")


@pytest.mark.parametrize("effort", EFFORTS)
def test_an_effort_sets_nothing_else_and_never_what_is_given(effort: str) -> None:
    """Also where what is given is the recipe's own default."""
    assert Recipe.of(effort=effort).as_json() == {**Recipe().as_json(), "effort": effort, **EFFORTS[effort]}
    for name in EFFORTS[effort]:
        default = getattr(Recipe(), name)
        assert getattr(Recipe.of(effort=effort, **{name: default}), name) == default
    assert Recipe.of(effort=effort, **GPTQ).curvature == "activation"


def test_natural_steps_are_for_small_models_unless_asked_for() -> None:
    assert Recipe().natural_steps(64, 512, weights=STEPPED_WEIGHTS) == (2, 10)
    assert Recipe().natural_steps(64, 512, weights=STEPPED_WEIGHTS + 1) == (0, 0)
    assert Recipe(natural_places=2).natural_steps(64, 512, weights=STEPPED_WEIGHTS + 1) == (2, 10)
    assert Recipe(natural_places=0).natural_steps(64, 512, weights=1) == (0, 0)
