"""llama.cpp's file: one GGUF with the model's settings, its tokenizer and all tensors, quantized linears as blocks of our codes.

Codes and scales go into blocks as they are (`gguf_blocks`), so a reader's weights are bit for bit ours. What changes on the way:

    q, k of Llama and Mistral   rows of a head (halves of its rotary pairs one after the other) become pairs side by side:
                                new row 2 i + s of a head is its old row i + s head_dim / 2. Rows are packed by themselves, so packed
                                rows are moved; biases likewise
    norms of Gemma              1 + w is stored
    norms, biases               float32
    embedding, head and linears that are not quantized    `dense`, float16 by default; float32 where float16 would overflow
    tied embedding              once, as `token_embd.weight`: a reader without `output.weight` takes that

float16 holds bfloat16 exactly down to 6e-5, and everything to 2^-11 of its size: far below what quantized weights change.

Settings are Transformers' own reading of config.json, its defaults included. What llama.cpp fixes in its code and metadata cannot change
(activations, the order of windowed layers, scales of attention) must be what the model has, or the model is refused. Mistral's and Qwen's
sliding windows do not exist in llama.cpp: the context is cut to the window, within which nothing differs.

The tokenizer is the one that Transformers makes of the directory, so that it is the one of our reports. SentencePiece's is known by its
byte tokens: llama.cpp merges the pair whose token has the highest score, so scores are the negative ranks of merges, and any token
that two tokens make up must have a merge. A byte-level one is known by how it splits text into words, for which llama.cpp has names.

Cost: the dense tensors are read twice, since their shapes precede all data; one tensor at a time is in memory.

Not done: mixtures of experts, other architectures, vision parts (left out), normalization of text to NFC (llama.cpp has none), splitting
into several files, activations in fewer bits (llama.cpp makes them itself).
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, LlamaFileType, TokenType
from jaxtyping import Int
from tokenizers import Tokenizer
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from roundel.errors import ModelError, SchemeError
from roundel.formats.gguf_blocks import PACKERS
from roundel.formats.imatrix import architecture, tensor_names
from roundel.grids import Grid
from roundel.types import RoundedWeight

__all__ = ["Dense", "check", "check_architecture", "check_tokenizer", "read", "write"]

Dense = Literal["f32", "f16", "bf16", "q8_0"]
"""How matrices that are not quantized are stored; `q8_0` rounds them to the nearest, in blocks of 32."""


@dataclass(frozen=True, kw_only=True)
class _Family:
    """What llama.cpp does with the models of a Transformers type, whatever the metadata say."""

    activation: str = "silu"
    permuted: bool = False
    """Whether rotary pairs are neighbours, in q and k."""
    norm_offset: int = 0
    biases: bool = False
    """Whether linears may have biases beyond those that the type always has."""
    window_period: int | None = None
    """Every how many layers one sees the whole context; None: there are no windows."""
    wide_layers: int | None = None
    """The number of layers of that model which scales attention by the width of a head as `hidden_size / heads`, not by `head_dim`."""


_GELU = "gelu_pytorch_tanh"
_FAMILIES = {
    "llama": _Family(permuted=True, biases=True),
    "mistral": _Family(permuted=True),
    "qwen2": _Family(),
    "qwen3": _Family(),
    "gemma": _Family(activation=_GELU, norm_offset=1),
    "gemma2": _Family(activation=_GELU, norm_offset=1, window_period=2, wide_layers=46),
    "gemma3_text": _Family(activation=_GELU, norm_offset=1, window_period=6, wide_layers=62),
}
"""By Transformers' model type."""

_WRAPPERS = ("gemma3",)
"""Model types with pictures around a language model of these families."""

_FILE_TYPES = {
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
    "q4_0": LlamaFileType.MOSTLY_Q4_0,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
    "iq4_nl": LlamaFileType.MOSTLY_IQ4_NL,
    "mxfp4": LlamaFileType.MOSTLY_MXFP4_MOE,
    "q2_k": LlamaFileType.MOSTLY_Q2_K,
    "q3_k": LlamaFileType.MOSTLY_Q3_K_S,
    "q4_k": LlamaFileType.MOSTLY_Q4_K_S,
    "q5_k": LlamaFileType.MOSTLY_Q5_K_S,
    "q6_k": LlamaFileType.MOSTLY_Q6_K,
}
"""What a file is called in which most quantized weights are of a type."""


