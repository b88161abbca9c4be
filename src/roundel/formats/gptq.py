"""GPTQ, the format of AutoGPTQ and GPTQModel in its first version, which most engines read: symmetric integers of 4 and 8 bits.

For a linear of `(N, K) = (d_out, d_in)` with `b`-bit codes `q` in groups of `g` columns, or one group of all (`group_size` -1):

    qweight   int32 (K b / 32, N)      u = q + 2^(b-1) down K: element i of a column at bits i b .. of the column's words
    qzeros    int32 (G, N b / 32)      the zero point less 1, 2^(b-1) - 1, along N in the same way: readers add 1
    scales    float16 (G, N)           signed
    g_idx     int32 (K,)               the group of each column, k // g: no activation order

    W = (u - 2^(b-1)) scale

Scales may be negative: the code -2^(b-1) has no opposite, and the sign says on which side of a group it is. Readers multiply by the scale
as it is, in float16, where a sign costs nothing; only groups without that code could do without. Scales are float16 always. bfloat16 has
fewer significant bits and a wider range, so those that are normal in float16 are kept exactly, smaller ones not always: weights are best
rounded with scales of float16 (`scale_dtype`).

Not done: version 2, other widths (3 bits have a layout of their own, and few readers), zero points (in version 1 some cannot be written),
several schemes in a model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from roundel.errors import ModelError, SchemeError
from roundel.formats.base import CheckpointFormat, expect, half_scales, only_grid
from roundel.formats.bits import pack_rows, unpack_rows
from roundel.grids import Grid, Uniform
from roundel.types import RoundedWeight

__all__ = ["Gptq", "pack_groups", "packed_layout", "unpack_groups"]

WIDTHS = (4, 8)

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""What vLLM calls linears that it runs as one."""


class Gptq(CheckpointFormat):
    """The format `gptq`."""

    fuses = True

    loads = False

    scale_dtype = torch.float16
    """The type in which all scales are stored."""

    @property
    def name(self) -> str:
        return "gptq"

    def check(self, grid: Grid, rotation: str | None) -> None:
        if rotation is not None:
            raise SchemeError(f"gptq cannot hold {grid.name}, rotated ({rotation}): its readers undo no rotation; try rotate none")
        if not isinstance(grid, Uniform) or grid.width not in WIDTHS:
            raise SchemeError(
                f"gptq cannot hold {grid.name}: its engines read symmetric integers of 4 and 8 bits; "
                "try the format compressed-tensors, which has 2 to 8 bits and zero points, or int4-g128"
            )

    def check_mixture(self, schemes: Iterable[str]) -> None:
        only_grid(self.name, schemes)

    def check_shape(self, grid: Grid, d_out: int, d_in: int) -> None:
        assert isinstance(grid, Uniform)
        whole = 32 // grid.width
        if d_out % whole or d_in % whole:
            raise SchemeError(
                f"gptq: {d_out} x {d_in} with {grid.width} bits does not fill words of {whole} codes on both sides; "
                "the format compressed-tensors has no such limit"
            )

    def pack(self, rounded: RoundedWeight) -> dict[str, Tensor]:
        grid, (d_out, d_in) = self.check_weight(rounded), rounded.shape
        assert isinstance(grid, Uniform)
        scales = half_scales(self.name, rounded.scales["scale"])
        groups = _groups(grid, d_in)
        middle = 2 ** (grid.width - 1)
        zeros = torch.full((d_out, groups), middle - 1, dtype=torch.int16)
        packed = pack_groups(rounded.codes.to(torch.int16) + middle, zeros, scales.expand(d_out, groups), grid.width)
        return {**packed, "g_idx": _group_of_columns(d_in, groups)}

    def unpack(self, tensors: Mapping[str, Tensor], grid: Grid, shape: tuple[int, int]) -> RoundedWeight:
        self.check(grid, None)
        grid.check(*shape)
        self.check_shape(grid, *shape)
        assert isinstance(grid, Uniform)
        expect(tensors, _layout(grid, shape), f"a {grid.name} weight of shape {shape} in gptq")
        middle, groups = 2 ** (grid.width - 1), _groups(grid, shape[1])
        codes, zeros, scale = unpack_groups(tensors, grid.width, shape)
        if not (zeros == middle - 1).all():
            raise ModelError(f"qzeros are not all {middle - 1}: the checkpoint is asymmetric, or of gptq's second version")
        if not torch.equal(tensors["g_idx"], _group_of_columns(shape[1], groups)):
            raise ModelError(
                "g_idx is not ascending by groups: the checkpoint has an activation order (desc_act), which Roundel does not write"
            )
        if grid.group == "tensor":
            if not (scale == scale[:1]).all():
                raise ModelError(f"scales differ from row to row: {grid.name} has one scale for the weight")
            scale = scale[:1].clone()
        return RoundedWeight(scheme=grid.name, codes=(codes - middle).to(torch.int8), scales={"scale": scale}, shape=shape)

    def packed_bytes(self, shape: tuple[int, int], grid: Grid, scale_dtype: torch.dtype, rotation: str | None) -> int:
        self.check(grid, rotation)
        self.check_shape(grid, *shape)
        assert isinstance(grid, Uniform)
        return sum(math.prod(size) * dtype.itemsize for size, dtype in _layout(grid, shape).values())

    def config(self, rounded: Mapping[str, RoundedWeight], ignore: Sequence[str]) -> dict[str, Any]:
        """As in `CheckpointFormat`; linears that are not quantized, other than the output head, are negative matches of `dynamic`.

        Raises:
            SchemeError: there is more than one scheme.
        """
        grid = only_grid(self.name, (weight.scheme for weight in rounded.values()))
        assert isinstance(grid, Uniform)
        skipped = _skipped(ignore)
        return {
            "quant_method": "gptq",
            "bits": grid.width,
            "group_size": grid.group if isinstance(grid.group, int) else -1,
            "sym": True,
            "desc_act": False,
            "checkpoint_format": "gptq",
            "lm_head": any(_last(name) == "lm_head" for name in rounded),
            "pack_dtype": "int32",
            "meta": {"quantizer": [f"roundel:{version('roundel')}"]},
            **({"dynamic": {f"-:^{re.escape(name)}$": {} for name in skipped}} if skipped else {}),
        }


