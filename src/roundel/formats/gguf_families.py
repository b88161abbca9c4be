"""The types of models that are written as GGUF, and what llama.cpp's code makes of each, whatever the metadata say.

Found out by running llama.cpp beside Transformers on tiny models of each (`make test-llama`): logits differ by 1e-6 to 3e-5 of the largest,
by up to 7e-4 where llama.cpp has a table of the activation in float16, 9e-4 where states of a Mamba are summed up otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["FAMILIES", "Family"]


@dataclass(frozen=True, kw_only=True)
class Family:
    """What llama.cpp does with the models of a Transformers type, whatever the metadata say."""

    activation: str = "silu"
    permuted: bool = False
    """Whether rotary pairs are neighbours, in q and k."""
    rope: str = ""
    """A way to scale the rotary embedding that not all families have."""
    rotary: bool = True
    """Whether there is one."""
    partial: bool = False
    """Whether some columns of a head may have no rotary embedding."""
    eps: str = "rms_norm_eps"
    """What the setting is called that norms add to a variance; empty: there is none."""
    centred: bool = False
    """Whether norms take off the mean first."""
    norm_offset: int = 0
    last_norm: bool = True
    """Whether the last norm has weights."""
    biases: bool = False
    """Whether linears may have biases beyond those that the type always has."""
    window_period: int | None = None
    """Every how many layers one sees the whole context; None: there are no windows."""
    windows_listed: bool = False
    """Whether metadata say which layers have windows, and how wide heads are in these."""
    window_layers: int | None = None
    """The number of layers of that model which has windows, where others have none."""
    experts: bool | None = None
    """Whether weights of the chosen experts are made to add up to one; None: there are no experts, or metadata say it."""
    sigmoid: bool = False
    """Whether experts are chosen by a sigmoid of the router's values, not by their softmax."""
    sections: bool = False
    """Whether the rotary embedding turns by time, height and width, each in columns of its own."""
    whole_width: bool = False
    """Whether the heads of q must be as wide as the model, together."""
    equal_heads: bool = False
    """Whether there must be as many heads of keys as of queries."""
    wide_layers: int | None = None
    """The number of layers of that model which scales attention by the width of a head as `hidden_size / heads`, not by `head_dim`."""
    state_width: str = ""
    """What the width of a state space's head is called; empty: there are none."""
    numbers: Mapping[str, str] = field(default_factory=dict)
    """Settings that metadata have, each with what it is called there (`GGUFWriter.add_...`)."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Settings that must be so."""

    @property
    def latent(self) -> bool:
        """Whether keys and values go through fewer columns."""
        return "kv_lora_rank" in self.numbers

    @property
    def linear(self) -> bool:
        """Whether most layers have linear attention."""
        return "linear_key_head_dim" in self.numbers

    def called(self, key: str) -> str:
        """What the setting is called that metadata have as `key`."""
        return next(name for name, own in self.numbers.items() if own == key)


_UNLIMITED = [0.0, float("inf")]
"""Of time steps."""

_GELU = "gelu_pytorch_tanh"

_GRANITE = {
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "attention_multiplier": "attention_scale",
    "logits_scaling": "logit_scale",
}

_EXPERTS = {
    "n_routed_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "n_shared_experts": "expert_shared_count",
    "first_k_dense_replace": "leading_dense_block_count",
    "routed_scaling_factor": "expert_weights_scale",
    "norm_topk_prob": "expert_weights_norm",
    "n_group": "expert_group_count",
    "topk_group": "expert_group_used_count",
}
"""As DeepSeek's models have them."""

_LLAMA4_EXPERTS = {
    "num_local_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "intermediate_size": "expert_feed_forward_length",
    "interleave_moe_layer_step": "interleave_moe_layer_step",
}

_ONE_WIDTH = {"intermediate_size": "expert_feed_forward_length"}
"""Of models that have no feed-forward blocks but experts."""

_LATENT = {
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_head_dim": "key_length",
    "v_head_dim": "value_length",
    "qk_rope_head_dim": "rope_dimension_count",
}
"""Of latent attention, whose keys and values llama.cpp makes of `kv_b_proj` for each head where there are no two matrices in its place."""

_SHORT = {"conv_L_cache": "shortconv_l_cache"}

_LFM_EXPERTS = {
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "num_dense_layers": "leading_dense_block_count",
    "norm_topk_prob": "expert_weights_norm",
    "routed_scaling_factor": "expert_weights_scale",
}

_ERNIE_EXPERTS = {
    "moe_num_experts": "expert_count",
    "moe_k": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "moe_num_shared_experts": "expert_shared_count",
    "moe_layer_start_index": "leading_dense_block_count",
    "moe_layer_interval": "interleave_moe_layer_step",
}

