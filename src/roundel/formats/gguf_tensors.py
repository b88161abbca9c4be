"""Tensors of a GGUF: what they are called, in which order their rows are, in which types, and how a file's are read."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedConfig

from roundel.errors import ModelError, damaged
from roundel.formats.gguf_families import FAMILIES
from roundel.formats.gguf_reader import Reader
from roundel.formats.gguf_settings import architecture_of, expert_count_of, kv_heads_of, language_config
from roundel.formats.imatrix import tensor_names

__all__ = [
    "ALWAYS_FLOAT",
    "EXPERT",
    "LEFT_OUT",
    "Counterparts",
    "as_in_file",
    "data_of",
    "decoded",
    "halves_apart",
    "halves_together",
    "names_of",
    "packed_in_order",
    "parts_of",
    "stored_values",
    "targets_of",
    "tensors_of",
    "unbroken",
]

LEFT_OUT = re.compile(r"(^|\.)(vision_tower|visual|audio_tower|embed_(vision|audio)|multi_modal_projector|mtp)\.|\.rotary_emb\.inv_freq$")
"""Tensors that the language model needs not: of pictures, of tokens further ahead (llama.cpp's converter leaves out those of these names,
too), or computed from its settings."""

_ONE_ROW = ("ffn_gate_inp_shexp.weight", "exp_probs_b.bias")
"""Matrices of one row that llama.cpp has as vectors."""

_USUAL_PARTS = {
    ".block_sparse_moe.input_linear": ".mlp.experts.gate_proj",
    ".block_sparse_moe.": ".mlp.",
    ".gate.moe_statics.": ".moe_statics.",
    ".gate.wg": ".gate",
    ".mixer.experts.": ".mlp.experts.",
    ".shared_mlp.input_linear.": ".mlp.shared_mlp.",
    ".shared_mlp.": ".mlp.shared_mlp.",
    "backbone.": "model.",
}
_USUAL_PARTS |= {f".experts.{short}": f".experts.{name}_proj" for short, name in (("w1", "gate"), ("w2", "down"), ("w3", "up"))}
_USUAL = re.compile("|".join(map(re.escape, _USUAL_PARTS)))
"""Parts of names in Granite's, Ernie's, LFM's and Nemotron's mixtures, and what others have in their place."""

_SPELLED = {
    ".sinks": ".sinks.weight",
    ".layer_scalar": ".layer_scalar.weight",
    ".A_log": ".A_log.weight",
    ".D": ".D.weight",
    ".dt_bias": ".dt_proj.bias",
    ".expert_bias": ".expert_bias.bias",
    ".experts.down_proj": ".experts.down_proj.weight",
    ".experts.gate_up_proj": ".experts.gate_proj.weight",
    ".experts.up_proj": ".experts.up_proj.weight",
    ".router.per_expert_scale": ".experts.down_proj.scale",
    ".router.scale": ".router.proj.scale",
    "_bias": ".bias",
}
"""Ends of the names of parameters that are no module's weight or bias, and of modules that would have them so; a stack for one of its
parts."""

_DECAY, _SKIP, _CONVOLUTIONS = ".ssm_a", ".ssm_d", ("ssm_conv1d.weight", "shortconv.conv.weight")
"""Of linear attention and state spaces: `A` itself in the place of `log -A`, what goes past the states, both by names of their own, and a
convolution without its channels' one input."""

_STATES_NORM = ".ssm_norm.weight"


@dataclass(frozen=True)
class _Pair:
    """One tensor of an original that is two of the file."""

    whole: str
    halves: tuple[str, str]
    """Gate and up."""
    in_turn: bool
    """Whether it has columns of both in turn, or rows of one after the other's."""


_PAIRS = (
    _Pair(".experts.gate_up_proj_bias", (".experts.gate_proj_bias", ".experts.up_proj_bias"), in_turn=True),
    _Pair(".shared_mlp.input_linear", (".shared_mlp.input_linear.gate_proj", ".shared_mlp.input_linear.up_proj"), in_turn=False),
)
"""Of GPT-OSS and of Granite's hybrids."""

_VALUES_OUT = ".ssm_out.weight"
"""The matrix whose columns are the heads of values of linear attention."""

ALWAYS_FLOAT = re.compile(r"_inp|\.bias$|conv|ssm_(a|d|norm)\b")
"""Matrices that are never less than float32: of routers, biases of experts, convolutions, state spaces."""

