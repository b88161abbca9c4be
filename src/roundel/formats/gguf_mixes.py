"""llama.cpp's named mixes: which tensor gets which type.

Found out from files that llama.cpp 0.4.0's own tool wrote with an importance matrix, tensor by tensor, of models of 8 to 80 layers with and
without grouped heads, tied heads and experts (`docs/log.md`, 23). With `N` layers, `g` heads for each of keys and values, layer `i`:

    first    i < N // 8
    last     i >= 7 N // 8
    more     first, last, or (i - N // 8) % 3 == 2
    grouped  g >= 4

A mix has a type for most tensors and others for some parts, which may depend on the layer. Where a model has 8 experts its k and v are
`q8_0`, and `attn_output` is `q5_k` in some mixes; where it has 80 layers, v has `q5_k` at least. In mixes of `iq2` types neither holds, but
k of 8 and v of 4 experts or more are `q4_k`. (Left out: `attn_output` of 8 experts in `q3_k_l`, which llama.cpp gives less than `q3_k_m`;
Qwen3 of 80 layers as Llama; `ffn_down` of shared experts, of which `iq2` mixes count matrices in the place of layers.)

Where 256 does not divide a width, `NARROW` says what stands for a type.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from roundel.formats.gguf_settings import expert_count_of

__all__ = ["CANDIDATES", "MIXES", "NARROW", "Mix", "mix_types"]

NARROW = {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_0", "q6_k": "q8_0"} | dict.fromkeys(
    ("iq4_xs", "iq3_s", "iq3_xxs", "iq2_s", "iq2_xs", "iq2_xxs"), "iq4_nl"
)
"""The type with blocks of 32 that llama.cpp takes in the place of one with 256; but for `q5_k`, whose place `q5_1` takes there."""

CANDIDATES = ("q2_k", "q3_k", "iq4_xs", "q4_k", "q5_k", "q6_k", "q8_0")
"""Types that bits are allocated over where nothing else is said: those that are fitted fast."""

Types = tuple[tuple[str, str], ...]
"""Conditions and types, of which the first whose condition holds is taken; the last has none."""


@dataclass(frozen=True, kw_only=True)
class Mix:
    """One mix."""

    base: str
    query: Types = ()
    """Of keys as well."""
    value: Types = ()
    output: Types = ()
    gate: Types = ()
    """Of `ffn_up` as well."""
    down: Types = ()
    raised: bool = True
    """Whether `attn_output` is raised in models of 8 experts."""
    embedding: str
    """Where the head is another matrix."""
    head: str = "q6_k"


def _always(kind: str) -> Types:
    return (("", kind),)


def _k(base: str, **given: Any) -> Mix:
    return Mix(base=base, embedding=base, **given)


def _iq2(base: str, more: str, **given: Any) -> Mix:
    value = (("grouped", "q4_k"), ("experts", "q4_k"), ("", more))
    return Mix(base=base, value=value, down=(("first", more), ("", base)), head="q5_k", **given)


def _iq3(base: str, value: str, **given: Any) -> Mix:
    return Mix(base=base, value=(("grouped", "q4_k"), ("", value)), embedding="iq3_s", **given)


MIXES = {
    "q2_k": _k("q2_k", value=(("grouped", "q4_k"), ("", "q3_k")), output=_always("q3_k"), down=_always("q3_k")),
    "q2_k_s": _k("q2_k", value=(("grouped", "q4_k"), ("", "q2_k")), down=(("first", "q4_k"), ("", "q2_k")), raised=False),
    "q3_k_s": _k("q3_k"),
    "q3_k_m": _k("q3_k", value=(("second", "q5_k"), ("", "q4_k")), output=_always("q4_k"), down=(("half", "q5_k"), ("", "q4_k"))),
    "q3_k_l": _k("q3_k", value=_always("q5_k"), output=_always("q5_k"), down=_always("q5_k"), raised=False),
    "q4_k_s": _k("q4_k", value=(("fourth", "q5_k"), ("", "q4_k")), down=(("first", "q5_k"), ("", "q4_k"))),
    "q4_k_m": _k("q4_k", value=(("more", "q6_k"), ("", "q4_k")), down=(("more", "q6_k"), ("", "q4_k"))),
    "q5_k_s": _k("q5_k", raised=False),
    "q5_k_m": _k("q5_k", value=(("more", "q6_k"), ("", "q5_k")), down=(("more", "q6_k"), ("", "q5_k")), raised=False),
    "q6_k": _k("q6_k", raised=False),
    "iq2_xxs": _iq2("iq2_xxs", "q2_k", embedding="q2_k"),
    "iq2_xs": _iq2("iq2_xs", "q2_k", embedding="q2_k"),
    "iq2_s": _iq2("iq2_xs", "iq3_s", output=_always("iq3_s"), embedding="iq3_s"),
    "iq2_m": _iq2("iq2_s", "iq3_s", output=_always("iq3_s"), embedding="iq3_s"),
    "iq3_xxs": _iq3("iq3_xxs", "iq3_xxs", query=_always("iq2_s"), output=_always("iq3_s"), head="q5_k"),
    "iq3_xs": _iq3(
        "iq3_xxs",
        "iq3_s",
        output=_always("iq3_s"),
        gate=(("first", "iq3_s"), ("last", "iq3_s"), ("", "iq3_xxs")),
        down=_always("iq3_s"),
    ),
    "iq3_s": _iq3("iq3_s", "iq3_s"),
    "iq3_m": _iq3("iq3_s", "q4_k", output=_always("q4_k"), down=(("first", "q4_k"), ("eight", "q4_k"), ("", "iq3_s"))),
    "iq4_xs": _k("iq4_xs", value=(("grouped", "q5_k"), ("", "iq4_xs"))),
    "iq4_nl": _k("iq4_nl", value=(("grouped", "q5_k"), ("", "iq4_nl"))),
    "q8_0": _k("q8_0", raised=False, head="q8_0"),
}
"""By the name that llama.cpp's users know, in lower case."""