def check(grid: Grid, rotation: str | None) -> None:
    """Refuses what no tensor of a GGUF can be.

    Raises:
        SchemeError: the grid is no block type of llama.cpp, or weights are rotated; with the nearest choice that works.
    """
    nearest = grid.name if grid.name in PACKERS else "q8_0" if grid.bits > 7 else f"q{min(max(round(grid.bits), 2), 6)}_k"
    if grid.name not in PACKERS:
        raise SchemeError(f"{grid.name}: a GGUF holds llama.cpp's block types only, {', '.join(PACKERS)}; try {nearest}")
    if rotation is not None:
        raise SchemeError(f"{grid.name}, rotated by {rotation}: llama.cpp undoes no rotation; try {nearest} without one")


def check_architecture(config: Mapping[str, Any]) -> None:
    """Refuses a model, by its config.json, that llama.cpp would run differently, or not at all.

    Raises:
        ModelError: with the reason, or the list of what is supported.
    """
    _language_config(config)


def check_tokenizer(model: Path) -> None:
    """Refuses a model directory whose tokenizer llama.cpp has no counterpart for.

    Raises:
        ModelError: with the reason.
    """
    _vocabulary(_backend(_tokenizer(model)).to_str(), None)


def write(
    path: Path,
    *,
    model: Path,
    tensors: Iterable[str],
    read: Callable[[str], Tensor],
    rounded: Mapping[str, RoundedWeight],
    name: str,
    config: Mapping[str, Any] | None = None,
    dense: Dense = "f16",
    advance: Callable[[int], None] = lambda _n: None,
) -> None:
    """Writes the file.

    Args:
        path: Where to; what is there is overwritten.
        model: The original's directory: config.json and the tokenizer.
        tensors: Names of all tensors of the original.
        read: One of them; called twice for each that is not quantized, and for no other.
        rounded: The quantized linears by module name; each is asked for twice.
        name: The model's name in the metadata.
        config: What takes the place of the directory's config.json.
        dense: Type of all other matrices.
        advance: Called with 1 after each tensor.

    Raises:
        ModelError: as `check_architecture` and `check_tokenizer`, or a tensor has no name in llama.cpp.
        SchemeError: as `check`.
    """
    config = json.loads((model / "config.json").read_text(encoding="utf-8")) if config is None else config
    settings = _language_config(config)
    plan = _plan(settings, tensors, read, rounded, dense)
    tokenizer = _tokenizer(model)
    rows = next(entry.shape[0] for entry in plan if entry.name == "token_embd.weight")
    weights: Counter[str] = Counter()
    for entry in plan:
        if entry.rounded:
            weights[entry.kind.name.lower()] += math.prod(entry.shape)

    writer = gguf.GGUFWriter(path, architecture(settings.model_type))
    writer.add_type("model")
    writer.add_name(name)
    writer.add_quantized_by("Roundel")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(_FILE_TYPES[max(weights, key=lambda scheme: weights[scheme]) if weights else dense])
    _add_settings(writer, settings, rows)
    _add_tokenizer(writer, tokenizer, _vocabulary(_backend(tokenizer).to_str(), rows), settings, model)
    for entry in plan:
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), entry.bytes, raw_dtype=entry.kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in plan:
            writer.write_tensor_data(entry.make())
            advance(1)
    finally:
        writer.close()


def read(path: Path, *, config: Mapping[str, Any], tensors: Iterable[str]) -> dict[str, Tensor]:
    """The tensors of a file that `write` has made, dense, in float32, under the names that they had; a tied head is left out.

    Args:
        path: The file.
        config: The original's config.json.
        tensors: Names of all tensors of the original.

    Raises:
        ModelError: a tensor is missing, or the file is damaged.
    """
    settings = _language_config(config)
    family = _FAMILIES[settings.model_type]
    tied = "lm_head.weight" if settings.tie_word_embeddings else None
    stored = [each for each in tensors if not _LEFT_OUT.search(each) and each != tied]
    names = _names(architecture(settings.model_type), {each.rpartition(".")[0] for each in stored})
    try:
        found = {each.name: each for each in gguf.GGUFReader(path).tensors}
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    result = {}
    for source in stored:
        module, _, last = source.rpartition(".")
        target = names[module].removesuffix("weight") + last
        if target not in found:
            raise ModelError(f"{path} lacks {target}")
        values = torch.from_numpy(np.array(gguf.dequantize(found[target].data, found[target].tensor_type), dtype=np.float32))
        if target.endswith("norm.weight"):
            values = values - family.norm_offset
        order = _order(settings, family, len(values), target)
        result[source] = torch.empty_like(values).index_copy_(0, order, values)
    return result