EXPERT = re.compile(r"\.experts\.(\d+)\.")
"""Where a name has the number of an expert."""


def names_of(config: PreTrainedConfig, modules: Iterable[str]) -> dict[str, str]:
    """The GGUF names of all modules' weights; those of a model without head may lack the leading `model.`."""
    arch = architecture_of(config)
    own = {module: EXPERT.sub(".experts.", module) for module in sorted(modules)}
    modules = sorted(set(own.values()))
    found = tensor_names(arch, modules, reordered=True)
    longer = tensor_names(arch, [f"model.{module}" for module in modules if module not in found], reordered=True)
    found |= {module.removeprefix("model."): name for module, name in longer.items()}
    usual = {module: _USUAL.sub(lambda found: _USUAL_PARTS[found[0]], module) for module in modules}
    for others in (usual, {module: f"backbone.{module.removeprefix('model.')}" for module in modules}):
        named = tensor_names(arch, [others[module] for module in modules if module not in found], reordered=True)
        found |= {module: named[name] for module, name in others.items() if name in named}
    halves = {module: re.sub(r"(gate|up)_proj$", "gate_up_proj", module) for module in modules if module not in found}
    named = tensor_names(arch, halves.values(), reordered=True) if halves else {}
    for module, whole in halves.items():  # Gemma 4's experts have both in one tensor or each in its own, and gguf names the first
        if named.get(whole, "").endswith("_gate_up_exps.weight") and whole != module:
            found[module] = named[whole].replace("_gate_up_", "_gate_" if module.endswith(".gate_proj") else "_up_")
    unknown = [module for module in modules if module not in found]
    if unknown:
        raise ModelError(
            f"{unknown[0]}: llama.cpp has no tensor of that name in its {arch} models, and leaving it out would change the model"
        )
    if not expert_count_of(config):  # there Granite's shared experts are all that there is
        found = {module: name.replace("_shexp.", ".") for module, name in found.items()}
    return {module: found[name] for module, name in own.items()}


def _renamed(name: str, old: str, new: str) -> str | None:
    """A module's name, or that of its weight, with another end; None if it ends otherwise."""
    found = re.fullmatch(rf"(.*){re.escape(old)}(\.weight)?", name)
    return None if found is None else found[1] + new + (found[2] or "")


def parts_of(name: str) -> list[str]:
    """The names that a tensor of an original, or a linear, goes by where it is two of the file; else its own."""
    found = [_renamed(name, pair.whole, half) for pair in _PAIRS for half in pair.halves]
    return [each for each in found if each is not None] or [name]


def halves_apart(read: Callable[[str], Tensor]) -> Callable[[str], Tensor]:
    """What reads an original by the names of `parts_of`."""

    def part(name: str) -> Tensor:
        for pair in _PAIRS:
            for which, half in enumerate(pair.halves):
                if (whole := _renamed(name, half, pair.whole)) is not None:
                    values = read(whole)
                    return values[..., which::2].contiguous() if pair.in_turn else values.chunk(2)[which]
        return read(name)

    return part


