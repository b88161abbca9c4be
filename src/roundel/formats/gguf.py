"""llama.cpp's file: one GGUF with the model's settings, its tokenizer and all tensors, quantized linears as blocks of our codes.

Codes and scales go into blocks as they are (`gguf_blocks`), so a reader's weights are bit for bit ours. What changes on the way:

    q, k of Llama's families    rows of a head (halves of its rotary pairs one after the other) become pairs side by side:
                                new row 2 i + s of a head is its old row i + s head_dim / 2. Rows are packed by themselves, so packed
                                rows are moved; biases likewise
    norms of Gemma, Qwen3.5     1 + w is stored
    linear attention            heads of values in another order (`order_of_rows`, `order_of_columns`), `-exp` of `A_log`
    q, k, v of GPT-NeoX         all heads' q, then k, then v, not head by head
    norms, biases               float32
    embedding, head             blocks too, where they are rounded
    what is not quantized       `dense`, float16 by default; float32 where float16 would overflow
    tied embedding              once, as `token_embd.weight`: a reader without `output.weight` takes that
    experts                     those of a layer are one tensor `(experts, d_out, d_in)` of one type
    the router of experts       float32

float16 holds bfloat16 exactly down to 6e-5, and everything to 2^-11 of its size: far below what quantized weights change.

`gguf_families` has the types of models; settings are written by `gguf_settings`, the tokenizer by `gguf_tokenizer`.

Cost: the dense tensors are read twice, since their shapes precede all data; one tensor at a time is in memory.

Not done: other architectures, vision parts and multi-token prediction (left out), normalization of text to NFC (llama.cpp has none),
splitting into several files, activations in fewer bits (llama.cpp makes them itself).
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, LlamaFileType
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from roundel.errors import ModelError, SchemeError, damaged
from roundel.formats.gguf_blocks import PACKERS
from roundel.formats.gguf_families import FAMILIES
from roundel.formats.gguf_mixes import mix_types
from roundel.formats.gguf_settings import add_settings, architecture_of, head_dim_in, head_dim_of, language_config, ropes_of
from roundel.formats.gguf_tensors import (
    ALWAYS_FLOAT,
    EXPERT,
    LEFT_OUT,
    Counterparts,
    as_in_file,
    decoded,
    halves_apart,
    halves_together,
    names_of,
    packed_in_order,
    parts_of,
    stored_values,
    targets_of,
    tensors_of,
    unbroken,
)
from roundel.formats.gguf_tokenizer import add_tokenizer, backend_of, open_tokenizer, vocabulary_of
from roundel.grids import Grid
from roundel.types import RoundedWeight

__all__ = [
    "LEFT_OUT",
    "Dense",
    "check",
    "check_linears",
    "check_model",
    "check_tokenizer",
    "mixed",
    "read",
    "size",
    "unbroken",
    "usual_end",
    "write",
]

Dense = Literal["f32", "f16", "bf16", "q8_0"]
"""How matrices that are not quantized are stored; `q8_0` rounds them to the nearest, in blocks of 32."""


_FILE_TYPES = {
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
    "q4_0": LlamaFileType.MOSTLY_Q4_0,
    "q5_0": LlamaFileType.MOSTLY_Q5_0,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
    "iq4_xs": LlamaFileType.MOSTLY_IQ4_XS,
    "iq4_nl": LlamaFileType.MOSTLY_IQ4_NL,
    "mxfp4": LlamaFileType.MOSTLY_MXFP4_MOE,
    "q2_k": LlamaFileType.MOSTLY_Q2_K,
    "q3_k": LlamaFileType.MOSTLY_Q3_K_S,
    "q4_k": LlamaFileType.MOSTLY_Q4_K_S,
    "q5_k": LlamaFileType.MOSTLY_Q5_K_S,
    "q6_k": LlamaFileType.MOSTLY_Q6_K,
    "iq2_xxs": LlamaFileType.MOSTLY_IQ2_XXS,
    "iq2_xs": LlamaFileType.MOSTLY_IQ2_XS,
    "iq2_s": LlamaFileType.MOSTLY_IQ2_S,
    "iq3_xxs": LlamaFileType.MOSTLY_IQ3_XXS,
    "iq3_s": LlamaFileType.MOSTLY_IQ3_S,
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


def usual_end(role: str, scheme: str) -> str:
    """The type that llama.cpp gives to an embedding or an output head beside linears of a type: that, and five or six bits for heads.

    For `iq2_s` and the types of three bits it takes `iq3_s` for embeddings; here `q3_k`, which is fitted faster, in as many bytes.
    """
    if scheme in ("q8_0", "mxfp4"):
        return "q8_0"
    codebook = scheme.startswith(("iq2", "iq3"))
    if role == "head":
        return "q5_k" if codebook and scheme != "iq3_s" else "q6_k"
    return scheme if not codebook else "q2_k" if scheme in ("iq2_xxs", "iq2_xs") else "q3_k"


def mixed(mix: str, config: Mapping[str, Any], linears: Iterable[str]) -> dict[str, str]:
    """The type of each linear in one of llama.cpp's mixes."""
    settings = language_config(config)
    first = {name: parts_of(name)[0] for name in linears}
    named = names_of(settings, first.values())
    return mix_types(mix, {name: named[part] for name, part in first.items()}, settings)


