"""Settings are checked when a recipe is made."""

import json
import math
from typing import Any

import pytest

from roundel.errors import SchemeError
from roundel.recipes import BEST, ENOUGH_TOKENS, GPTQ, NEAREST, Recipe


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


def test_rounding_is_error_aware_where_it_pays() -> None:
    """By default with enough text, unless something better follows or rules it out; what is said counts."""
    assert Recipe().corrects(ENOUGH_TOKENS)
    assert not Recipe().corrects(ENOUGH_TOKENS - 1)
    assert not Recipe(tune="blocks").corrects(ENOUGH_TOKENS)
    assert not Recipe(bits=3.5).corrects(ENOUGH_TOKENS)
    assert not Recipe(**GPTQ).corrects(ENOUGH_TOKENS)
    assert not Recipe(**NEAREST).corrects(ENOUGH_TOKENS)
    assert Recipe(tune="end-to-end", error_aware=True).corrects(1)
    assert not Recipe(error_aware=False).corrects(ENOUGH_TOKENS)