# What the model is.


def _language_config(config: Mapping[str, Any]) -> PreTrainedConfig:
    """Transformers' reading of the language model's settings, checked."""
    outer = str(config.get("model_type"))
    settings = config["text_config"] if outer in _WRAPPERS and "text_config" in config else config
    model_type = str(settings.get("model_type", outer)) if outer in (*_FAMILIES, *_WRAPPERS) else outer
    if model_type not in _FAMILIES:
        raise ModelError(
            f"model type {model_type!r}: as GGUF Roundel writes {', '.join(_FAMILIES)}; for others, write another format, or use "
            "`roundel imatrix` with llama.cpp's own converter and llama-quantize"
        )
    try:
        read = CONFIG_MAPPING[model_type].from_dict(deepcopy(dict(settings)))
    except Exception as error:  # Transformers raises a dozen types for settings that contradict each other
        raise ModelError(f"config.json of a {model_type} model cannot be read: {error}") from error
    reasons = list(_differences(read, _FAMILIES[model_type]))
    if reasons:
        raise ModelError(f"llama.cpp would not run this {model_type} model as it is: {'; '.join(reasons)}; write another format")
    return read


def _differences(config: PreTrainedConfig, family: _Family) -> Iterator[str]:
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
    for kind, rope in _ropes(config).items():
        allowed = {"linear", "default"} if kind == "full_attention" else {"default"} if kind else {"default", "linear", "yarn"}
        allowed |= {"llama3"} if family.permuted else set()
        if rope["rope_type"] not in allowed:
            yield f"its rotary embedding is {rope['rope_type']}, and here llama.cpp has {', '.join(sorted(allowed))}"
        usual = {"beta_fast": 32, "beta_slow": 1, "truncate": True, "partial_rotary_factor": 1.0}
        others = {"attention_factor", "mscale", "mscale_all_dim"} | usual.keys()
        for name in sorted(others & rope.keys()):
            if rope[name] not in (None, usual.get(name)):
                yield f"its rotary embedding has {name} {rope[name]}"
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


def _ropes(config: PreTrainedConfig) -> dict[str, dict[str, Any]]:
    """Rotary settings by kind of layer, `""` where all are alike."""
    found: dict[str, Any] = config.rope_parameters
    return {kind: dict(each) for kind, each in found.items()} if "full_attention" in found else {"": dict(found)}


def _window(config: PreTrainedConfig) -> int | None:
    """How many tokens a layer sees that does not see all."""
    if "sliding_attention" not in (getattr(config, "layer_types", None) or ["sliding_attention"]):
        return None
    window: int | None = getattr(config, "sliding_window", None)
    return window


