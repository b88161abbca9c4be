"""Which tensor gets which type in llama.cpp's mixes, as seen in files of its own tool."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest

from roundel.errors import SchemeError
from roundel.formats.gguf_blocks import PACKERS
from roundel.formats.gguf_mixes import MIXES, NARROW, mix_types
from roundel.grids import parse_scheme
from roundel.recipes import Recipe, with_block_type

PARTS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def types(mix: str, layers: int, *, grouped: int = 2, experts: int = 0) -> dict[str, list[str]]:
    """Of each part, by layer."""
    config = SimpleNamespace(num_hidden_layers=layers, num_attention_heads=8 * grouped, num_key_value_heads=8, num_experts=experts)
    tail = {part: "_exps" * (experts > 0 and part.startswith("ffn")) for part in PARTS}
    names = {f"{layer} {part}": f"blk.{layer}.{part}{tail[part]}.weight" for layer in range(layers) for part in PARTS}
    found = mix_types(mix, names, config)
    return {part: [found[f"{layer} {part}"] for layer in range(layers)] for part in PARTS}


def test_q4_k_m_of_32_layers() -> None:
    found = types("q4_k_m", 32)
    raised = [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    for part in ("attn_v", "ffn_down"):
        assert [layer for layer, kind in enumerate(found[part]) if kind == "q6_k"] == raised
        assert set(found[part]) == {"q4_k", "q6_k"}
    assert all(set(found[part]) == {"q4_k"} for part in PARTS if part not in ("attn_v", "ffn_down"))


def test_the_others_where_they_differ() -> None:
    assert Counter(types("q3_k_m", 32)["ffn_down"]) == {"q5_k": 2, "q4_k": 30}
    assert types("q3_k_m", 8)["attn_v"] == ["q5_k"] * 2 + ["q4_k"] * 6
    assert types("q4_k_s", 8)["attn_v"] == ["q5_k"] * 4 + ["q4_k"] * 4
    assert set(types("q2_k", 8)["attn_v"]) == {"q3_k"}
    assert set(types("q2_k", 8, grouped=4)["attn_v"]) == {"q4_k"}
    assert set(types("q2_k", 8)["attn_output"]) == set(types("q2_k", 8)["ffn_down"]) == {"q3_k"}
    assert types("q2_k_s", 8)["ffn_down"] == ["q4_k"] + ["q2_k"] * 7
    assert set(types("iq4_xs", 8, grouped=4)["attn_v"]) == {"q5_k"}
    assert set(types("q4_k_m", 8, experts=8)["attn_k"]) == {"q8_0"}
    assert set(types("q4_k_m", 8, experts=8)["attn_output"]) == {"q5_k"}
    assert set(types("q3_k_s", 80)["attn_v"]) == {"q5_k"}


@pytest.mark.parametrize("mix", MIXES)
def test_all_types_are_written_and_have_one_for_narrow_matrices(mix: str) -> None:
    used = {kind for experts in (0, 8) for own in types(mix, 16, experts=experts).values() for kind in own} | {MIXES[mix].head}
    assert used <= set(PACKERS)
    for kind in used:
        parse_scheme(NARROW.get(kind, kind)).check(4, 32)


def test_recipes() -> None:
    for given in ({"format": "gguf:q4_k_m"}, {"mix": "q4_k_m"}, {"mix": "q4_k_m", "format": "gguf"}):
        recipe = Recipe.of(**with_block_type(given))
        assert (recipe.mix, recipe.scheme, recipe.written_format()) == ("q4_k_m", "q4_k", "gguf")
    assert Recipe.of(**with_block_type({"format": "gguf:q4_k"})).mix is None
    with pytest.raises(SchemeError, match="goes with --format gguf"):
        Recipe.of(**with_block_type({"mix": "q4_k_m", "bits": 4.0, "schemes": ("q3_k", "q4_k")}))
    with pytest.raises(SchemeError, match="expected one of q2_k"):
        Recipe.of(mix="q9_k")
    recipe = Recipe.of(scheme="q4_k")
    assert [recipe.fitting("q4_k", width) for width in (512, 576, 40)] == ["q4_k", "q5_0", "q4_k"]
    assert Recipe.of(scheme="q4_k", format="native").fitting("q4_k", 576) == "q4_k"