def pack_groups(codes: Tensor, zeros: Tensor, scales: Tensor, width: int) -> dict[str, Tensor]:
    """The tensors of unsigned codes `(d_out, d_in)`, with unsigned zero points and scales `(d_out, groups)`."""
    return {
        "qweight": pack_rows(codes, width).T.contiguous(),
        "qzeros": pack_rows(zeros.T.contiguous(), width),
        "scales": scales.T.contiguous(),
    }


def unpack_groups(tensors: Mapping[str, Tensor], width: int, shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Inverse of `pack_groups`: codes, zero points and scales.

    Raises:
        ModelError: scales are not finite.
    """
    scales = tensors["scales"].T.contiguous()
    if not scales.isfinite().all():
        raise ModelError("scales hold NaN or infinite values; the checkpoint is damaged")
    codes, zeros = unpack_rows(tensors["qweight"].T.contiguous(), width, shape[1]), unpack_rows(tensors["qzeros"], width, shape[0])
    return codes, zeros.T.contiguous(), scales


def packed_layout(width: int, groups: int, shape: tuple[int, int]) -> Layout:
    """Sizes and types of what `pack_groups` makes."""
    d_out, d_in = shape
    return {
        "qweight": ((d_in * width // 32, d_out), torch.int32),
        "qzeros": ((groups, d_out * width // 32), torch.int32),
        "scales": ((groups, d_out), torch.float16),
    }


def _groups(grid: Uniform, d_in: int) -> int:
    return d_in // grid.group if isinstance(grid.group, int) else 1


def _layout(grid: Uniform, shape: tuple[int, int]) -> Layout:
    return {**packed_layout(grid.width, _groups(grid, shape[1]), shape), "g_idx": ((shape[1],), torch.int32)}


def _group_of_columns(d_in: int, groups: int) -> Tensor:
    return torch.arange(d_in, dtype=torch.int32) // (d_in // groups)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _skipped(ignore: Sequence[str]) -> list[str]:
    """Linears that readers would take for quantized ones, and the names of those that vLLM has fused of them."""
    names = {name for name in ignore if _last(name) != "lm_head"}
    fused = {
        f"{parent}.{whole}"
        for parent in {name.rpartition(".")[0] for name in names}
        for whole, parts in FUSED.items()
        if all(f"{parent}.{part}" in names for part in parts)
    }
    return sorted(names | fused)