def check_model(model: Path, config: Mapping[str, Any], tensors: Iterable[str]) -> None:
    """Refuses a model that llama.cpp would run differently, or not at all, by its settings, the names of its tensors and its tokenizer.

    Raises:
        ModelError: with the reason, or the list of what is supported.
    """
    settings = language_config(config)
    targets_of(settings, tensors)
    check_tokenizer(model)


def check_tokenizer(model: Path) -> None:
    """Refuses a model directory whose tokenizer llama.cpp has no counterpart for.

    Raises:
        ModelError: with the reason.
    """
    vocabulary_of(backend_of(open_tokenizer(model)).to_str(), None)


def check_linears(chosen: Mapping[str, str], others: Iterable[str]) -> None:
    """Refuses what would leave the experts of a layer in more than one type.

    Args:
        chosen: Schemes of the linears that are quantized, by name; of those that may get any of several, all of them.
        others: The linears that stay.

    Raises:
        SchemeError: with what would work.
    """
    stacks: dict[str, set[str]] = {}
    for name, scheme in {**chosen, **dict.fromkeys(others, "16 bits")}.items():
        if EXPERT.search(name):
            stacks.setdefault(EXPERT.sub(".experts.", name), set()).add(scheme)
    for name, schemes in stacks.items():
        if len(schemes) > 1:
            raise SchemeError(
                f"{name}: a GGUF holds the matrices of all experts of a layer in one tensor of one type, and here are "
                f"{', '.join(sorted(schemes))}; give all of them one scheme (no pattern that parts them), or another format"
            )


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
        ModelError: as `check_model`.
        SchemeError: as `check` and `check_linears`.
    """
    writer, plan = _prepared(path, model=model, tensors=tensors, read=read, rounded=rounded, name=name, config=config, dense=dense)
    try:
        _write_head(writer)
        for entry in plan:
            writer.write_tensor_data(entry.make())
            advance(1)
    finally:
        writer.close()


def size(
    *,
    model: Path,
    tensors: Iterable[str],
    read: Callable[[str], Tensor],
    rounded: Mapping[str, RoundedWeight],
    name: str,
    config: Mapping[str, Any] | None = None,
    dense: Dense = "f16",
) -> int:
    """Bytes of the file that `write` would make of the same; of rounded weights only schemes and shapes are looked at."""
    with tempfile.TemporaryDirectory(prefix="roundel-") as scratch:
        path = Path(scratch) / "head"
        writer, plan = _prepared(path, model=model, tensors=tensors, read=read, rounded=rounded, name=name, config=config, dense=dense)
        try:
            _write_head(writer)
        finally:
            writer.close()
        parts = [path.stat().st_size, *(entry.bytes for entry in plan)]
        return sum(-(-part // writer.data_alignment) * writer.data_alignment for part in parts)


def _write_head(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def _prepared(
    path: Path,
    *,
    model: Path,
    tensors: Iterable[str],
    read: Callable[[str], Tensor],
    rounded: Mapping[str, RoundedWeight],
    name: str,
    config: Mapping[str, Any] | None,
    dense: Dense,
) -> tuple[gguf.GGUFWriter, list[_Entry]]:
    """A writer that knows all but the tensors' data, and these."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8")) if config is None else config
    settings = language_config(config)
    plan = _plan(settings, tensors, read, rounded, dense)
    tokenizer = open_tokenizer(model)
    rows = next(entry.shape[0] for entry in plan if entry.name == "token_embd.weight")
    weights: Counter[str] = Counter()
    for entry in plan:
        if entry.rounded:
            weights[entry.kind.name.lower()] += math.prod(entry.shape)
    writer = gguf.GGUFWriter(path, architecture_of(settings))
    writer.add_type("model")
    writer.add_name(name)
    writer.add_quantized_by("Roundel")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(_FILE_TYPES[max(weights, key=lambda scheme: weights[scheme]) if weights else dense])
    add_settings(writer, settings, rows)
    add_tokenizer(writer, tokenizer, vocabulary_of(backend_of(tokenizer).to_str(), rows), settings, model)
    for entry in plan:
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), entry.bytes, raw_dtype=entry.kind)
    return writer, plan


