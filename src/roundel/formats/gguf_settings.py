"""What a model is, as the metadata of a GGUF and as llama.cpp's own code have it.

Settings are Transformers' own reading of config.json, its defaults included. What llama.cpp fixes in its code and metadata cannot change
(activations, the order of windowed layers, scales of attention) must be what the model has, or the model is refused. Mistral's and Qwen's
sliding windows do not exist in llama.cpp: the context is cut to the window, within which nothing differs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import gguf
import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from roundel.errors import ModelError
from roundel.formats.gguf_families import FAMILIES, Family
from roundel.formats.imatrix import architecture

__all__ = [
    "add_settings",
    "architecture_of",
    "expert_count_of",
    "head_dim_in",
    "head_dim_of",
    "kv_heads_of",
    "language_config",
    "ropes_of",
]


_LITE = (26, 27)
"""Layers of the models whose queries do not go through fewer columns."""

_SECTIONS = [11, 11, 10]
"""Columns of a head that the rotary embedding turns by time, height and width, where nothing is said."""

_OLMO_EPS = 1e-5
"""Of norms without settings."""

_WITHOUT_ROPE = 4
"""Every how many layers one of SmolLM3's or Llama 4's has no rotary embedding."""

_WITHOUT_NORMS = 128
"""Experts of the Llama 4 whose queries and keys are not normalized."""

_WRAPPERS = ("gemma3", "gemma4", "llama4", "mistral3", "qwen2_5_vl", "qwen2_vl", "qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe")
"""Model types with pictures around a language model of these families."""


def language_config(config: Mapping[str, Any]) -> PreTrainedConfig:
    """Transformers' reading of the language model's settings, checked."""
    model_type = str(config.get("model_type"))
    read = None
    if model_type in FAMILIES or model_type in _WRAPPERS:
        try:
            whole = CONFIG_MAPPING[model_type].from_dict(_decoded(dict(config)))
            read = whole.get_text_config()
        except Exception as error:  # Transformers raises a dozen types for settings that contradict each other
            raise ModelError(f"config.json of a {model_type} model cannot be read: {error}") from error
        model_type = read.model_type
    if read is None or model_type not in FAMILIES:
        raise ModelError(
            f"model type {model_type!r}: as GGUF Roundel writes {', '.join(FAMILIES)}; for others, write another format, or use "
            "`roundel imatrix` with llama.cpp's own converter and llama-quantize"
        )
    read.tie_word_embeddings = whole.tie_word_embeddings and getattr(read, "tie_word_embeddings", True)
    read.deepstack_layers = len((config.get("vision_config") or {}).get("deepstack_visual_indexes") or ())
    if read.model_type == "solar_open" or getattr(read, "first_k_dense_replace", None) is None:  # Solar's code has no such setting
        read.first_k_dense_replace = (*(getattr(read, "mlp_layer_types", None) or ()), "sparse").index("sparse")
    read.norm_topk_prob = getattr(read, "norm_topk_prob", True)
    reasons = list(_differences(read, FAMILIES[model_type]))
    if reasons:
        raise ModelError(f"llama.cpp would not run this {model_type} model as it is: {'; '.join(reasons)}; write another format")
    return read


def _decoded(value: Any) -> Any:
    """A copy of what config.json has, where Transformers writes `{"__float__": "Infinity"}` for what JSON has no number for."""
    match value:
        case {"__float__": str(name)}:
            return float(name)
        case dict():
            return {key: _decoded(each) for key, each in value.items()}
        case list():
            return [_decoded(each) for each in value]
        case _:
            return value


def architecture_of(config: PreTrainedConfig) -> str:
    """The GGUF name of a model's architecture."""
    return architecture(config.model_type + "_moe" * (config.model_type == "nemotron_h" and "moe" in config.layer_types))