def halves_together(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse, of all tensors."""
    found = dict(tensors)
    for pair in _PAIRS:
        for name in tensors:
            if (whole := _renamed(name, pair.halves[0], pair.whole)) is not None:
                halves = [found.pop(half) for half in parts_of(whole)]
                found[whole] = torch.stack(halves, dim=-1).flatten(-2) if pair.in_turn else torch.cat(halves)
    return found


def targets_of(config: PreTrainedConfig, tensors: Iterable[str]) -> dict[str, str]:
    """The GGUF names of an original's tensors, by theirs; without what the language model needs not, layers behind its last among it.

    Raises:
        ModelError: llama.cpp has none for one of them.
    """
    spelled = {}
    for source in (own for name in tensors for own in parts_of(name)):
        layer = re.search(r"\.layers\.(\d+)\.", source)
        if not LEFT_OUT.search(source) and (layer is None or int(layer[1]) < config.num_hidden_layers):
            spelled[source] = next((source.removesuffix(end) + own for end, own in _SPELLED.items() if source.endswith(end)), source)
    names = names_of(config, {name.rpartition(".")[0] for name in spelled.values()})
    found = {source: names[name.rpartition(".")[0]].removesuffix("weight") + name.rpartition(".")[2] for source, name in spelled.items()}
    bare = tuple(f"{end}.weight" for end in (_DECAY, _SKIP))
    return {source: name.removesuffix(".weight") if name.endswith(bare) else name for source, name in found.items()}


def order_of_rows(config: PreTrainedConfig, rows: int, name: str) -> Int[Tensor, " rows"] | None:
    """Where the rows of a tensor come from, if they are moved."""
    if shared := _shared(config):
        heads, width = config.linear_num_key_heads, config.linear_value_head_dim
        before = 2 * heads * config.linear_key_head_dim
        if re.search(r"\.(ssm_a|ssm_dt\.bias|ssm_alpha\.weight|ssm_beta\.weight)$", name):
            return _turns(heads, shared, 1)
        if name.endswith(".attn_gate.weight"):
            return _turns(heads, shared, width)
        if re.search(r"\.(attn_qkv|ssm_conv1d)\.weight$", name):
            return torch.cat([torch.arange(before), before + _turns(heads, shared, width)])
    permuted = FAMILIES[config.model_type].permuted
    paired = {"attn_q": config.num_attention_heads, "attn_k": kv_heads_of(config)} if permuted else {}
    part = name.split(".")[-2] if "." in name else ""
    if part == "attn_qkv" and config.model_type == "gpt_neox":  # there q, k and v of each head follow each other
        return torch.arange(rows).reshape(config.num_attention_heads, 3, -1).transpose(0, 1).flatten()
    return _pairs_side_by_side(rows, paired[part]) if part in paired else None


def order_of_columns(config: PreTrainedConfig, columns: int, name: str) -> Int[Tensor, " columns"] | None:
    """Where the columns of a tensor come from, if they are moved."""
    shared = _shared(config)
    return _turns(config.linear_num_key_heads, shared, config.linear_value_head_dim) if shared and name.endswith(_VALUES_OUT) else None


def unbroken(config: PreTrainedConfig, module: str, columns: int) -> int:
    """How many of a linear's columns stay side by side in the file: a block may not be longer."""
    return int(config.linear_value_head_dim) if _shared(config) and module.endswith(".linear_attn.out_proj") else columns


def packed_in_order(config: PreTrainedConfig, target: str, rows: Tensor, columns: int, kind: GGMLQuantizationType) -> Tensor:
    """Packed rows of so many columns, in the file's order; one of columns keeps those of a block together."""
    if (order := order_of_rows(config, len(rows), target)) is not None:
        rows = rows[order]
    if (order := order_of_columns(config, columns, target)) is not None:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        rows = rows.reshape(len(rows), -1, size)[:, order[::block] // block].reshape(len(rows), -1)
    return rows


def _shared(config: PreTrainedConfig) -> int:
    """How many heads of values of linear attention have one of keys in common; 0: llama.cpp has them in the same order."""
    values, keys = (getattr(config, f"linear_num_{which}_heads", 0) for which in ("value", "key"))
    return values // keys if config.model_type.startswith("qwen3_5") and values != keys else 0


def _turns(heads: int, shared: int, width: int) -> Int[Tensor, " rows"]:
    """Heads that are grouped by their keys, in turns: the first of each group, then the second."""
    return torch.arange(heads * shared * width).reshape(heads, shared, width).transpose(0, 1).flatten()


def _pairs_side_by_side(rows: int, heads: int) -> Int[Tensor, " rows"]:
    """Where the rows of q or k come from."""
    return torch.arange(rows).reshape(heads, 2, -1).transpose(1, 2).flatten()


def as_in_file(config: PreTrainedConfig, target: str, values: Tensor) -> Tensor:
    """A tensor of an original, or of one of its experts, as the file has it, before it is stored in a type of the file's."""
    if target.endswith(_ONE_ROW) and values.ndim == 2:
        values = values[0]
    if target.endswith(_CONVOLUTIONS):
        values = values.squeeze(1)
    if target.endswith(_DECAY):
        values = -values.float().exp()
    family = FAMILIES[config.model_type]
    if family.state_width and target.endswith((_DECAY, _SKIP, _STATES_NORM)):
        values = values.reshape(getattr(config, family.called("ssm_group_count")) if target.endswith(_STATES_NORM) else len(values), -1)
    if _is_norm(target):
        values = values.float() + family.norm_offset
    if (order := order_of_rows(config, len(values), target)) is not None:
        values = values[order]
    if (order := order_of_columns(config, values.shape[-1], target)) is not None:
        values = values[:, order]
    return values


def _is_norm(target: str) -> bool:
    """Whether it has Gemma's offset where there is one; the norm inside of linear attention has not."""
    return target.endswith("norm.weight") and not target.endswith(_STATES_NORM)


def stored_values(values: Tensor, kind: GGMLQuantizationType) -> np.ndarray[Any, Any]:
    """What is stored of values that are not rounded under curvature."""
    match kind:
        case GGMLQuantizationType.F16:
            return values.to(torch.float16).cpu().numpy()
        case GGMLQuantizationType.BF16:
            return values.to(torch.bfloat16).cpu().contiguous().view(torch.int16).numpy()
        case _:
            return gguf.quantize(values.float().cpu().numpy(), kind)


class Counterparts:
    """Where the tensors of an original are in its GGUF, and in what form."""

    def __init__(self, config: Mapping[str, Any], tensors: Iterable[str]) -> None:
        """Finds their names.

        Args:
            config: The original's config.json.
            tensors: Names of all tensors of the original; a tied head has none of its own.

        Raises:
            ModelError: as `check_model`.
        """
        self._settings = language_config(config)
        self.architecture = architecture_of(self._settings)
        tied = "lm_head.weight" if self._settings.tie_word_embeddings else None
        self.names = targets_of(self._settings, (each for each in tensors if each != tied))
        """By the original's name; experts share one."""

    def order(self, name: str, rows: int) -> Int[Tensor, " rows"]:
        """Where the rows of a tensor of the file come from."""
        order = order_of_rows(self._settings, rows, name)
        return torch.arange(rows) if order is None else order

    def moves_columns(self, name: str, columns: int) -> bool:
        """Whether those of a tensor of the file are in another order."""
        return order_of_columns(self._settings, columns, name) is not None

    def restored(self, name: str, values: Tensor) -> Tensor:
        """Values of a tensor of the file, in float32, as the original has them."""
        if _is_norm(name):
            values = values - FAMILIES[self._settings.model_type].norm_offset
        if FAMILIES[self._settings.model_type].state_width and name.endswith((_DECAY, _SKIP, _STATES_NORM)):
            values = values.flatten()
        if name.endswith(_DECAY):
            values = (-values).log()
        if name.endswith(_CONVOLUTIONS):
            values = values[:, None]
        columns = order_of_columns(self._settings, values.shape[-1], name)
        if columns is not None:
            values = torch.empty_like(values).index_copy_(1, columns, values)
        ernie = self._settings.model_type == "ernie4_5_moe"  # others have a vector, too
        if name.endswith(_ONE_ROW if ernie else _ONE_ROW[:1]) and values.ndim == 1:
            values = values[None]
        return torch.empty_like(values).index_copy_(0, self.order(name, len(values)), values)

    def stored(self, name: str, values: Tensor, kind: GGMLQuantizationType) -> np.ndarray[Any, Any]:
        """The inverse, in a type of the file.

        Raises:
            ModelError: nothing here rounds to that type.
        """
        try:
            return stored_values(as_in_file(self._settings, name, values.float()), kind)
        except NotImplementedError as error:
            raise ModelError(f"{name} is {kind.name} in the file, which nothing here rounds to") from error


def tensors_of(path: Path) -> dict[str, gguf.ReaderTensor]:
    """All tensors of a file, mapped into memory, by name.

    Raises:
        ModelError: it is damaged.
    """
    with damaged(ModelError, path):
        return {each.name: each for each in Reader(path).tensors}


def data_of(tensor: gguf.ReaderTensor, source: str) -> np.ndarray[Any, Any]:
    """A tensor of a file as it is stored, or that of one of its experts, by the original's name."""
    expert = EXPERT.search(source)
    return tensor.data[int(expert[1])] if expert else tensor.data


def decoded(tensor: gguf.ReaderTensor, source: str, rows: slice = slice(None)) -> Tensor:
    """The values of a tensor of a file, or of one of its experts by the original's name, in float32; all of its rows, or some."""
    return torch.from_numpy(np.array(gguf.dequantize(data_of(tensor, source)[rows], tensor.tensor_type), dtype=np.float32))
