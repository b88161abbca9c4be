"""llama.cpp's importance matrix in its GGUF form: one weight for each input column of a matrix, which `llama-quantize --imatrix` reads.

llama.cpp rounds a matrix under `sum_ij w_j E_ij^2`. Its own `llama-imatrix` measures `w_j = E[x_j^2]`. Of a Fisher, the
best such `w` is its diagonal summed over rows, `w_j = sum_i F_ij,ij = scale tr(H_out) H_in,jj`: the diagonal of `H_in`, where all
rows share it. Rows may be permuted in a GGUF (Llama's q and k are): columns are not, so nothing is to be permuted here.

Per matrix `M` there are two float32 tensors, `M.in_sum2` `(d_in,)`, a sum over tokens, and `M.counts` `(1,)`, their number; readers
use the quotient. Keys: `general.type` is "imatrix", `imatrix.datasets` the texts' names, `imatrix.chunk_count` and `imatrix.chunk_size`
sequences and tokens in each (llama.cpp pull request 9400). `general.architecture` is there because GGUF asks for it.

Cost: nothing. Not done: matrices of several experts; matrices whose columns llama.cpp's converter reorders; the old binary form.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import gguf
import numpy as np
from jaxtyping import Float
from torch import Tensor

from roundel.errors import ModelError

__all__ = ["Imatrix", "architecture", "tensor_names", "write"]

_OTHER_NAMES = {
    "cohere": "command-r",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "gpt_bigcode": "starcoder",
    "granitemoehybrid": "granitehybrid",
    "hunyuan_v1_dense": "hunyuan-dense",
    "mistral": "llama",
    "mixtral": "llama",
    "olmo3": "olmo2",
    "phi": "phi2",
}
"""Model types whose GGUF architecture has another name altogether."""

_REORDERED = ("ssm_out.weight",)
"""Of some hybrid models the converter reorders the input columns of these."""


@dataclass(frozen=True, kw_only=True)
class Imatrix:
    """An importance matrix: for each GGUF tensor the mean weight of each of its columns, and over how many tokens."""

    architecture: str
    dataset: str
    sequences: int
    seq_len: int
    values: Mapping[str, Float[Tensor, " d_in"]]
    counts: Mapping[str, int]


def architecture(model_type: str) -> str:
    """The GGUF name of a Transformers model type, `qwen3_moe` for one.

    Raises:
        ModelError: llama.cpp's own table (the gguf package) has none.
    """
    wanted = _OTHER_NAMES.get(model_type, _letters(model_type.removesuffix("_text")))
    for name in gguf.MODEL_ARCH_NAMES.values():
        if wanted in (name, _letters(name)):
            return name
    raise ModelError(
        f"model type {model_type!r}: gguf {version('gguf')} knows no architecture of llama.cpp for it, and so no names of its tensors; "
        "try a later gguf package"
    )


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def tensor_names(architecture: str, modules: Iterable[str]) -> dict[str, str]:
    """The GGUF names of the weights of `modules`; without those that llama.cpp has no such matrix for, or not with these columns."""
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    modules = list(modules)
    layers = (re.search(r"\.(\d+)\.", module) for module in modules)
    blocks = 1 + max((int(found[1]) for found in layers if found), default=0)
    known = gguf.get_tensor_name_map(kind, blocks)
    found = {module: known.get_name(f"{module.replace('language_model.', '')}.weight", (".weight",)) for module in modules}
    return {module: name for module, name in found.items() if name is not None and not name.endswith(_REORDERED)}


def write(path: Path, matrix: Imatrix) -> None:
    """Writes the file; tensors in the order of their names, so that equal matrices give equal bytes."""
    writer = gguf.GGUFWriter(path, matrix.architecture)
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [matrix.dataset])
    writer.add_uint32("imatrix.chunk_count", matrix.sequences)
    writer.add_uint32("imatrix.chunk_size", matrix.seq_len)
    for name in sorted(matrix.values):
        count = matrix.counts[name]
        writer.add_tensor(f"{name}.in_sum2", (matrix.values[name].double() * count).float().numpy())
        writer.add_tensor(f"{name}.counts", np.array([count], dtype=np.float32))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
