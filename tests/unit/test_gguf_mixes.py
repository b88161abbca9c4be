"""Which tensor gets which type in llama.cpp's mixes, as seen in files of its own tool."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest

from roundel.errors import SchemeError
from roundel.formats.gguf_blocks import PACKERS
from roundel.formats.gguf_mixes import CANDIDATES, MIXES, NARROW, mix_types
from roundel.grids import parse_scheme
from roundel.recipes import Recipe, with_block_type

PARTS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def types(mix: str, layers: int, *, grouped: int = 2, experts: int = 0) -> dict[str, list[str]]:
    """Of each part, by layer."""
    config = SimpleNamespace(
        model_type="qwen3", num_hidden_layers=layers, num_attention_heads=8 * grouped, num_key_value_heads=8, num_experts=experts
    )
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


def test_mixes_of_codebook_types() -> None:
    assert types("iq2_xs", 16)["ffn_down"] == ["q2_k"] * 2 + ["iq2_xs"] * 14
    assert set(types("iq2_xs", 16)["attn_v"]) == {"q2_k"}
    assert set(types("iq2_xs", 16, grouped=4)["attn_v"]) == set(types("iq2_xs", 16, experts=4)["attn_v"]) == {"q4_k"}
    assert set(types("iq2_s", 8)["attn_q"]) == {"iq2_xs"}
    assert set(types("iq2_s", 8)["attn_output"]) == {"iq3_s"}
    assert set(types("iq2_xxs", 8, experts=8)["attn_k"]) == {"q4_k"}
    assert set(types("iq2_m", 80)["attn_v"]) == {"iq3_s"}
    assert {part: own[0] for part, own in types("iq3_xxs", 8).items()} == {
        "attn_q": "iq2_s",
        "attn_k": "iq2_s",
        "attn_v": "iq3_xxs",
        "attn_output": "iq3_s",
        "ffn_gate": "iq3_xxs",
        "ffn_up": "iq3_xxs",
        "ffn_down": "iq3_xxs",
    }
    assert types("iq3_xs", 16)["ffn_up"] == ["iq3_s"] * 2 + ["iq3_xxs"] * 12 + ["iq3_s"] * 2
    assert types("iq3_m", 16)["ffn_down"] == ["q4_k"] * 2 + ["iq3_s"] * 14
    assert Counter(types("iq3_m", 16, experts=8)["ffn_down"]) == {"q4_k": 8, "iq3_s": 8}
    assert (MIXES["iq2_s"].embedding, MIXES["iq2_s"].head) == ("iq3_s", "q5_k")


@pytest.mark.parametrize("mix", MIXES)
def test_all_types_are_written_and_have_one_for_narrow_matrices(mix: str) -> None:
    used = {kind for experts in (0, 8) for own in types(mix, 16, experts=experts).values() for kind in own}
    used |= {MIXES[mix].embedding, MIXES[mix].head}
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


def test_embedding_and_head() -> None:
    mix = Recipe.of(**with_block_type({"mix": "iq2_m"}))
    assert (mix.scheme, mix.usual_ends("embedding", 64, 512), mix.usual_ends("head", 64, 512)) == ("iq2_s", ("iq3_s",), ("q5_k",))
    assert (mix.usual_ends("embedding", 64, 576), mix.usual_ends("head", 64, 576)) == (("iq4_nl",), ("q8_0",))
    several = Recipe.of(scheme="q4_k", format="gguf", target_size="1G")
    assert set(several.usual_ends("head", 64, 512)) == set(CANDIDATES)
    assert set(several.usual_ends("embedding", 64, 576)) == {"q4_0", "iq4_nl", "q5_0", "q8_0"}
    given = Recipe.of(scheme="q4_k", schemes=("iq2_xs", "q4_k"), format="gguf", target_size="1G")
    assert set(given.usual_ends("embedding", 64, 512)) == {"q2_k", "q5_k", "q4_k", "q6_k"}
    assert Recipe.of(scheme="q4_k", schemes=("q3_k", "q4_k"), format="gguf", bits=3.5).usual_ends("embedding", 64, 512) == ("q3_k",)
    assert Recipe.of(scheme="int4-g64", format="mlx", bits=3.5).usual_ends("head", 64, 512) == ("int4-g64",)
    assert Recipe.of(scheme="int4-g64").usual_ends("head", 64, 512) == ()
