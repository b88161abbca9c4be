"""GGUF files of tiny models and of the embedded one, rounded to the nearest, with the dense model that such a file stands for."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerFast

from e2e import tiny
from roundel.formats import gguf
from roundel.grids import parse_scheme
from roundel.models.checkpoint import Checkpoint
from roundel.models.experts import split_experts
from roundel.models.load import auto_class
from roundel.rounding import nearest as nearest_codes
from roundel.types import RoundedWeight

ROWS = 401
"""Of the embedding: more than there are tokens."""
SIZES: dict[str, Any] = {**tiny.GROUPED, "vocab_size": ROWS, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
GEMMA = {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 16}
LONG: dict[str, Any] = {
    "max_position_embeddings": 512,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.75,
        "short_factor": [1.0 + 0.01 * k for k in range(24)],
        "long_factor": [1.5 + 0.1 * k for k in range(24)],
    },
}
BOTH = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"head_dim": 64}),
    "llama-tied": ("LlamaConfig", {"head_dim": 64, "tie_word_embeddings": True}),
    "llama-biased": ("LlamaConfig", {"head_dim": 64, "attention_bias": True, "mlp_bias": True}),
    "llama-linear": ("LlamaConfig", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "llama-3": ("LlamaConfig", {"head_dim": 64, "rope_parameters": {**LLAMA3, "rope_theta": 1e4}}),
    "mistral": ("MistralConfig", {"head_dim": 32, "sliding_window": 48}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2-yarn": ("Qwen2Config", {"rope_parameters": {**YARN, "rope_theta": 1e4}}),
    "qwen3": ("Qwen3Config", {"head_dim": 32, "tie_word_embeddings": False}),
    "gemma": ("GemmaConfig", {"head_dim": 64}),
    "gemma2": ("Gemma2Config", {**GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 8.0}),
    "gemma3": ("Gemma3TextConfig", {**GEMMA, "num_hidden_layers": 7, "rope_parameters": BOTH}),
}
"""Configurations by name: kv heads are fewer than heads, and everything that metadata can say is said at least once."""

EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "first_k_dense_replace": 1, "n_shared_experts": 1}
LINEAR = {
    "num_hidden_layers": 4,
    "head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}
OSS = {**YARN, "rope_theta": 1e4, "truncate": True}
LATENT = {"kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 64, "num_key_value_heads": 4}
GEMMA4: dict[str, Any] = {
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "head_dim": 32,
    "global_head_dim": 64,
    "sliding_window": 16,
    "vocab_size_per_layer_input": ROWS,
    "hidden_size_per_layer_input": 32,
}
STATES = {"num_hidden_layers": 4, "head_dim": 64, "mamba_num_heads": 8, "mamba_head_dim": 32, "ssm_state_size": 64, "n_groups": 2}
LLAMA4: dict[str, Any] = {"num_hidden_layers": 5, "head_dim": 64, "intermediate_size": 32, "intermediate_size_mlp": 128}
GRANITE_STATES: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "mamba_n_heads": 8,
    "mamba_d_state": 64,
    "mamba_n_groups": 2,
    "shared_intermediate_size": 96,
    "embedding_multiplier": 6.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.1,
    "logits_scaling": 3.0,
}
SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5]}
VISION = {"depth": 1, "hidden_size": 32, "embed_dim": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 256}
VISION3 = VISION | {"deepstack_visual_indexes": [0]}


def seeing(vision: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """Settings of a model with pictures around one of text."""
    return {"text_config": {**SIZES, **settings}, "vision_config": vision}


OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "afmoe": (
        "AfmoeConfig",
        {
            "num_hidden_layers": 5,
            "head_dim": 64,
            "sliding_window": 16,
            "mup_enabled": True,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "num_shared_experts": 1,
            "route_scale": 2.5,
        },
    ),
    "arcee": ("ArceeConfig", {"head_dim": 64}),
    "cohere": ("CohereConfig", {"logit_scale": 0.25}),
    "cohere2": ("Cohere2Config", {"num_hidden_layers": 5, "sliding_window": 16, "logit_scale": 0.25}),
    "deepseek-2": ("DeepseekV2Config", {**EXPERTS, **LATENT, "q_lora_rank": 64, "routed_scaling_factor": 0.5}),
    "deepseek-2-lite": ("DeepseekV2Config", {**EXPERTS, **LATENT, "q_lora_rank": None, "num_hidden_layers": 27, "intermediate_size": 64}),
    "deepseek-3": ("DeepseekV3Config", {**EXPERTS, **LATENT, "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "q_lora_rank": 64}),
    "deepseek-3-yarn": (
        "DeepseekV3Config",
        {
            **EXPERTS,
            **LATENT,
            "n_group": 1,
            "topk_group": 1,
            "q_lora_rank": 64,
            "rope_parameters": {**YARN, "rope_theta": 1e4, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
    "dots": ("Dots1Config", {**EXPERTS, "routed_scaling_factor": 2.5, "num_key_value_heads": 4}),
    "ernie": ("Ernie4_5Config", {"head_dim": 32}),
    "ernie-moe": (
        "Ernie4_5_MoeConfig",
        {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 64, "moe_layer_end_index": 1, "moe_num_shared_experts": 2},
    ),
    "exaone4": (
        "Exaone4Config",
        {"sliding_window": None, "layer_types": ["full_attention"] * 2, "rope_parameters": {**LLAMA3, "rope_theta": 1e4}},
    ),
    "exaone4-windows": (
        "Exaone4Config",
        {"num_hidden_layers": 64, "intermediate_size": 64, "sliding_window": 16, "rope_parameters": {**LLAMA3, "rope_theta": 1e4}},
    ),
    "exaone-moe": (
        "ExaoneMoeConfig",
        {
            "num_hidden_layers": 5,
            "sliding_window": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "num_shared_experts": 1,
        },
    ),
    "gemma4": ("Gemma4TextConfig", {**GEMMA4, "hidden_size_per_layer_input": 0, "final_logit_softcapping": 8.0}),
    "gemma4-equal": (
        "Gemma4TextConfig",
        {**GEMMA4, "hidden_size_per_layer_input": 0, "attention_k_eq_v": True, "num_global_key_value_heads": 1},
    ),
    "gemma4-inputs": ("Gemma4TextConfig", {**GEMMA4, "hidden_size_per_layer_input": 32}),
    "gemma4-shared": (
        "Gemma4TextConfig",
        {
            **GEMMA4,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
        },
    ),
    "gemma4-moe": (
        "Gemma4TextConfig",
        {
            **GEMMA4,
            "hidden_size_per_layer_input": 0,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 64,
        },
    ),
    "glm4": ("Glm4Config", {"head_dim": 32}),
    "glm4-moe": ("Glm4MoeConfig", {**EXPERTS, "use_qk_norm": True, "attention_bias": True, "num_hidden_layers": 3}),
    "glm4-moe-lite": ("Glm4MoeLiteConfig", {**EXPERTS, **LATENT, "q_lora_rank": 64, "num_hidden_layers": 3}),
    "gpt-neox": ("GPTNeoXConfig", {"num_key_value_heads": 4}),
    "gpt-oss": (
        "GptOssConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 64, "sliding_window": 16, "rope_parameters": OSS},
    ),
    "granite": (
        "GraniteConfig",
        {"embedding_multiplier": 6.0, "residual_multiplier": 0.5, "attention_multiplier": 0.1, "logits_scaling": 3.0},
    ),
    "granite-hybrid": ("GraniteMoeHybridConfig", {**GRANITE_STATES, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "granite-hybrid-dense": ("GraniteMoeHybridConfig", {**GRANITE_STATES, "num_local_experts": 0, "position_embedding_type": "rope"}),
    "hunyuan": ("HunYuanDenseV1Config", {"head_dim": 64}),
    "hunyuan-moe": ("HunYuanMoEV1Config", {"head_dim": 64, "num_experts": 4, "moe_topk": 2}),
    "jais2": ("Jais2Config", {}),
    "lfm2": ("Lfm2Config", {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "block_multiple_of": 32}),
    "lfm2-moe": (
        "Lfm2MoeConfig",
        {
            "num_hidden_layers": 3,
            "layer_types": ["conv", "full_attention", "conv"],
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "num_dense_layers": 1,
        },
    ),
    "llama4": ("Llama4TextConfig", {**LLAMA4, "use_qk_norm": True, "num_local_experts": 4, "interleave_moe_layer_step": 2}),
    "llama4-128": (
        "Llama4TextConfig",
        {**LLAMA4, "use_qk_norm": False, "num_local_experts": 128, "rope_parameters": {**LLAMA3, "rope_theta": 1e4}},
    ),
    "ministral3": (
        "Ministral3Config",
        {"head_dim": 32, "rope_parameters": {**YARN, "rope_theta": 1e4, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}},
    ),
    "minimax": ("MiniMaxM2Config", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 64}),
    "nemotron": ("NemotronConfig", {}),
    "nemotron-h": ("NemotronHConfig", {**STATES, "layer_types": ["linear_attention", "mlp", "full_attention", "mlp"]}),
    "nemotron-h-moe": (
        "NemotronHConfig",
        {
            **STATES,
            "layer_types": ["linear_attention", "moe", "full_attention", "moe"],
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "moe_shared_expert_intermediate_size": 96,
            "routed_scaling_factor": 2.5,
        },
    ),
    "olmo": ("OlmoConfig", {}),
    "olmo-clipped": ("OlmoConfig", {"clip_qkv": 0.1}),
    "olmo2": ("Olmo2Config", {}),
    "olmo3": ("Olmo3Config", {"num_hidden_layers": 5, "sliding_window": 16}),
    "phi": ("PhiConfig", {}),
    "phi3": ("Phi3Config", {}),
    "phi3-long": ("Phi3Config", {**LONG, "original_max_position_embeddings": 32}),
    "phi3-short": ("Phi3Config", {**LONG, "original_max_position_embeddings": 256}),
    "qwen35": ("Qwen3_5TextConfig", LINEAR),
    "qwen35-alike": ("Qwen3_5TextConfig", {**LINEAR, "linear_num_value_heads": 2, "tie_word_embeddings": True}),
    "qwen35-moe": (
        "Qwen3_5MoeTextConfig",
        {**LINEAR, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 96},
    ),
    # llama.cpp 0.5.0 adds nothing to a variance there
    "qwen2-vl": (
        "Qwen2VLConfig",
        seeing(VISION | {"hidden_size": 256}, rms_norm_eps=1e-8, rope_parameters=SECTIONS | {"mrope_section": [8, 12, 12]}),
    ),
    "qwen25-vl": (
        "Qwen2_5_VLConfig",
        seeing(VISION | {"fullatt_block_indexes": [0]}, rms_norm_eps=1e-8, rope_parameters=SECTIONS | {"mrope_section": [8, 12, 12]}),
    ),
    "qwen3-vl": ("Qwen3VLConfig", seeing(VISION3, head_dim=32, rope_parameters=SECTIONS)),
    "qwen3-vl-moe": (
        "Qwen3VLMoeConfig",
        seeing(VISION3, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, head_dim=32, rope_parameters=SECTIONS),
    ),
    "qwen3-next": (
        "Qwen3NextConfig",
        {**LINEAR, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 96},
    ),
    "seed-oss": ("SeedOssConfig", {"head_dim": 32}),
    "smollm3": ("SmolLM3Config", {"num_hidden_layers": 5}),
    "solar-open": ("SolarOpenConfig", {**EXPERTS, "head_dim": 64}),
    "stablelm": ("StableLmConfig", {}),
    "stablelm-parallel": ("StableLmConfig", {"use_parallel_residual": True, "use_qkv_bias": True}),
    "starcoder2": ("Starcoder2Config", {}),
    "granite-moe-shared": ("GraniteMoeSharedConfig", {"num_local_experts": 4, "shared_intermediate_size": 96}),
    "granite-moe": ("GraniteMoeConfig", {"num_local_experts": 4, "logits_scaling": 3.0, "residual_multiplier": 0.5}),
    "olmoe": ("OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4}),
}
"""Of types of models that Transformers does not read from GGUF, or not all of them."""

DEEP = ("exaone4-windows", "deepseek-2-lite")
"""Of 64 and 27 layers, by whose number llama.cpp knows them; others of these types have two."""

MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2-moe": (
        "Qwen2MoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 96},
    ),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 32, "norm_topk_prob": True},
    ),
}
"""Of experts."""

Scheme = str | Callable[[str, nn.Linear], str | None]


@dataclass(frozen=True, kw_only=True)
class Written:
    """A file and what went into it."""

    path: Path
    model: PreTrainedModel
    """Dense, in float32, with the rounded weights."""
    rounded: dict[str, RoundedWeight]
    decoded: dict[str, Tensor]


def save_model(directory: Path, name: str, **changes: Any) -> Path:
    """A random model with a byte-level tokenizer, or with SentencePiece's for Gemma and Mistral."""
    kind, settings = (MODELS | MIXTURES | OTHERS)[name]
    given = settings | {"text_config": settings["text_config"] | changes} if "text_config" in settings else {**SIZES, **settings, **changes}
    config = getattr(transformers, kind)(**given)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = auto_class(config).from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn(parameter.shape))
            for key, parameter in model.named_parameters():
                if name.startswith("gemma4") and key.endswith("q_norm.weight"):
                    parameter.div_(8)  # attention is not scaled otherwise: of random weights it would look at one token
    model.save_pretrained(directory)
    tokenizer = spaced_tokenizer() if name.startswith(("gemma", "mistral")) else tiny.make_tokenizer(starts=False)
    tokenizer.save_pretrained(directory)
    return directory


