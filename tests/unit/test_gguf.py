"""What can be written as GGUF and what is refused: grids, architectures, tokenizers; and where rows of q and k go."""

from __future__ import annotations

import json
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers import normalizers as norms
from transformers import GemmaConfig, GraniteMoeHybridConfig, Qwen3_5TextConfig

from laws.problems import draw
from llama.files import LLAMA3, QWEN, SPLITS, WORDS, spaced_tokenizer, split, split_tokenizer
from roundel.errors import ModelError, SchemeError
from roundel.formats.gguf import check, mixed
from roundel.formats.gguf_blocks import PACKERS, unpack
from roundel.formats.gguf_settings import language_config
from roundel.formats.gguf_tensors import _pairs_side_by_side, names_of, parts_of, unbroken
from roundel.formats.gguf_tokenizer import vocabulary_of
from roundel.grids import parse_scheme
from roundel.rounding import nearest


@pytest.mark.parametrize("name", PACKERS)
def test_block_types_are_what_a_file_holds(name: str) -> None:
    check(parse_scheme(name), None)
    with pytest.raises(SchemeError, match=f"rotated by hadamard: llama.cpp undoes no rotation; try {name} without one"):
        check(parse_scheme(name), "hadamard")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("int4-g128", "q4_k"),
        ("int2-g64", "q2_k"),
        ("int3-channel", "q3_k"),
        ("int8-g32", "q8_0"),
        ("lattice2", "q2_k"),
        ("trellis3", "q3_k"),
    ],
)
def test_other_grids_are_refused_with_the_nearest_block_type(name: str, nearest: str) -> None:
    with pytest.raises(SchemeError, match=f"{name}.*try {nearest}"):
        check(parse_scheme(name), None)