_LINEAR = {
    "linear_conv_kernel_dim": "ssm_conv_kernel",
    "linear_key_head_dim": "ssm_state_size",
    "linear_num_key_heads": "ssm_group_count",
    "linear_num_value_heads": "ssm_time_step_rank",
}
"""Of linear attention."""

_EXAONE_EXPERTS = {
    {"n_routed_experts": "num_experts", "n_shared_experts": "num_shared_experts"}.get(name, name): key for name, key in _EXPERTS.items()
}

_AFMOE_EXPERTS = {
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "num_shared_experts": "expert_shared_count",
    "num_dense_layers": "leading_dense_block_count",
    "route_scale": "expert_weights_scale",
    "norm_topk_prob": "expert_weights_norm",
}

_HUNYUAN_EXPERTS = {"num_experts": "expert_count", "moe_topk": "expert_used_count", "intermediate_size": "expert_feed_forward_length"}

_NEMOTRON_EXPERTS = {name: key for name, key in _EXPERTS.items() if name != "first_k_dense_replace"} | {
    "moe_shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    "moe_latent_size": "moe_latent_size",
}

_STATES = {
    "conv_kernel": "ssm_conv_kernel",
    "ssm_state_size": "ssm_state_size",
    "n_groups": "ssm_group_count",
    "mamba_num_heads": "ssm_time_step_rank",
}
"""Of state spaces."""

_GRANITE_SHARED = {"shared_intermediate_size": "expert_shared_feed_forward_length"}

_GRANITE_STATES = {
    "mamba_d_conv": "ssm_conv_kernel",
    "mamba_d_state": "ssm_state_size",
    "mamba_n_groups": "ssm_group_count",
    "mamba_n_heads": "ssm_time_step_rank",
}

_DEEPSTACK = {"deepstack_layers": "num_deepstack_layers"}
"""Into how many layers features of pictures go."""

_GEMMA4 = {
    "final_logit_softcapping": "final_logit_softcapping",
    "hidden_size_per_layer_input": "embedding_length_per_layer_input",
    "num_kv_shared_layers": "shared_kv_layers",
    "num_experts": "expert_count",
    "top_k_experts": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
}