def _differences(config: PreTrainedConfig, family: Family) -> Iterator[str]:
    """What llama.cpp would do otherwise."""

    def setting(*names: str) -> Any:
        return next((value for value in (getattr(config, name, None) for name in names) if value is not None), None)

    activation = setting("hidden_activation", "hidden_act", "mlp_hidden_act")
    if activation not in (None, family.activation):
        yield f"its activation is {activation}, and llama.cpp has {family.activation}"
    if not family.biases and (setting("attention_bias") or setting("mlp_bias")):
        yield "its linears have biases, for which llama.cpp has no place"
    if setting("use_bidirectional_attention") not in (None, False, "vision"):
        yield "its attention looks ahead"
    for kind, rope in ropes_of(config).items():
        allowed = {"linear", "default"} if kind == "full_attention" else {"default"} if kind else {"default", "linear", "yarn"}
        allowed |= {family.rope} if family.rope and kind in ("", "full_attention") else set()
        if rope["rope_type"] not in allowed:
            yield f"its rotary embedding is {rope['rope_type']}, and here llama.cpp has {', '.join(sorted(allowed))}"
        usual: dict[str, Any] = {"beta_fast": 32, "beta_slow": 1}
        usual |= {} if config.model_type == "gpt_oss" else {"truncate": True}  # there llama.cpp truncates all the same
        usual |= {} if family.partial or rope["rope_type"] == "proportional" else {"partial_rotary_factor": 1.0}
        others = {"attention_factor", "mscale", "mscale_all_dim"} | usual.keys()
        if (family.latent or config.model_type == "ministral3") and rope.get("mscale") == rope.get("mscale_all_dim"):
            others -= {"mscale", "mscale_all_dim"}  # attention is scaled by them, not the embedding
        for name in sorted(others & rope.keys()):
            if rope[name] not in (None, usual.get(name)):
                yield f"its rotary embedding has {name} {rope[name]}"
    if family.experts is not None:
        if getattr(config, "norm_topk_prob", family.experts) != family.experts:
            yield f"norm_topk_prob is {config.norm_topk_prob}, and llama.cpp has {family.experts}"
        if getattr(config, "decoder_sparse_step", 1) != 1 or getattr(config, "mlp_only_layers", None):
            yield "some of its layers have no experts"
    if family.wide_layers is not None:
        wide = config.num_hidden_layers == family.wide_layers
        expected = config.hidden_size // config.num_attention_heads if wide else config.head_dim
        if config.query_pre_attn_scalar != expected:
            yield f"query_pre_attn_scalar is {config.query_pre_attn_scalar}, and llama.cpp has {expected}"
    if family.window_period and family.window_layers is None and _window(config) is None:
        yield "it has no sliding window, and llama.cpp has one in its models"
    none = family.window_layers is not None and _window(config) is None
    full_every = None if none else family.window_period
    if family.window_layers is not None and (config.num_hidden_layers == family.window_layers) == none:
        yield f"llama.cpp takes the models with windows for those of {family.window_layers} layers"
    elif full_every and list(config.layer_types) != _full_every(full_every, "sliding_attention", config.num_hidden_layers):
        yield f"its full attention is not in every layer of {full_every}"
    if family.whole_width and head_dim_of(config) * config.num_attention_heads != config.hidden_size:
        yield f"its heads are {head_dim_of(config) * config.num_attention_heads} wide together, and llama.cpp has {config.hidden_size}"
    if family.equal_heads and kv_heads_of(config) != config.num_attention_heads:
        yield "it has fewer heads of keys than of queries"
    if family.linear:
        kinds = list(config.layer_types)
        if "full_attention" not in kinds or kinds != _full_every(kinds.index("full_attention") + 1, "linear_attention", len(kinds)):
            yield "its full attention is not in layers at equal distances"
    if family.latent and (config.q_lora_rank is None) != (config.num_hidden_layers in _LITE):
        yield f"llama.cpp takes latent attention without q_lora_rank for a model of {_LITE[-1]} layers, and only that"
    if (blocks := getattr(config, "mlp_layer_types", None)) and "dense" in blocks[config.first_k_dense_replace :]:
        yield "layers without experts follow some with"
    if lists := [name for name in family.numbers if isinstance(getattr(config, name, None), list)]:
        yield f"its {lists[0]} is not the same for all layers"
    for name, value in family.fixed.items():
        own = getattr(config, name, value)
        if (list(own) if isinstance(own, tuple) else own) != value:
            yield f"its {name} is {getattr(config, name)}, and llama.cpp has {value}"
    if config.model_type == "nemotron_h" and {"mlp", "moe"} <= set(config.layer_types):
        yield "some of its feed-forward layers have experts, and others have none"
    if config.model_type == "llama4_text":
        step, count = config.interleave_moe_layer_step, config.num_local_experts
        if list(config.moe_layers) != list(range(step - 1, config.num_hidden_layers, step)):
            yield f"its layers with experts are not every {step}th"
        if config.use_qk_norm != (count != _WITHOUT_NORMS):
            yield f"its use_qk_norm is {config.use_qk_norm}, and with {count} experts llama.cpp has {count != _WITHOUT_NORMS}"
    if config.model_type in ("llama4_text", "smollm3"):
        rotated = [int((k + 1) % _WITHOUT_ROPE != 0) for k in range(config.num_hidden_layers)]
        if list(config.no_rope_layers) != rotated:
            yield f"its layers without rotary embedding are not every {_WITHOUT_ROPE}th"
    if config.model_type == "gemma3_text" and (config.attn_logit_softcapping or config.final_logit_softcapping):
        yield "its logits are capped, which llama.cpp does for gemma2 only"


