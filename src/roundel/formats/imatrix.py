"""llama.cpp's importance matrix in its GGUF form: one weight for each input column of a matrix, which `llama-quantize --imatrix` reads.

llama.cpp rounds a matrix under `sum_ij w_j E_ij^2`. Its own `llama-imatrix` measures `w_j = E[x_j^2]`. Of a Fisher, the
best such `w` is its diagonal summed over rows, `w_j = sum_i F_ij,ij = scale tr(H_out) H_in,jj`: the diagonal of `H_in`, where all
rows share it. Rows may be permuted in a GGUF (Llama's q and k are): columns are not, so nothing is to be permuted here.

Per matrix `M` there are two float32 tensors, `M.in_sum2` `(d_in,)`, a sum over tokens, and `M.counts` `(1,)`, their number; readers
use the quotient. Keys: `general.type` is "imatrix", `imatrix.datasets` the texts' names, `imatrix.chunk_count` and `imatrix.chunk_size`
sequences and tokens in each (llama.cpp pull request 9400). `general.architecture` is there because GGUF asks for it.

Files of others are read as well (`read`): sums of experts one after the other, `(experts, d_in)` with `(experts, 1)` counts, and the older
binary form (`.dat`): the number of matrices; for each the length of its name, the name, the number of chunks, the number of values and the
values, means times chunks, all in 32 bits.

Cost: nothing. Not done: writing matrices of several experts; matrices whose columns llama.cpp's converter reorders.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import gguf
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from roundel.errors import FactorsError, ModelError, damaged
from roundel.formats.gguf_reader import Reader

__all__ = ["Imatrix", "architecture", "read", "tensor_names", "write"]

OLD_CHUNK = 512
"""Tokens of a chunk in the older form, which does not say it: llama.cpp's default."""

_OTHER_NAMES = {
    "cohere": "command-r",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "glm4_moe_lite": "deepseek2",
    "gpt_bigcode": "starcoder",
    "granitemoehybrid": "granitehybrid",
    "granitemoeshared": "granitemoe",
    "hunyuan_v1_dense": "hunyuan-dense",
    "hunyuan_v1_moe": "hunyuan-moe",
    "ministral3": "mistral3",
    "mistral": "llama",
    "mixtral": "llama",
    "olmo3": "olmo2",
    "phi": "phi2",
    "qwen2_5_vl_text": "qwen2vl",
    "solar_open": "glm4moe",
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


def tensor_names(architecture: str, modules: Iterable[str], *, reordered: bool = False) -> dict[str, str]:
    """The GGUF names of the weights of `modules`; without those that llama.cpp has no such matrix for, or, by default, not with these
    columns."""
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    modules = list(modules)
    layers = (re.search(r"\.(\d+)\.", module) for module in modules)
    blocks = 1 + max((int(found[1]) for found in layers if found), default=0)
    known = gguf.get_tensor_name_map(kind, blocks)
    found = {module: known.get_name(f"{module.replace('language_model.', '')}.weight", (".weight",)) for module in modules}
    return {module: name for module, name in found.items() if name is not None and (reordered or not name.endswith(_REORDERED))}


def read(path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Sums of squares over tokens and numbers of tokens by GGUF tensor: `(experts, d_in)` and `(experts,)`, one expert for plain matrices.

    Raises:
        FactorsError: it is no importance matrix, or damaged.
    """
    with damaged(FactorsError, path, "expected an importance matrix of llama.cpp"):
        content = path.read_bytes()
        found = _read_gguf(path) if content[:4] == b"GGUF" else _read_old(content)
        for name, (sums, counts) in found.items():
            if not sums.numel() or counts.shape != sums.shape[:1] or not (sums >= 0).all() or not torch.isfinite(sums).all():
                raise FactorsError(f"{path}: the sums of {name} are no sums of squares; the file is damaged")
            if not (counts >= 0).all() or not torch.isfinite(counts).all():
                raise FactorsError(f"{path}: the counts of {name} are none; the file is damaged")
    if not found:
        raise FactorsError(f"{path} has no sums of any matrix: expected an importance matrix of llama.cpp")
    return found


def _read_gguf(path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """The sums are `(d_in,)` or `(experts, d_in)` as numpy has them, the counts `(1,)` or `(experts, 1)`."""
    tensors = {tensor.name: tensor for tensor in Reader(path).tensors}
    found = {}
    for name in (name.removesuffix(".in_sum2") for name in tensors if name.endswith(".in_sum2")):
        counts = torch.from_numpy(np.array(tensors[f"{name}.counts"].data, dtype=np.float32)).flatten()
        sums = torch.from_numpy(np.array(tensors[f"{name}.in_sum2"].data, dtype=np.float32))
        found[name] = (sums.reshape(len(counts), -1), counts)
    return found


def _read_old(content: bytes) -> dict[str, tuple[Tensor, Tensor]]:
    """A matrix of several experts has their values one after the other, and does not say how many they are: it comes as one row."""

    def number(at: int) -> int:
        return int.from_bytes(content[at : at + 4], "little", signed=True)

    found, at = {}, 4
    for _ in range(number(0)):
        length = number(at)
        name = content[at + 4 : at + 4 + length].decode("utf-8")
        at += 4 + length
        chunks, size = number(at), number(at + 4)
        at += 8
        if length < 1 or chunks < 1 or size < 1 or at + 4 * size > len(content):
            raise ValueError("it ends too early")
        values = torch.from_numpy(np.frombuffer(content, dtype="<f4", count=size, offset=at).astype(np.float32))
        found[name] = ((values * OLD_CHUNK)[None], torch.tensor([float(chunks * OLD_CHUNK)]))
        at += 4 * size
    return found


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