_CAPS = {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"}


FAMILIES = {
    "llama": Family(permuted=True, rope="llama3", biases=True),
    "mistral": Family(permuted=True, rope="llama3"),
    "qwen2": Family(),
    "qwen2_moe": Family(experts=False),
    "qwen3": Family(),
    "qwen3_moe": Family(experts=True),
    "mixtral": Family(permuted=True, rope="llama3", experts=True),
    "gemma": Family(activation=_GELU, norm_offset=1),
    "gemma2": Family(activation=_GELU, norm_offset=1, window_period=2, wide_layers=46, numbers=_CAPS),
    "gemma3_text": Family(activation=_GELU, norm_offset=1, window_period=6, wide_layers=62),
    "gemma4_text": Family(activation=_GELU, rope="proportional", windows_listed=True, numbers=_GEMMA4),
    "afmoe": Family(window_period=4, sigmoid=True, numbers=_AFMOE_EXPERTS, fixed={"mup_enabled": True}),
    "arcee": Family(activation="relu2", permuted=True, rope="llama3"),
    "cohere": Family(
        whole_width=True, eps="layer_norm_eps", centred=True, numbers={"logit_scale": "logit_scale"}, fixed={"use_qk_norm": False}
    ),
    "cohere2": Family(whole_width=True, eps="layer_norm_eps", centred=True, window_period=4, numbers={"logit_scale": "logit_scale"}),
    "deepseek_v2": Family(numbers=_EXPERTS | _LATENT, fixed={"topk_method": "greedy"}),
    "deepseek_v3": Family(sigmoid=True, numbers=_EXPERTS | _LATENT, fixed={"rope_interleave": True}),
    "dots1": Family(equal_heads=True, sigmoid=True, numbers=_EXPERTS),
    "ernie4_5": Family(fixed={"use_bias": False}),
    "ernie4_5_moe": Family(fixed={"use_bias": False}, numbers=_ERNIE_EXPERTS),
    "exaone4": Family(rope="llama3", window_period=4, window_layers=64),
    "exaone_moe": Family(rope="llama3", window_period=4, sigmoid=True, numbers=_EXAONE_EXPERTS),
    "glm4": Family(partial=True, biases=True),
    "glm4_moe": Family(partial=True, biases=True, sigmoid=True, numbers=_EXPERTS),
    "glm4_moe_lite": Family(sigmoid=True, numbers=_EXPERTS | _LATENT, fixed={"rope_interleave": True}),
    "gpt_neox": Family(
        activation="gelu",
        eps="layer_norm_eps",
        centred=True,
        partial=True,
        biases=True,
        fixed={"attention_bias": True},
        numbers={"use_parallel_residual": "parallel_residual"},
    ),
    "gpt_oss": Family(
        biases=True,
        window_period=2,
        experts=True,
        numbers=_ONE_WIDTH,
        fixed={"swiglu_alpha": 1.702, "swiglu_limit": 7.0},
    ),
    "granite": Family(permuted=True, rope="llama3", numbers=_GRANITE),
    "granitemoe": Family(permuted=True, rope="llama3", experts=True, numbers=_GRANITE),
    "granitemoehybrid": Family(
        permuted=True,
        rope="llama3",
        state_width="mamba_d_head",
        fixed={"mamba_proj_bias": False, "time_step_limit": _UNLIMITED},
        numbers={
            "num_local_experts": "expert_count",
            "num_experts_per_tok": "expert_used_count",
            **_GRANITE,
            **_GRANITE_SHARED,
            **_GRANITE_STATES,
        },
    ),
    "granitemoeshared": Family(permuted=True, rope="llama3", experts=True, numbers=_GRANITE | _GRANITE_SHARED),
    "hunyuan_v1_dense": Family(),
    "hunyuan_v1_moe": Family(numbers=_HUNYUAN_EXPERTS),
    "jais2": Family(activation="relu2", eps="layer_norm_eps", centred=True, biases=True),
    "lfm2": Family(eps="norm_eps", last_norm=False, numbers=_SHORT),
    "lfm2_moe": Family(eps="norm_eps", last_norm=False, sigmoid=True, numbers=_SHORT | _LFM_EXPERTS),
    "llama4_text": Family(
        rope="llama3",
        fixed={"attn_temperature_tuning": True, "floor_scale": 8192, "attn_scale": 0.1, "attention_chunk_size": 8192},
        numbers=_LLAMA4_EXPERTS,
    ),
    "minimax_m2": Family(sigmoid=True, partial=True, experts=True, numbers=_ONE_WIDTH),
    "ministral3": Family(permuted=True),
    "nemotron": Family(whole_width=True, activation="relu2", eps="norm_eps", centred=True, norm_offset=1, partial=True),
    "nemotron_h": Family(
        activation="relu2",
        eps="layer_norm_epsilon",
        rotary=False,
        sigmoid=True,
        state_width="mamba_head_dim",
        fixed={"mamba_hidden_act": "silu", "mamba_proj_bias": False, "use_bias": False, "time_step_limit": _UNLIMITED},
        numbers=_STATES | _NEMOTRON_EXPERTS | {"layer_norm_epsilon": "layer_norm_eps"},
    ),
    "olmo": Family(whole_width=True, permuted=True, eps="", centred=True, last_norm=False, numbers={"clip_qkv": "clamp_kqv"}),
    "olmo2": Family(whole_width=True),
    "olmo3": Family(whole_width=True, window_period=4),
    "olmoe": Family(equal_heads=True, whole_width=True, experts=False, fixed={"clip_qkv": None}),
    "phi": Family(whole_width=True, activation="gelu_new", eps="layer_norm_eps", centred=True, partial=True, fixed={"qk_layernorm": False}),
    "phi3": Family(rope="longrope", whole_width=True, partial=True),
    "qwen2_5_vl_text": Family(sections=True),
    "qwen2_vl_text": Family(sections=True),
    "qwen3_5_moe_text": Family(norm_offset=1, partial=True, sections=True, experts=True, numbers=_LINEAR),
    "qwen3_5_text": Family(norm_offset=1, partial=True, sections=True, numbers=_LINEAR),
    "qwen3_next": Family(norm_offset=1, partial=True, experts=True, numbers=_LINEAR),
    "qwen3_vl_moe_text": Family(sections=True, experts=True, numbers=_DEEPSTACK),
    "qwen3_vl_text": Family(sections=True, numbers=_DEEPSTACK),
    "seed_oss": Family(biases=True, fixed={"attention_out_bias": False, "mlp_bias": False}),
    "smollm3": Family(permuted=True),
    "solar_open": Family(partial=True, sigmoid=True, numbers=_EXPERTS),
    "stablelm": Family(
        whole_width=True,
        eps="layer_norm_eps",
        centred=True,
        partial=True,
        fixed={"qk_layernorm": False},
        numbers={"use_parallel_residual": "parallel_residual"},
    ),
    "starcoder2": Family(whole_width=True, activation=_GELU, eps="norm_epsilon", centred=True, fixed={"use_bias": True}),
}
"""By Transformers' model type."""