def spaced_tokenizer(*, prefix: bool = False) -> PreTrainedTokenizerFast:
    """As Transformers makes of SentencePiece's models: byte tokens, U+2581 for spaces, a merge for every pair that is a token."""
    specials = ["<unk>", "<s>", "</s>"]
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.train_from_iterator([tiny.make_text(4000)], trainers.BpeTrainer(vocab_size=ROWS, show_progress=False))
    learnt = json.loads(trained.to_str())["model"]
    made = list(dict.fromkeys("".join(merge) for merge in learnt["merges"]))
    letters = sorted(token for token in learnt["vocab"] if len(token) == 1)
    byte_tokens = [f"<0x{value:02X}>" for value in range(256)]
    tokens = [*specials, *byte_tokens, *letters, *made][: ROWS - 5]
    known = set(tokens)
    pairs = [(token[:cut], token[cut:]) for token in made if token in known for cut in range(1, len(token))]
    merges = [pair for pair in pairs if known.issuperset(pair)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    core = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", "▁")
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else replace
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    if not prefix:  # as Gemma; Transformers would put the prefix before added tokens too
        tokenizer.add_tokens(["▁▁▁", "\n\n"])
    return tokenizer


def split_tokenizer(pre_tokenizer: pre_tokenizers.PreTokenizer, **settings: Any) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that splits text in this way."""
    core = Tokenizer(models.BPE(**settings))
    core.pre_tokenizer = pre_tokenizer
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator([tiny.make_text(6000) + " don't I'LL 12345 1234 3.14 10 200\n\n  \n == /// "], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")


WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
UPPER, LOWER, BEFORE = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"[^\r\n\p{L}\p{N}]?"
TEKKEN = rf"{BEFORE}{UPPER}*{LOWER}+|{BEFORE}{UPPER}+{LOWER}*" + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    """By a pattern, then into bytes."""
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), BYTES])


MARKS = QWEN.replace(r"?\p{L}+|", r"?[\p{L}\p{M}]+|").replace(r"[^\s\p{L}\p{N}]+", r"[^\s\p{L}\p{M}\p{N}]+")
SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K = (
    f"{BEFORE}{UPPER}*{LOWER}+{SHORT}|{BEFORE}{UPPER}+{LOWER}*{SHORT}|" + r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS: dict[str, tuple[pre_tokenizers.PreTokenizer, dict[str, Any]]] = {
    "gpt-2": (WORDS, {}),
    "smollm": (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), WORDS]), {}),
    "qwen2": (split(QWEN), {}),
    "llama-bpe": (split(LLAMA), {"ignore_merges": True}),
    "tekken": (split(TEKKEN), {"ignore_merges": True}),
    "qwen35": (split(MARKS), {}),
    "gpt-4o": (split(O200K), {}),
}
"""Ways to split text, by llama.cpp's name, and settings of the tokenizer."""


@functools.cache
def usual_scales(scheme: str, width: int) -> dict[str, Tensor]:
    """For seven rows of weights as random models have them."""
    W = 0.1 * torch.randn(7, width, generator=torch.Generator().manual_seed(width))
    return parse_scheme(scheme).fit_scales(W, torch.ones(width), torch.float16)


def nearest(W: Tensor, scheme: str, *, fitted: int | None = None) -> tuple[RoundedWeight, Tensor]:
    """The rounded weight and what it decodes to; scales are `usual_scales`, or fitted to so many rows, over and over."""
    grid, shape = parse_scheme(scheme), (W.shape[0], W.shape[1])
    few = usual_scales(scheme, shape[1]) if fitted is None else grid.fit_scales(W[:fitted], torch.ones(shape[1]), torch.float16)
    scales = {name: each[torch.arange(shape[0]) % len(each)] for name, each in few.items()}
    codes = nearest_codes(W, grid, scales)
    return RoundedWeight(scheme=grid.name, codes=codes, scales=scales, shape=shape), grid.dequantize(codes, scales, shape, torch.float32)


def write(source: Path, path: Path, scheme: Scheme, *, fitted: int | None = None, **settings: Any) -> Written:
    """A file of the model in `source`, all linears but the head rounded; by default everything else in float32."""
    model = auto_class(AutoConfig.from_pretrained(source)).from_pretrained(source, dtype=torch.float32).eval()
    split_experts(model)
    checkpoint = Checkpoint.open(source).of(model)
    rounded, decoded = {}, {}
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"}
    linears = {name: linear for name, linear in linears.items() if ".visual." not in name}
    for name, linear in linears.items():
        chosen = scheme(name, linear) if callable(scheme) else scheme
        if chosen is not None:
            rounded[name], decoded[name] = nearest(linear.weight.detach(), chosen, fitted=fitted)
            linear.weight.data = decoded[name]
    parts = checkpoint.names.parts
    stacks = {stack for stack, _ in parts.values()}
    given = {
        "tensors": [*(each for each in checkpoint if each not in stacks), *parts],
        "read": checkpoint.read,
        "name": "tiny",
        "dense": "f32",
        **settings,
    }
    gguf.write(path, model=source, rounded=rounded, **given)
    return Written(path=path, model=model, rounded=rounded, decoded=decoded)