def mix_types(mix: str, tensors: Mapping[str, str], config: PreTrainedConfig) -> dict[str, str]:
    """The type of each linear.

    Args:
        mix: A name of `MIXES`.
        tensors: Of each linear its tensor's name in the file.
        config: Of the language model.
    """
    layers = int(config.num_hidden_layers)
    return {name: _type(MIXES[mix], tensor, layers, _grouped(config), expert_count_of(config)) for name, tensor in tensors.items()}


def _type(mix: Mix, tensor: str, layers: int, grouped: int, experts: int) -> str:
    found = re.fullmatch(r"blk\.(\d+)\.(\w+?)(_exps|_shexp)?\.weight", tensor)
    if found is None:
        return mix.base
    layer, part = int(found[1]), found[2]
    eighth = layers // 8
    first, last = layer < eighth, layer >= 7 * layers // 8
    more = first or last or (layer - eighth) % 3 == 2
    holds = {
        "": True,
        "grouped": grouped >= 4,
        "second": layer < 2,
        "fourth": layer < 4,
        "half": layer < layers // 16,
        "first": first,
        "last": last,
        "more": more,
        "experts": experts >= 4,
        "eight": experts == 8 and more,
    }
    little = mix.base.startswith("iq2")
    if experts == 8 and part in ("attn_k", "attn_v"):
        return "q4_k" if little else "q8_0"
    if experts == 8 and part == "attn_output" and mix.raised:
        return "q5_k"
    types = {
        "attn_q": mix.query,
        "attn_k": mix.query,
        "attn_v": mix.value,
        "attn_output": mix.output,
        "ffn_gate": mix.gate,
        "ffn_up": mix.gate,
        "ffn_down": mix.down,
    }.get(part, ())
    kind = next((kind for condition, kind in types if holds[condition]), mix.base)
    if layers == 80 and grouped > 1 and part == "attn_v" and kind in ("q3_k", "q4_k") and not little:
        return "q5_k"
    return kind


def _grouped(config: PreTrainedConfig) -> int:
    """Heads for each of keys and values."""
    heads = int(config.num_attention_heads)
    return heads // int(getattr(config, "num_key_value_heads", None) or heads)
