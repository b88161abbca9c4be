"""compressed-tensors `pack-quantized`: what vLLM and Transformers read without any code of ours.

Per linear of `(N, K)`: `weight_packed` int32 `(N, ceil(K b / 32))`, the dense bit stream of `q + 2^(b-1)` along K;
`weight_scale` `(N, groups)`; `weight_shape` int64 `[N, K]`. Symmetric, weights only. Dense packing of 3, 5, 6 and 7
bits needs compressed-tensors 0.17 or later in the reader.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from roundel.errors import ModelError
from roundel.formats.bits import pack_rows, unpack_rows
from roundel.grids import Grid, Uniform
from roundel.types import RoundedWeight

__all__ = ["config", "holds", "pack", "packed_bytes", "unpack"]

FORMAT = "pack-quantized"
VERSION = "0.20.0"
"""The compressed-tensors release whose layout this is."""


def holds(grid: Grid) -> bool:
    """Whether this format can store the grid's codes."""
    return isinstance(grid, Uniform)


def pack(rounded: RoundedWeight, grid: Uniform) -> dict[str, Tensor]:
    """Tensors of one linear, by their names under the module's."""
    offset = 2 ** (grid.bits - 1)
    return {
        "weight_packed": pack_rows(rounded.codes.to(torch.int16) + offset, grid.bits),
        "weight_scale": rounded.scales["scale"].expand(len(rounded.codes), -1).contiguous(),
        "weight_shape": torch.tensor(rounded.codes.shape, dtype=torch.int64),
    }


def packed_bytes(shape: Sequence[int], grid: Uniform, scale_dtype: torch.dtype) -> int:
    """Bytes of all tensors that `pack` makes of a `(d_out, d_in)` weight."""
    d_out, d_in = shape
    groups = grid.scale_shape(d_out, d_in)[1]
    return d_out * -(-d_in * grid.bits // 32) * 4 + d_out * groups * scale_dtype.itemsize + 16


def unpack(tensors: Mapping[str, Tensor], grid: Uniform) -> RoundedWeight:
    """Inverse of `pack`.

    Raises:
        ModelError: the tensors' shapes contradict each other.
    """
    shape = tensors["weight_shape"].tolist()
    words, scales = tensors["weight_packed"], tensors["weight_scale"]
    d_out, d_in = shape if len(shape) == 2 else (0, 0)
    groups = d_in / grid.group if isinstance(grid.group, int) else 1
    if min(d_out, d_in) < 1 or words.shape != (d_out, -(-d_in * grid.bits // 32)) or tuple(scales.shape) != (d_out, groups):
        raise ModelError(f"packed weight {tuple(words.shape)} with scales {tuple(scales.shape)} is no {grid.name} weight of shape {shape}")
    codes = unpack_rows(words, grid.bits, d_in) - 2 ** (grid.bits - 1)
    return RoundedWeight(scheme=grid.name, codes=codes.to(torch.int8), scales={"scale": scales}, shape=(d_out, d_in))


def config(grids: Mapping[str, Uniform], ignore: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json.

    Args:
        grids: Of each quantized linear. Those of one grid are a group; one group alone is of all linears that are not ignored.
        ignore: All linears that are not quantized.
    """
    members: dict[str, list[str]] = {}
    for name, grid in grids.items():
        members.setdefault(grid.name, []).append(name)
    by_name = {grid.name: grid for grid in grids.values()}
    groups = {
        f"group_{index}": _group(by_name[scheme], ["Linear"] if len(members) == 1 else sorted(names))
        for index, (scheme, names) in enumerate(sorted(members.items()))
    }
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": sorted(ignore),
        "sparsity_config": {},
        "transform_config": {},
        "version": VERSION,
        "config_groups": groups,
    }


def _group(grid: Uniform, targets: list[str]) -> dict[str, Any]:
    group = grid.group if isinstance(grid.group, int) else None
    return {
        "targets": targets,
        "format": FORMAT,
        "input_activations": None,
        "output_activations": None,
        "weights": {
            "num_bits": grid.bits,
            "type": "int",
            "symmetric": True,
            "strategy": "channel" if group is None else "group",
            "group_size": group,
            "dynamic": False,
            "actorder": None,
        },
    }
