"""What a model is, as the metadata of a GGUF and as llama.cpp's own code have it.

Settings are Transformers' own reading of config.json, its defaults included. What llama.cpp fixes in its code and metadata cannot change
(activations, the order of windowed layers, scales of attention) must be what the model has, or the model is refused. Mistral's and Qwen's
sliding windows do not exist in llama.cpp: the context is cut to the window, within which nothing differs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import gguf
from transformers import CONFIG_MAPPING, PreTrainedConfig

from roundel.errors import ModelError

__all__ = ["FAMILIES", "Family", "add_settings", "head_dim_of", "language_config", "ropes_of"]


@dataclass(frozen=True, kw_only=True)
class Family:
    """What llama.cpp does with the models of a Transformers type, whatever the metadata say."""

    activation: str = "silu"
    permuted: bool = False
    """Whether rotary pairs are neighbours, in q and k."""
    norm_offset: int = 0
    biases: bool = False
    """Whether linears may have biases beyond those that the type always has."""
    window_period: int | None = None
    """Every how many layers one sees the whole context; None: there are no windows."""
    experts: bool | None = None
    """Whether weights of the chosen experts are made to add up to one; None: there are no experts."""
    wide_layers: int | None = None
    """The number of layers of that model which scales attention by the width of a head as `hidden_size / heads`, not by `head_dim`."""


_GELU = "gelu_pytorch_tanh"


FAMILIES = {
    "llama": Family(permuted=True, biases=True),
    "mistral": Family(permuted=True),
    "qwen2": Family(),
    "qwen2_moe": Family(experts=False),
    "qwen3": Family(),
    "qwen3_moe": Family(experts=True),
    "mixtral": Family(permuted=True, experts=True),
    "gemma": Family(activation=_GELU, norm_offset=1),
    "gemma2": Family(activation=_GELU, norm_offset=1, window_period=2, wide_layers=46),
    "gemma3_text": Family(activation=_GELU, norm_offset=1, window_period=6, wide_layers=62),
}
"""By Transformers' model type."""


_WRAPPERS = ("gemma3",)
"""Model types with pictures around a language model of these families."""


def language_config(config: Mapping[str, Any]) -> PreTrainedConfig:
    """Transformers' reading of the language model's settings, checked."""
    outer = str(config.get("model_type"))
    settings = config["text_config"] if outer in _WRAPPERS and "text_config" in config else config
    model_type = str(settings.get("model_type", outer)) if outer in (*FAMILIES, *_WRAPPERS) else outer
    if model_type not in FAMILIES:
        raise ModelError(
            f"model type {model_type!r}: as GGUF Roundel writes {', '.join(FAMILIES)}; for others, write another format, or use "
            "`roundel imatrix` with llama.cpp's own converter and llama-quantize"
        )
    try:
        read = CONFIG_MAPPING[model_type].from_dict(deepcopy(dict(settings)))
    except Exception as error:  # Transformers raises a dozen types for settings that contradict each other
        raise ModelError(f"config.json of a {model_type} model cannot be read: {error}") from error
    reasons = list(_differences(read, FAMILIES[model_type]))
    if reasons:
        raise ModelError(f"llama.cpp would not run this {model_type} model as it is: {'; '.join(reasons)}; write another format")
    return read


def _differences(config: PreTrainedConfig, family: Family) -> Iterator[str]:
    """What llama.cpp would do otherwise."""

    def setting(*names: str) -> Any:
        return next((value for value in (getattr(config, name, None) for name in names) if value is not None), None)

    activation = setting("hidden_activation", "hidden_act")
    if activation != family.activation:
        yield f"its activation is {activation}, and llama.cpp has {family.activation}"
    if not family.biases and (setting("attention_bias") or setting("mlp_bias")):
        yield "its linears have biases, for which llama.cpp has no place"
    if setting("use_bidirectional_attention"):
        yield "its attention looks ahead"
    for kind, rope in ropes_of(config).items():
        allowed = {"linear", "default"} if kind == "full_attention" else {"default"} if kind else {"default", "linear", "yarn"}
        allowed |= {"llama3"} if family.permuted else set()
        if rope["rope_type"] not in allowed:
            yield f"its rotary embedding is {rope['rope_type']}, and here llama.cpp has {', '.join(sorted(allowed))}"
        usual = {"beta_fast": 32, "beta_slow": 1, "truncate": True, "partial_rotary_factor": 1.0}
        others = {"attention_factor", "mscale", "mscale_all_dim"} | usual.keys()
        for name in sorted(others & rope.keys()):
            if rope[name] not in (None, usual.get(name)):
                yield f"its rotary embedding has {name} {rope[name]}"
    if family.experts is not None:
        if getattr(config, "norm_topk_prob", True) != family.experts:
            yield f"norm_topk_prob is {config.norm_topk_prob}, and llama.cpp has {family.experts}"
        if getattr(config, "decoder_sparse_step", 1) != 1 or getattr(config, "mlp_only_layers", None):
            yield "some of its layers have no experts"
    if family.wide_layers is not None:
        wide = config.num_hidden_layers == family.wide_layers
        expected = config.hidden_size // config.num_attention_heads if wide else config.head_dim
        if config.query_pre_attn_scalar != expected:
            yield f"query_pre_attn_scalar is {config.query_pre_attn_scalar}, and llama.cpp has {expected}"
    if family.window_period is not None:
        period = family.window_period
        kinds = ["full_attention" if k % period == period - 1 else "sliding_attention" for k in range(config.num_hidden_layers)]
        if list(config.layer_types) != kinds:
            yield f"its full attention is not in every layer of {period}"
    if config.model_type == "gemma3_text" and (config.attn_logit_softcapping or config.final_logit_softcapping):
        yield "its logits are capped, which llama.cpp does for gemma2 only"


def ropes_of(config: PreTrainedConfig) -> dict[str, dict[str, Any]]:
    """Rotary settings by kind of layer, `""` where all are alike."""
    found: dict[str, Any] = config.rope_parameters
    return {kind: dict(each) for kind, each in found.items()} if "full_attention" in found else {"": dict(found)}


def _window(config: PreTrainedConfig) -> int | None:
    """How many tokens a layer sees that does not see all."""
    if "sliding_attention" not in (getattr(config, "layer_types", None) or ["sliding_attention"]):
        return None
    window: int | None = getattr(config, "sliding_window", None)
    return window


def head_dim_of(config: PreTrainedConfig) -> int:
    """Width of a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def add_settings(writer: gguf.GGUFWriter, config: PreTrainedConfig, rows: int) -> None:
    """Writes the metadata of a model whose embedding has so many rows."""
    family, ropes = FAMILIES[config.model_type], ropes_of(config)
    window, context = _window(config), config.max_position_embeddings
    if window is not None and family.window_period is None:
        context = min(context, window)
    elif window is not None:
        writer.add_sliding_window(window)
    writer.add_vocab_size(rows)
    writer.add_context_length(context)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim_of(config))
    writer.add_value_length(head_dim_of(config))
    writer.add_rope_dimension_count(head_dim_of(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = ropes.get("full_attention") or ropes[""]
    writer.add_rope_freq_base(rope["rope_theta"])
    if "sliding_attention" in ropes:
        writer.add_rope_freq_base_swa(ropes["sliding_attention"]["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope.get("original_max_position_embeddings") or config.max_position_embeddings)
    if family.experts is not None:
        writer.add_expert_count(config.num_local_experts if config.model_type == "mixtral" else config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        if config.model_type != "mixtral":
            writer.add_expert_feed_forward_length(config.moe_intermediate_size)
        if config.model_type == "qwen2_moe":
            writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