def _head_dim(config: PreTrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _add_settings(writer: gguf.GGUFWriter, config: PreTrainedConfig, rows: int) -> None:
    family, ropes = _FAMILIES[config.model_type], _ropes(config)
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
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_rope_dimension_count(_head_dim(config))
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
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


# Its tensors.


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """One tensor of the file, made when its turn comes."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray[Any, Any]]
    rounded: bool = False

    @property
    def bytes(self) -> int:
        block, size = gguf.GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // block * size


_LEFT_OUT = re.compile(r"(^|\.)(vision_tower|multi_modal_projector)\.|\.rotary_emb\.inv_freq$")
"""Tensors that the language model needs not: of pictures, or computed from its settings."""


def _plan(
    config: PreTrainedConfig, tensors: Iterable[str], read: Callable[[str], Tensor], rounded: Mapping[str, RoundedWeight], dense: Dense
) -> list[_Entry]:
    """All tensors in the order in which a model uses them."""
    family, arch = _FAMILIES[config.model_type], architecture(config.model_type)
    stored = [each for each in tensors if not _LEFT_OUT.search(each)]
    names = _names(arch, {each.rpartition(".")[0] for each in stored} | set(rounded))
    quantized = {names[module]: module for module in rounded}
    entries = []
    for target, module in quantized.items():
        weight = rounded[module]
        if weight.scheme not in PACKERS or weight.rotation is not None:
            raise SchemeError(f"{module}: {weight.scheme}{', rotated,' * (weight.rotation is not None)} is no block type of llama.cpp")

        def packed(target: str = target, module: str = module) -> np.ndarray[Any, Any]:
            weight = rounded[module]
            rows = PACKERS[weight.scheme](weight.codes, weight.scales)
            return rows[_order(config, family, len(rows), target)].cpu().numpy()

        kind = GGMLQuantizationType[weight.scheme.upper()]
        entries.append(_Entry(name=target, kind=kind, shape=weight.shape, make=packed, rounded=True))

    tied = bool(config.tie_word_embeddings)
    for source in stored:
        module, _, last = source.rpartition(".")
        target = names[module].removesuffix("weight") + last
        if target in quantized or (tied and target == "output.weight"):
            continue
        values = read(source)
        kind = _dense_kind(values, dense)

        def plain(target: str = target, source: str = source, kind: GGMLQuantizationType = kind) -> np.ndarray[Any, Any]:
            values = read(source)
            values = values[_order(config, family, len(values), target)]
            return _stored(values.float() + family.norm_offset if target.endswith("norm.weight") else values, kind)

        entries.append(_Entry(name=target, kind=kind, shape=tuple(values.shape), make=plain))
    factors = _frequency_factors(config)
    if factors is not None:
        entries.append(_Entry(name="rope_freqs.weight", kind=GGMLQuantizationType.F32, shape=tuple(factors.shape), make=factors.numpy))
    missing = {"token_embd.weight", "output_norm.weight", *(() if tied else ("output.weight",))} - {entry.name for entry in entries}
    if missing:
        raise ModelError(f"the original has no tensor that becomes {sorted(missing)[0]}: its directory lacks a part of the model")
    return sorted(entries, key=lambda entry: _position(entry.name))


def _names(arch: str, modules: Iterable[str]) -> dict[str, str]:
    """The GGUF names of all modules' weights; those of a model without head may lack the leading `model.`"""
    modules = sorted(modules)
    found = tensor_names(arch, modules)
    longer = tensor_names(arch, [f"model.{module}" for module in modules if module not in found])
    found |= {module.removeprefix("model."): name for module, name in longer.items()}
    unknown = [module for module in modules if module not in found]
    if unknown:
        raise ModelError(
            f"{unknown[0]}: llama.cpp has no tensor of that name in its {arch} models, and leaving it out would change the model"
        )
    return found


def _position(name: str) -> tuple[int, str]:
    block = re.match(r"blk\.(\d+)\.", name)
    return (int(block[1]) if block else 1_000_000 if name.startswith("output") else -1, name)


def _order(config: PreTrainedConfig, family: _Family, rows: int, name: str) -> Int[Tensor, " rows"]:
    """Where the rows of a tensor come from."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads} if family.permuted else {}
    part = name.split(".")[-2]
    return _pairs_side_by_side(rows, heads[part]) if part in heads else torch.arange(rows)


def _pairs_side_by_side(rows: int, heads: int) -> Int[Tensor, " rows"]:
    """Where the rows of q or k come from."""
    return torch.arange(rows).reshape(heads, 2, -1).transpose(1, 2).flatten()


def _dense_kind(values: Tensor, dense: Dense) -> GGMLQuantizationType:
    if values.ndim < 2:
        return GGMLQuantizationType.F32
    kind = GGMLQuantizationType["F16" if dense == "q8_0" and values.shape[-1] % 32 else dense.upper()]
    overflows = kind is GGMLQuantizationType.F16 and values.abs().max() > torch.finfo(torch.float16).max
    return GGMLQuantizationType.F32 if overflows else kind


def _stored(values: Tensor, kind: GGMLQuantizationType) -> np.ndarray[Any, Any]:
    match kind:
        case GGMLQuantizationType.F16:
            return values.to(torch.float16).cpu().numpy()
        case GGMLQuantizationType.BF16:
            return values.to(torch.bfloat16).cpu().contiguous().view(torch.int16).numpy()
        case _:
            return gguf.quantize(values.float().cpu().numpy(), kind)


def _frequency_factors(config: PreTrainedConfig) -> Tensor | None:
    """What Llama 3.1 divides the rotary frequencies by, half of `head_dim` float32 numbers."""
    rope = _ropes(config).get("", {})
    if rope.get("rope_type") != "llama3":
        return None
    scaled = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0]
    plain = 1 / rope["rope_theta"] ** (torch.arange(0, _head_dim(config), 2, dtype=torch.float64) / _head_dim(config))
    factors: Tensor = (plain / scaled.double()).float()
    return factors


# Its tokenizer.


@dataclass(frozen=True, kw_only=True)
class _Vocabulary:
    """What `tokenizer.ggml.*` says of tokens and merges; one entry for each row of the embedding."""

    kind: Literal["llama", "gpt2"]
    """SentencePiece with scores, or byte-level with merges."""
    pre: str
    """How text is split into words."""
    tokens: Sequence[str]
    types: Sequence[TokenType]
    scores: Sequence[float] = field(default=())
    merges: Sequence[str] = field(default=())


_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLIT_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE: dict[tuple[str, ...], tuple[str, bool]] = {
    ("words",): ("gpt-2", False),
    ("digits", "words"): ("smollm", False),
    (_SPLIT.format(digits=""), "bytes"): ("qwen2", False),
    (_SPLIT.format(digits="{1,3}"), "bytes"): ("llama-bpe", True),
    (_SPLIT_TEKKEN, "bytes"): ("tekken", True),
}
"""llama.cpp's name of a way to split text, and whether it takes a word that is a token as that token without a look at the merges."""


def _tokenizer(model: Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # as for configurations
        raise ModelError(f"the tokenizer in {model} cannot be read: {str(error).strip().splitlines()[0]}") from error
    return tokenizer


def _backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ModelError(f"a {type(tokenizer).__name__} has no tokenizer.json that could be written as GGUF; write another format")
    return backend


def _vocabulary(text: str, rows: int | None) -> _Vocabulary:
    """From a tokenizer.json, for an embedding of so many rows (None: as many as there are tokens)."""
    settings = json.loads(text)
    model = settings["model"]
    if model["type"] != "BPE":
        raise ModelError(f"its tokenizer is a {model['type']} one, and llama.cpp's for these models is BPE; write another format")
    added = {each["id"]: each for each in settings["added_tokens"]}
    known = {number: token for token, number in model["vocab"].items()} | {number: each["content"] for number, each in added.items()}
    rows = max(known) + 1 if rows is None else rows
    if max(model["vocab"].values()) >= rows:
        raise ModelError(f"its tokenizer has {max(model['vocab'].values()) + 1} tokens, and its embedding only {rows} rows")
    unknown = model.get("unk_token")
    spaced = model.get("byte_fallback", False)
    tokens, types = [], []
    for number in range(rows):
        token = known.get(number, f"[PAD{number}]")
        if number not in known:
            kind = TokenType.UNUSED
        elif token == unknown:
            kind = TokenType.UNKNOWN
        elif number in added:
            kind = TokenType.CONTROL if added[number]["special"] else TokenType.USER_DEFINED
        elif spaced and re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            kind = TokenType.BYTE
        else:
            kind = TokenType.NORMAL
        # tokens that users add are looked for before spaces become U+2581
        tokens.append(token.replace("▁", " ") if kind is TokenType.USER_DEFINED and spaced else token)
        types.append(kind)
    merges = [tuple(each) if isinstance(each, list) else tuple(each.split(" ")) for each in model["merges"]]
    if spaced:
        scores = _scores(model["vocab"], merges, {each["content"] for each in added.values()})
        by_row = [scores.get(token, 0.0) for token in tokens]
        return _Vocabulary(kind="llama", pre="default", tokens=tokens, types=types, scores=by_row)
    _check_normalizer(settings["normalizer"])
    return _Vocabulary(kind="gpt2", pre=_pre(text, settings), tokens=tokens, types=types, merges=[" ".join(each) for each in merges])


def _scores(vocabulary: Mapping[str, int], merges: Sequence[tuple[str, ...]], added: set[str]) -> dict[str, float]:
    """Of the tokens that merges make: minus the rank of the first such merge."""
    ranks: dict[str, float] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, -float(rank))
    listed = set(merges)
    for token in vocabulary.keys() - added:
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            both = all(part in vocabulary and part not in added for part in (left, right))
            if both and (left, right) not in listed and not re.fullmatch(r"<0x[0-9A-F]{2}>", token):
                raise ModelError(
                    f"its tokenizer never makes {token!r} of {left!r} and {right!r}, and llama.cpp would: a BPE with byte tokens must have "
                    "a merge for every pair of tokens that is a token, as SentencePiece's have; write another format"
                )
    return ranks


def _check_normalizer(normalizer: Mapping[str, Any] | None) -> None:
    steps = [] if normalizer is None else normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
    for step in steps:
        if step["type"] != "NFC":
            raise ModelError(f"its tokenizer normalizes text by {step['type']}, which llama.cpp does not; write another format")


def _pre(text: str, settings: Mapping[str, Any]) -> str:
    """llama.cpp's name for how a byte-level tokenizer splits text."""
    steps = tuple(_steps(settings["pre_tokenizer"]))
    if steps not in _PRE:
        names = ", ".join(name for name, _ in _PRE.values())
        raise ModelError(f"its tokenizer splits text by {' then '.join(steps)}: none of those that Roundel knows in llama.cpp ({names})")
    name, whole_words = _PRE[steps]
    if bool(settings["model"].get("ignore_merges")) != whole_words:
        by_merges = Tokenizer.from_str(json.dumps({**settings, "model": {**settings["model"], "ignore_merges": False}})).model
        added = {each["content"] for each in settings["added_tokens"]}
        for token in settings["model"]["vocab"].keys() - added:
            if len(by_merges.tokenize(token)) > 1:
                raise ModelError(f"its tokenizer and llama.cpp's {name} differ in how they treat {token!r}, which no merges lead to")
    return name


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> Iterator[str]:
    match pre_tokenizer:
        case {"type": "Sequence", "pretokenizers": steps}:
            for step in steps:
                yield from _steps(step)
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
            yield pattern
        case {"type": "Digits", "individual_digits": True}:
            yield "digits"
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": words}:
            yield "words" if words else "bytes"
        case other:
            yield json.dumps(other)


def _add_tokenizer(
    writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, vocabulary: _Vocabulary, config: PreTrainedConfig, model: Path
) -> None:
    writer.add_tokenizer_model(vocabulary.kind)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_scores(vocabulary.scores)
    writer.add_token_merges(vocabulary.merges)

    ends = _end_ids(config, model)
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else next(iter(ends), None)
    start = next((each for each in (tokenizer.bos_token_id, config.bos_token_id, end) if each is not None), None)
    turn = next((each for each in ends if each != end), None)
    add = (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_eot_token_id, writer.add_unk_token_id, writer.add_pad_token_id)
    for add_id, number in zip(add, (start, end, turn, tokenizer.unk_token_id, tokenizer.pad_token_id), strict=True):
        if number is not None and number < len(vocabulary.tokens):
            add_id(number)

    backend = _backend(tokenizer)
    alone, whole = (backend.encode("a", add_special_tokens=special) for special in (False, True))
    writer.add_add_bos_token(bool(start is not None and whole.ids[:1] == [start] != alone.ids[:1]))
    writer.add_add_eos_token(bool(end is not None and whole.ids[-1:] == [end] != alone.ids[-1:]))
    writer.add_add_space_prefix(vocabulary.kind == "llama" and alone.tokens[0].startswith("▁"))
    template = tokenizer.chat_template
    if template is not None:
        named = template if isinstance(template, str) else [{"name": key, "template": value} for key, value in template.items()]
        writer.add_chat_template(named)


def _end_ids(config: PreTrainedConfig, model: Path) -> list[int]:
    """Tokens that end a text or a turn, by generation_config.json, else config.json."""
    path = model / "generation_config.json"
    found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    found = config.eos_token_id if found is None else found
    return [] if found is None else found if isinstance(found, list) else [found]