def read(path: Path, *, config: Mapping[str, Any], tensors: Iterable[str]) -> dict[str, Tensor]:
    """The tensors of a file that `write` has made, dense, in float32, under the names that they had; a tied head is left out.

    Args:
        path: The file.
        config: The original's config.json.
        tensors: Names of all tensors of the original.

    Raises:
        ModelError: a tensor is missing, or the file is damaged.
    """
    with damaged(ModelError, path):
        return _read(path, config, tensors)


def _read(path: Path, config: Mapping[str, Any], tensors: Iterable[str]) -> dict[str, Tensor]:
    counterparts, found = Counterparts(config, tensors), tensors_of(path)
    result = {}
    for source, target in counterparts.names.items():
        if target not in found:
            raise ModelError(f"{path} lacks {target}")
        result[source] = counterparts.restored(target, decoded(found[target], source))
    return halves_together(result)


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


def _plan(
    config: PreTrainedConfig, tensors: Iterable[str], read: Callable[[str], Tensor], rounded: Mapping[str, RoundedWeight], dense: Dense
) -> list[_Entry]:
    """All tensors in the order in which a model uses them."""
    shares = {part: (module, own.index(part), len(own)) for module in rounded for own in [parts_of(module)] for part in own}
    names = names_of(config, shares)
    quantized = _stacked({part: names[part] for part in shares})
    entries = []
    for target, parts in quantized.items():
        modules = [shares[part][0] for part in parts]
        first, count = rounded[modules[0]], shares[parts[0]][2]
        for module in modules:
            scheme, rotation = rounded[module].scheme, rounded[module].rotation
            if scheme not in PACKERS or rotation is not None:
                raise SchemeError(f"{module}: {scheme}{', rotated,' * (rotation is not None)} is no block type of llama.cpp")

        def packed(target: str = target, parts: list[str] = parts) -> np.ndarray[Any, Any]:
            rows = []
            for module, share, count in map(shares.__getitem__, parts):
                weight = rounded[module]
                own = PACKERS[weight.scheme](weight.codes, weight.scales).chunk(count)[share]
                kind = GGMLQuantizationType[weight.scheme.upper()]
                rows.append(packed_in_order(config, target, own, weight.shape[1], kind).cpu().numpy())
            return np.stack(rows) if EXPERT.search(parts[0]) else rows[0]

        shape: tuple[int, ...] = (first.shape[0] // count, first.shape[1])
        shape = (len(parts), *shape) if EXPERT.search(parts[0]) else shape
        entries.append(_Entry(name=target, kind=GGMLQuantizationType[first.scheme.upper()], shape=shape, make=packed, rounded=True))
    check_linears({module: weight.scheme for module, weight in rounded.items()}, ())

    tied = bool(config.tie_word_embeddings)
    read = halves_apart(read)
    for target, sources in _stacked(targets_of(config, tensors)).items():
        if target in quantized or (tied and target == "output.weight"):
            continue
        values = as_in_file(config, target, read(sources[0]))
        kind = GGMLQuantizationType.F32 if ALWAYS_FLOAT.search(target) else _dense_kind(values, dense)

        def plain(target: str = target, sources: list[str] = sources, kind: GGMLQuantizationType = kind) -> np.ndarray[Any, Any]:
            own = [as_in_file(config, target, read(source)) for source in sources]
            return stored_values(torch.stack(own) if EXPERT.search(sources[0]) else own[0], kind)

        shape = (len(sources), *values.shape) if EXPERT.search(sources[0]) else tuple(values.shape)
        entries.append(_Entry(name=target, kind=kind, shape=shape, make=plain))
    for target, factors in _frequency_factors(config).items():
        entries.append(_Entry(name=f"{target}.weight", kind=GGMLQuantizationType.F32, shape=tuple(factors.shape), make=factors.numpy))
    needed = {"token_embd.weight": True, "output_norm.weight": FAMILIES[config.model_type].last_norm, "output.weight": not tied}
    missing = {name for name, is_needed in needed.items() if is_needed} - {entry.name for entry in entries}
    if missing:
        raise ModelError(f"the original has no tensor that becomes {sorted(missing)[0]}: its directory lacks a part of the model")
    return sorted(entries, key=lambda entry: _position(entry.name))


def _stacked(names: Mapping[str, str]) -> dict[str, list[str]]:
    """What becomes each tensor of the file, experts by their numbers."""
    found: dict[str, list[str]] = {}
    for name, target in names.items():
        found.setdefault(target, []).append(name)
    return {target: sorted(own, key=lambda name: int((EXPERT.search(name) or [0, 0])[1])) for target, own in found.items()}


def _position(name: str) -> tuple[int, str]:
    block = re.match(r"blk\.(\d+)\.", name)
    return (int(block[1]) if block else 1_000_000 if name.startswith("output") else -1, name)


def _dense_kind(values: Tensor, dense: Dense) -> GGMLQuantizationType:
    if values.ndim < 2:
        return GGMLQuantizationType.F32
    kind = GGMLQuantizationType["F16" if dense == "q8_0" and values.shape[-1] % 32 else dense.upper()]
    overflows = kind is GGMLQuantizationType.F16 and values.abs().max() > torch.finfo(torch.float16).max
    return GGMLQuantizationType.F32 if overflows else kind


NEVER = 1e30
"""What a frequency is divided by of columns that no position turns."""


def _frequency_factors(config: PreTrainedConfig) -> dict[str, Tensor]:
    """What Llama 3.1, long Phi-3 and Gemma 4 divide rotary frequencies by, one float32 number for each pair, by the names of tensors."""
    ropes = ropes_of(config)
    if not ropes:
        return {}
    rope = ropes.get("") or ropes["full_attention"]
    if rope["rope_type"] == "proportional":
        half = head_dim_in(config, "full_attention") // 2
        turned = int(rope.get("partial_rotary_factor", 1.0) * half)
        return {"rope_freqs": torch.cat([torch.ones(turned), torch.full((half - turned,), NEVER)]) * rope.get("factor", 1.0)}
    if rope["rope_type"] == "longrope":
        return {f"rope_factors_{which}": torch.tensor(rope[f"{which}_factor"], dtype=torch.float32) for which in ("short", "long")}
    if rope["rope_type"] != "llama3":
        return {}
    scaled = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0]
    plain = 1 / rope["rope_theta"] ** (torch.arange(0, head_dim_of(config), 2, dtype=torch.float64) / head_dim_of(config))
    return {"rope_freqs": (plain / scaled.double()).float()}