GEMMA2: dict[str, Any] = {"model_type": "gemma2", "num_hidden_layers": 4}
GRANITE4 = {"model_type": "granitemoehybrid", "num_hidden_layers": 8}
QWEN_VL = {
    "model_type": "qwen2_5_vl",
    "hidden_size": 512,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    "vision_config": {},
}
GEMMA3: dict[str, Any] = {"model_type": "gemma3_text", "num_hidden_layers": 8}


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama"},
        {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
        {"model_type": "llama", "rope_scaling": LLAMA3},
        {"model_type": "mistral", "sliding_window": 4096},
        {"model_type": "qwen2", "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
        {"model_type": "qwen3"},
        {"model_type": "gemma", "hidden_act": "gelu"},
        GEMMA2,
        {**GEMMA2, "num_hidden_layers": 46, "hidden_size": 4608, "num_attention_heads": 32, "head_dim": 128, "query_pre_attn_scalar": 144},
        GEMMA3,
        {"model_type": "gemma3", "text_config": GEMMA3, "vision_config": {}},
        QWEN_VL,
        {"model_type": "nemotron_h", "hybrid_override_pattern": "M-M*-", "time_step_limit": [0.0, {"__float__": "Infinity"}]},
        {**GEMMA3, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ],
    ids=lambda config: "-".join(map(str, config.values()))[:40],
)
def test_supported_architectures(config: dict[str, Any]) -> None:
    if config.get("hidden_act") == "gelu" and GemmaConfig(hidden_act="gelu").hidden_act == "gelu":
        pytest.skip("this Transformers does not read Gemma's gelu as its approximation by tanh, so the model is refused")
    before = json.dumps(config)
    language_config(config)
    assert json.dumps(config) == before


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "opt"}, "writes llama, mistral, qwen2, qwen2_moe, qwen3, qwen3_moe, mixtral, gemma, gemma2, gemma3_text"),
        ({"model_type": "mamba"}, "model type 'mamba'"),
        ({"model_type": "llava", "text_config": {"model_type": "llama"}}, "model type 'llava'"),
        ({}, "model type 'None'"),
        ({"model_type": "llama", "hidden_size": "wide"}, "cannot be read"),
        ({"model_type": "llama", "hidden_act": "gelu"}, "its activation is gelu, and llama.cpp has silu"),
        ({"model_type": "qwen3", "attention_bias": True}, "biases"),
        ({"model_type": "qwen2", "rope_scaling": LLAMA3}, "its rotary embedding is llama3"),
        ({"model_type": "llama", "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "its rotary embedding is dynamic"),
        (
            {"model_type": "qwen2", "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "beta_fast": 32}},
            "its rotary embedding has mscale 0.7; w",
        ),
        ({**GEMMA2, "query_pre_attn_scalar": 100}, "query_pre_attn_scalar is 100, and llama.cpp has 256"),
        ({**GEMMA2, "layer_types": ["full_attention"] * 4}, "full attention is not in every layer of 2"),
        ({**GEMMA3, "final_logit_softcapping": 30.0}, "its logits are capped"),
        ({**GEMMA3, "use_bidirectional_attention": True}, "looks ahead"),
        ({"model_type": "cohere", "use_qk_norm": True}, "its use_qk_norm is True, and llama.cpp has False"),
        ({"model_type": "starcoder2", "use_bias": False}, "its use_bias is False, and llama.cpp has True"),
        ({"model_type": "granite", "attention_bias": True}, "biases"),
        ({"model_type": "smollm3", "num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0]}, "not every 4th"),
        ({"model_type": "exaone4", "num_hidden_layers": 8, "sliding_window": 16}, "for those of 64 layers"),
        ({"model_type": "deepseek_v2", "num_hidden_layers": 4, "q_lora_rank": None, "num_experts_per_tok": 2}, "a model of 27 layers"),
        ({"model_type": "deepseek_v2", "num_hidden_layers": 4, "topk_method": "group_limited_greedy"}, "llama.cpp has greedy"),
        ({"model_type": "afmoe", "mup_enabled": False}, "its mup_enabled is False"),
        ({"model_type": "afmoe", "mup_enabled": True, "sliding_window": None}, "it has no sliding window"),
        ({"model_type": "hunyuan_v1_moe", "num_experts": 4, "moe_topk": [2] * 32}, "its moe_topk is not the same for all layers"),
        (
            {"model_type": "glm4_moe_lite", "mlp_layer_types": ["dense", "sparse", "dense"] + ["sparse"] * 44},
            "layers without experts follow",
        ),
        ({"model_type": "phi3", "rope_scaling": LLAMA3}, "rope"),
        ({"model_type": "olmoe", "num_key_value_heads": 4}, "fewer heads of keys than of queries"),
        ({"model_type": "olmo2", "head_dim": 64}, "its heads are 2048 wide together, and llama.cpp has 4096"),
        ({"model_type": "olmo3", "num_hidden_layers": 4, "layer_types": ["full_attention"] * 4}, "not in every layer of 4"),
        ({"model_type": "gemma3", "text_config": {**GEMMA3, "attention_bias": True}}, "biases"),
        ({"model_type": "nemotron_h", "hybrid_override_pattern": "ME*-"}, "have experts, and others have none"),
        ({"model_type": "granitemoehybrid", "time_step_limit": [0.0, 1.0]}, "its time_step_limit is .*0.0, 1.0"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_architectures_that_are_refused(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        language_config(config)


def test_settings_of_text_beside_those_of_pictures() -> None:
    """As Qwen2.5-VL's first checkpoints have them, and by whose side ties are told."""
    found = language_config(QWEN_VL)
    assert (found.model_type, found.hidden_size, found.rope_parameters["mrope_section"]) == ("qwen2_5_vl_text", 512, [2, 3, 3])
    assert not found.tie_word_embeddings
    assert language_config({**QWEN_VL, "tie_word_embeddings": True}).tie_word_embeddings


def test_shared_experts_alone_are_a_usual_block() -> None:
    """Of a linear that is two tensors both have its type."""
    linears = [f"model.layers.{k}.shared_mlp.{part}_linear" for k in range(8) for part in ("input", "output")]
    mixtures = [mixed("q4_k_m", {**GRANITE4, "num_local_experts": count}, linears) for count in (0, 4)]
    assert mixtures[0]["model.layers.7.shared_mlp.output_linear"] == "q6_k"
    assert mixtures[0]["model.layers.7.shared_mlp.input_linear"] == "q4_k"
    names = [f"model.layers.0.shared_mlp.input_linear.{part}_proj" for part in ("gate", "up")]
    assert parts_of(f"{linears[0]}.weight") == [f"{name}.weight" for name in names]
    for count, tail in ((0, ""), (4, "_shexp")):
        config = GraniteMoeHybridConfig(num_local_experts=count)
        assert list(names_of(config, names).values()) == [f"blk.0.ffn_{part}{tail}.weight" for part in ("gate", "up")]


def test_columns_that_move_stay_together_by_heads() -> None:
    """By Transformers' own reading: config.json may leave out what is as usual."""
    moved, alike = Qwen3_5TextConfig(), Qwen3_5TextConfig(linear_num_value_heads=16)
    assert unbroken(moved, "model.layers.0.linear_attn.out_proj", 4096) == 128
    assert unbroken(moved, "model.layers.0.mlp.down_proj", 4096) == 4096
    assert unbroken(alike, "model.layers.0.linear_attn.out_proj", 2048) == 2048


@pytest.mark.parametrize(("heads", "head_dim"), [(1, 2), (3, 8), (2, 64)])
def test_rotary_pairs_become_neighbours(heads: int, head_dim: int) -> None:
    order = _pairs_side_by_side(heads * head_dim, heads)
    for head in range(heads):
        for pair in range(head_dim // 2):
            for side in range(2):
                assert order[head * head_dim + 2 * pair + side] == head * head_dim + pair + side * head_dim // 2


@pytest.mark.parametrize("name", PACKERS)
def test_any_bytes_of_a_block_type_are_read(name: str) -> None:
    """Also those that this package would not write: scales of zero, codes that it leaves out."""
    columns, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name.upper()]]
    rows = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (6, 4 * size), dtype=np.uint8))
    codes, scales = unpack(name, rows)
    with np.errstate(all="ignore"):
        theirs = torch.from_numpy(gguf.dequantize(rows.numpy(), gguf.GGMLQuantizationType[name.upper()]))
    ours = parse_scheme(name).dequantize(codes, scales, (6, 4 * columns), torch.float32)
    finite = torch.isfinite(theirs)  # a random float16 may be none
    assert finite.any()
    assert torch.equal(ours[finite], theirs[finite])
    if name != "mxfp4":  # which has two zeros
        assert torch.equal(PACKERS[name](codes, scales), rows)


@pytest.mark.parametrize("name", PACKERS)
def test_packed_rows_can_be_moved(name: str) -> None:
    """A row's bytes do not depend on other rows."""
    grid, W = parse_scheme(name), draw(6, 256, seed=1, dtype=torch.float32)
    scales = grid.fit_scales(W, torch.ones(256), torch.float16)
    codes = nearest(W, grid, scales)
    order = _pairs_side_by_side(6, 1)
    moved = PACKERS[name](codes[order], {key: each[order] for key, each in scales.items()})
    assert torch.equal(PACKERS[name](codes, scales)[order], moved)


@pytest.mark.parametrize("name", SPLITS)
def test_ways_to_split_text_have_names(name: str) -> None:
    pre_tokenizer, settings = SPLITS[name]
    text = split_tokenizer(pre_tokenizer, **settings).backend_tokenizer.to_str()
    assert vocabulary_of(text, None).pre == name


@pytest.mark.parametrize("name", SPLITS)
def test_words_that_no_merges_lead_to_must_be_treated_alike(name: str) -> None:
    """With `ignore_merges` the other way round nothing changes, as all tokens come of merges; and then there is one that does not."""
    pre_tokenizer, settings = SPLITS[name]
    made = json.loads(split_tokenizer(pre_tokenizer, **settings).backend_tokenizer.to_str())
    made["model"]["ignore_merges"] = not made["model"]["ignore_merges"]
    assert vocabulary_of(json.dumps(made), None).pre == name
    made["model"]["vocab"]["zzzz"] = 600
    with pytest.raises(ModelError, match=f"llama.cpp's {name} differ in how they treat 'zzzz'"):
        vocabulary_of(json.dumps(made), None)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"pre_tokenizer": pre_tokenizers.Whitespace()}, "splits text by .*Whitespace"),
        ({"pre_tokenizer": split(QWEN.replace(r"\p{N}", r"\d"))}, "splits text by"),
        ({"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)}, "splits text by"),
        ({"normalizer": norms.Lowercase()}, "normalizes text by Lowercase"),
        ({"normalizer": norms.Sequence([norms.NFC(), norms.Strip()])}, "normalizes text by Strip"),
        ({"model": models.WordPiece({"a": 0}, unk_token="a")}, "a WordPiece one"),
        ({"model": models.Unigram([("a", 0.0)])}, "a Unigram one"),
    ],
    ids=str,
)
def test_tokenizers_that_are_refused(change: dict[str, Any], reason: str) -> None:
    backend = Tokenizer.from_str(split_tokenizer(WORDS).backend_tokenizer.to_str())
    for name, value in change.items():
        setattr(backend, name, value)
    with pytest.raises(ModelError, match=reason):
        vocabulary_of(backend.to_str(), None)


def test_normal_forms_are_accepted() -> None:
    backend = split_tokenizer(WORDS).backend_tokenizer
    backend.normalizer = norms.NFC()
    assert vocabulary_of(backend.to_str(), None).kind == "gpt2"


def test_a_byte_fallback_tokenizer_without_all_merges_is_refused() -> None:
    made = json.loads(spaced_tokenizer().backend_tokenizer.to_str())
    left, right = made["model"]["merges"].pop()
    with pytest.raises(ModelError, match=f"never makes '{left + right}' of '{left}' and '{right}'"):
        vocabulary_of(json.dumps(made), None)


def test_added_tokens_are_of_their_own_types() -> None:
    tokenizer = split_tokenizer(WORDS)
    tokenizer.add_tokens(["<think>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    found = vocabulary_of(tokenizer.backend_tokenizer.to_str(), len(tokenizer) + 2)
    assert list(zip(found.tokens, found.types, strict=True))[-4:] == [
        ("<think>", 4),
        ("<|im_end|>", 3),
        (f"[PAD{len(tokenizer)}]", 5),
        (f"[PAD{len(tokenizer) + 1}]", 5),
    ]