def _full_every(period: int, other: str, layers: int) -> list[str]:
    """Kinds of layers of which each last one of a period sees everything."""
    return [other if (k + 1) % period else "full_attention" for k in range(layers)]


def ropes_of(config: PreTrainedConfig) -> dict[str, dict[str, Any]]:
    """Rotary settings by kind of layer, `""` where all are alike; none without rotary embedding."""
    found: dict[str, Any] = config.rope_parameters if FAMILIES[config.model_type].rotary else {}
    if "full_attention" in found:
        return {kind: dict(each) for kind, each in found.items()}
    return {"": dict(found)} if found else {}


def _window(config: PreTrainedConfig) -> int | None:
    """How many tokens a layer sees that does not see all."""
    if "sliding_attention" not in (getattr(config, "layer_types", None) or ["sliding_attention"]):
        return None
    window: int | None = getattr(config, "sliding_window", None)
    return window


def kv_heads_of(config: PreTrainedConfig) -> int:
    """How many heads of keys and values there are."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def head_dim_of(config: PreTrainedConfig) -> int:
    """Width of a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def expert_count_of(config: PreTrainedConfig) -> int:
    """How many experts a layer has."""
    if (config.model_type == "nemotron_h" and "moe" not in config.layer_types) or not getattr(config, "enable_moe_block", True):
        return 0
    names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    return next((int(found) for name in names if (found := getattr(config, name, None))), 0)


