"""Tensors of a GGUF: what they are called, in which order their rows are, in which types, and how a file's are read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
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
from roundel.formats.gguf_reader import Reader
from roundel.formats.gguf_settings import FAMILIES, Family, kv_heads_of, language_config
from roundel.formats.imatrix import architecture, tensor_names

__all__ = [
    "EXPERT",
    "Counterparts",
    "data_of",
    "decoded",
    "names_of",
    "order_of_rows",
    "stored_values",
    "targets_of",
    "tensors_of",
    "without_rows",
]

LEFT_OUT = re.compile(r"(^|\.)(vision_tower|multi_modal_projector|mtp)\.|\.rotary_emb\.inv_freq$")
"""Tensors that the language model needs not: of pictures, of tokens further ahead (llama.cpp's converter leaves out those of these names,
too), or computed from its settings."""

_ONE_ROW = ("ffn_gate_inp_shexp.weight", "exp_probs_b.bias")
"""Matrices of one row that llama.cpp has as vectors."""

_USUAL_PARTS = {".block_sparse_moe.": ".mlp.", ".input_linear": ".experts.gate_proj", ".gate.moe_statics.": ".moe_statics."}
_USUAL = re.compile("|".join(map(re.escape, _USUAL_PARTS)))
"""Parts of names in Granite's and Ernie's mixtures, and what others have in their place."""

EXPERT = re.compile(r"\.experts\.(\d+)\.")
"""Where a name has the number of an expert."""


def names_of(arch: str, modules: Iterable[str]) -> dict[str, str]:
    """The GGUF names of all modules' weights; those of a model without head may lack the leading `model.`."""
    own = {module: EXPERT.sub(".experts.", module) for module in sorted(modules)}
    modules = sorted(set(own.values()))
    found = tensor_names(arch, modules)
    longer = tensor_names(arch, [f"model.{module}" for module in modules if module not in found])
    found |= {module.removeprefix("model."): name for module, name in longer.items()}
    usual = {module: _USUAL.sub(lambda found: _USUAL_PARTS[found[0]], module) for module in modules}
    named = tensor_names(arch, [usual[module] for module in modules if module not in found])
    found |= {module: named[name] for module, name in usual.items() if name in named}
    unknown = [module for module in modules if module not in found]
    if unknown:
        raise ModelError(
            f"{unknown[0]}: llama.cpp has no tensor of that name in its {arch} models, and leaving it out would change the model"
        )
    return {module: found[name] for module, name in own.items()}


def targets_of(config: PreTrainedConfig, tensors: Iterable[str]) -> dict[str, str]:
    """The GGUF names of an original's tensors, by theirs; without what the language model needs not, layers behind its last among it.

    Raises:
        ModelError: llama.cpp has none for one of them.
    """
    spelled = {}
    for source in tensors:
        layer = re.search(r"\.layers\.(\d+)\.", source)
        if not LEFT_OUT.search(source) and (layer is None or int(layer[1]) < config.num_hidden_layers):
            spelled[source] = re.sub(r"_bias$", ".bias", re.sub(r"\.sinks$", ".sinks.weight", source))
    names = names_of(architecture(config.model_type), {name.rpartition(".")[0] for name in spelled.values()})
    return {source: names[name.rpartition(".")[0]].removesuffix("weight") + name.rpartition(".")[2] for source, name in spelled.items()}


def order_of_rows(config: PreTrainedConfig, family: Family, rows: int, name: str) -> Int[Tensor, " rows"]:
    """Where the rows of a tensor come from."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": kv_heads_of(config)} if family.permuted else {}
    part = name.split(".")[-2]
    if part == "attn_qkv" and config.model_type == "gpt_neox":  # there q, k and v of each head follow each other
        return torch.arange(rows).reshape(config.num_attention_heads, 3, -1).transpose(0, 1).flatten()
    return _pairs_side_by_side(rows, heads[part]) if part in heads else torch.arange(rows)


def _pairs_side_by_side(rows: int, heads: int) -> Int[Tensor, " rows"]:
    """Where the rows of q or k come from."""
    return torch.arange(rows).reshape(heads, 2, -1).transpose(1, 2).flatten()


def without_rows(target: str, values: Tensor) -> Tensor:
    """A tensor, which may be a matrix of one row that the file has as a vector."""
    return values[0] if target.endswith(_ONE_ROW) and values.ndim == 2 else values


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
        self._family = FAMILIES[self._settings.model_type]
        self.architecture = architecture(self._settings.model_type)
        tied = "lm_head.weight" if self._settings.tie_word_embeddings else None
        self.names = targets_of(self._settings, (each for each in tensors if each != tied))
        """By the original's name; experts share one."""

    def order(self, name: str, rows: int) -> Int[Tensor, " rows"]:
        """Where the rows of a tensor of the file come from."""
        return order_of_rows(self._settings, self._family, rows, name)

    def restored(self, name: str, values: Tensor) -> Tensor:
        """Values of a tensor of the file, in float32, as the original has them."""
        if name.endswith("norm.weight"):
            values = values - self._family.norm_offset
        ernie = self._settings.model_type == "ernie4_5_moe"  # others have a vector, too
        if name.endswith(_ONE_ROW if ernie else _ONE_ROW[:1]) and values.ndim == 1:
            values = values[None]
        return torch.empty_like(values).index_copy_(0, self.order(name, len(values)), values)

    def stored(self, name: str, values: Tensor, kind: GGMLQuantizationType) -> np.ndarray[Any, Any]:
        """The inverse, in a type of the file.

        Raises:
            ModelError: nothing here rounds to that type.
        """
        values = without_rows(name, values.float())
        values = values[self.order(name, len(values))] + (self._family.norm_offset if name.endswith("norm.weight") else 0)
        try:
            return stored_values(values, kind)
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