def _inner(config: PreTrainedConfig) -> int | list[int]:
    """Width of feed-forward blocks; of each layer's, where they differ."""
    layers = range(config.num_hidden_layers)
    if config.model_type == "nemotron_h":
        widths = {"mlp": config.intermediate_size, "moe": config.moe_intermediate_size}
        return [widths.get(kind, 0) for kind in config.layer_types]
    if config.model_type == "llama4_text":
        return int(config.intermediate_size_mlp)
    if config.model_type == "granitemoehybrid" and not expert_count_of(config):
        return int(config.shared_intermediate_size)
    if getattr(config, "use_double_wide_mlp", False):  # those that have others' keys and values are twice as wide
        return [config.intermediate_size * (1 + (k >= len(layers) - config.num_kv_shared_layers)) for k in layers]
    if config.model_type != "lfm2" or not config.block_auto_adjust_ff_dim:
        return int(config.intermediate_size)
    inner, multiple = int((config.block_ffn_dim_multiplier or 1.0) * int(2 * config.intermediate_size / 3)), int(config.block_multiple_of)
    return -(-inner // multiple) * multiple


def head_dim_in(config: PreTrainedConfig, kind: str) -> int:
    """Width of a head in the layers of a kind, where kinds may differ; of the last layer where there is none."""
    layer = next((k for k, each in enumerate(config.layer_types) if each == kind), config.num_hidden_layers - 1)
    return int(config.per_layer_config[layer].head_dim)


def _rotated(config: PreTrainedConfig) -> int:
    """How many columns of a head the rotary embedding turns."""
    ropes = ropes_of(config)
    part = (ropes.get("full_attention") or ropes.get("") or {}).get("partial_rotary_factor")
    return int(head_dim_of(config) * (1.0 if part is None else part))


def _first_context(config: PreTrainedConfig) -> int:
    """How many tokens a model was trained on before its context was made longer."""
    rope = ropes_of(config)[""]
    return int(rope.get("original_max_position_embeddings") or config.original_max_position_embeddings)


def add_settings(writer: gguf.GGUFWriter, config: PreTrainedConfig, rows: int) -> None:
    """Writes the metadata of a model whose embedding has so many rows."""
    family, ropes = FAMILIES[config.model_type], ropes_of(config)
    window, context = _window(config), config.max_position_embeddings
    if window is not None and family.window_period is None and not family.windows_listed:
        context = min(context, window)
    elif window is not None:
        writer.add_sliding_window(window)
    writer.add_vocab_size(rows)
    writer.add_context_length(context)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(_inner(config))
    writer.add_head_count(config.num_attention_heads)
    kinds = getattr(config, "layer_types", None) or ()
    if family.windows_listed:
        writer.add_head_count_kv([config.per_layer_config[k].num_key_value_heads for k in range(config.num_hidden_layers)])
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in kinds])
        for add_whole, add_windowed in (
            (writer.add_key_length, writer.add_key_length_swa),
            (writer.add_value_length, writer.add_value_length_swa),
            (writer.add_rope_dimension_count, writer.add_rope_dimension_count_swa),
        ):
            add_whole(head_dim_in(config, "full_attention"))
            add_windowed(head_dim_in(config, "sliding_attention"))
    else:
        others = {"conv", "linear_attention", "mlp", "moe"} if family.state_width else {"conv"}
        heads = [kv_heads_of(config) * (kind not in others) for kind in kinds]
        writer.add_head_count_kv(heads if 0 in heads else kv_heads_of(config))
    if not (family.windows_listed or family.latent):  # latent attention's widths are among its numbers
        writer.add_key_length(head_dim_of(config))
        writer.add_value_length(head_dim_of(config))
        writer.add_rope_dimension_count(_rotated(config))
    add_eps = writer.add_layer_norm_eps if family.centred else writer.add_layer_norm_rms_eps
    add_eps(getattr(config, family.eps) if family.eps else _OLMO_EPS)
    if family.rotary:
        _add_rope(writer, config, ropes)
    for name, key in family.numbers.items():
        value = getattr(config, name)
        if key.startswith("expert_") and not expert_count_of(config):
            continue
        if value is None and key == "final_logit_softcapping":
            value = 0.0  # llama.cpp caps where nothing is said
        if value is not None:
            getattr(writer, f"add_{key}")(value)
    if family.linear:
        writer.add_ssm_inner_size(config.linear_num_value_heads * config.linear_value_head_dim)
        writer.add_full_attention_interval(list(config.layer_types).index("full_attention") + 1)
    if family.state_width:
        writer.add_ssm_inner_size(getattr(config, family.called("ssm_time_step_rank")) * getattr(config, family.state_width))
    if config.model_type == "granitemoehybrid":
        writer.add_rope_scaling_finetuned(config.position_embedding_type == "rope")
    if config.model_type == "ernie4_5_moe":
        writer.add_expert_shared_feed_forward_length(config.moe_num_shared_experts * config.moe_intermediate_size)
    if family.sigmoid:
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    if family.experts is not None:
        writer.add_expert_count(expert_count_of(config))
        writer.add_expert_used_count(config.num_experts_per_tok)
        if hasattr(config, "moe_intermediate_size"):
            writer.add_expert_feed_forward_length(config.moe_intermediate_size)
        if hasattr(config, "shared_expert_intermediate_size"):
            writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)


def _add_rope(writer: gguf.GGUFWriter, config: PreTrainedConfig, ropes: Mapping[str, Mapping[str, Any]]) -> None:
    rope = ropes.get("full_attention") or ropes[""]
    writer.add_rope_freq_base(rope["rope_theta"])
    if "sliding_attention" in ropes:
        writer.add_rope_freq_base_swa(ropes["sliding_attention"]["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "longrope":
        writer.add_rope_scaling_orig_ctx_len(_first_context(config))
        writer.add_rope_scaling_attn_factors(ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"), seq_len=1)[1])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope.get("original_max_position_embeddings") or config.max_position_embeddings)
        if rope.get("mscale_all_dim"):
            writer.add_rope_scaling_yarn_log_mul((1.0 if config.model_type == "ministral3" else 0.1) * rope["mscale_all_dim"])
    if FAMILIES[config.model_type].sections:
        writer.add_rope_dimension_sections([*(rope.get("mrope_section") or _SECTIONS), 0])
    if rope.get("llama_4_scaling_beta"):
        writer.add_attn_temperature_scale(rope["llama_4_scaling_beta"])
