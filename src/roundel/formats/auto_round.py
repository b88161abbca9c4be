"""AutoRound, the format of Intel's AutoRound, which Transformers reads with `auto-round` and vLLM as it is. Integers of 2, 3, 4 and 8 bits.

The tensors are GPTQ's (`formats.gptq`), without `g_idx`: codes and zero points as unsigned `b`-bit numbers, each row of them a stream of
bits that crosses words (3 bits). config.json says by `packing_format` which zero points there are:

    auto_round:auto_gptq   symmetric schemes; the zero point less 1, 2^(b-1) - 1, as in GPTQ's first version
    auto_round             `-asym`; the zero point as it is, z + 2^(b-1): of all packings the one that holds every zero point

    W = (u - zero point) scale

`bits` and `group_size` are those of most linears. `extra_config` names, by module, those that differ, and with 16 bits those that are not
quantized. AutoRound takes a name there that is no linear's for a pattern, and quantizes by itself what is inside of a list of blocks:
linears whose names contain one that is left alone, and those outside of such lists, are named, too. The format's name says how others
choose these numbers; nothing here depends on it. Scales are float16 always, and may be negative.

Source: auto-round 0.16's loader and vLLM's `INCConfig`, which has no place for the packing `auto_round`.

Not done: zero points in AWQ's layout (`auto_round:auto_awq`; the format `awq` has it), 5 to 7 bits, which vLLM lacks, floats; symmetric and
asymmetric schemes in one model, for which there is one `packing_format`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from roundel.errors import ModelError, SchemeError
from roundel.formats.base import CheckpointFormat, expect, half_scales
from roundel.formats.gptq import pack_groups, packed_layout, unpack_groups
from roundel.grids import Grid, Uniform, parse_scheme
from roundel.grids.asymmetric import Asymmetric
from roundel.types import RoundedWeight

__all__ = ["AutoRound"]

WIDTHS = (2, 3, 4, 8)

WHOLE = 32
"""Inputs and outputs of a linear that AutoRound's kernels take are multiples of this; so are groups in vLLM's."""


class AutoRound(CheckpointFormat):
    """The format `auto-round`."""

    fuses = True

    loads = False

    scale_dtype = torch.float16
    """The type in which all scales are stored."""

    @property
    def name(self) -> str:
        return "auto-round"

    def check(self, grid: Grid, rotation: str | None) -> None:
        if rotation is not None:
            raise SchemeError(f"auto-round cannot hold {grid.name}, rotated ({rotation}): its readers undo no rotation; try rotate none")
        if not isinstance(grid, Uniform | Asymmetric) or grid.width not in WIDTHS or not _whole(grid.group):
            raise SchemeError(
                f"auto-round cannot hold {grid.name}: it has integers of 2, 3, 4 and 8 bits in groups of 32, 64, 96, ... or whole rows, "
                "with zero points or without; try int4-g128, or the format compressed-tensors, which has 2 to 8 bits in any groups"
            )

    def check_mixture(self, schemes: Iterable[str]) -> None:
        kinds = {isinstance(parse_scheme(scheme), Asymmetric): scheme for scheme in schemes}
        if len(kinds) > 1:
            raise SchemeError(
                f"auto-round holds schemes with zero points or without in a model, and here are {kinds[False]} and {kinds[True]}; "
                "try the format compressed-tensors"
            )

    def check_shape(self, grid: Grid, d_out: int, d_in: int) -> None:
        if d_out % WHOLE or d_in % WHOLE:
            raise SchemeError(
                f"auto-round: {d_out} x {d_in} are not both multiples of {WHOLE}; the format compressed-tensors has no such limit"
            )

    def pack(self, rounded: RoundedWeight) -> dict[str, Tensor]:
        grid, scales = self.check_weight(rounded), half_scales(self.name, rounded.scales["scale"])
        assert isinstance(grid, Uniform | Asymmetric)
        middle = 2 ** (grid.width - 1)
        if isinstance(grid, Asymmetric):
            zeros = rounded.scales["zero_point"].to(torch.int16) + middle
        else:
            zeros = torch.full(scales.shape, middle - 1, dtype=torch.int16)
        return pack_groups(rounded.codes.to(torch.int16) + middle, zeros, scales, grid.width)

    def unpack(self, tensors: Mapping[str, Tensor], grid: Grid, shape: tuple[int, int]) -> RoundedWeight:
        self.check(grid, None)
        grid.check(*shape)
        self.check_shape(grid, *shape)
        assert isinstance(grid, Uniform | Asymmetric)
        expect(tensors, _layout(grid, shape), f"a {grid.name} weight of shape {shape} in auto-round")
        middle = 2 ** (grid.width - 1)
        codes, zeros, scale = unpack_groups(tensors, grid.width, shape)
        scales = {"scale": scale}
        if isinstance(grid, Asymmetric):
            scales["zero_point"] = (zeros - middle).to(torch.int8)
        elif not (zeros == middle - 1).all():
            raise ModelError(f"qzeros are not all {middle - 1}: {grid.name} has no zero points")
        return RoundedWeight(scheme=grid.name, codes=(codes - middle).to(torch.int8), scales=scales, shape=shape)

    def packed_bytes(self, shape: tuple[int, int], grid: Grid, scale_dtype: torch.dtype, rotation: str | None) -> int:
        self.check(grid, rotation)
        self.check_shape(grid, *shape)
        assert isinstance(grid, Uniform | Asymmetric)
        return sum(math.prod(size) * dtype.itemsize for size, dtype in _layout(grid, shape).values())

    def config(self, rounded: Mapping[str, RoundedWeight], ignore: Sequence[str]) -> dict[str, Any]:
        """As in `CheckpointFormat`.

        Raises:
            SchemeError: as `check_mixture`.
        """
        self.check_mixture(weight.scheme for weight in rounded.values())
        grids = {name: parse_scheme(weight.scheme) for name, weight in rounded.items()}
        settings = {name: _settings(grid) for name, grid in grids.items()}
        (usual, _), *_ = Counter(settings.values()).most_common(1)
        named = {
            name: {"bits": bits, "group_size": group}
            for name, (bits, group) in settings.items()
            if (bits, group) != usual or not _inside(name) or any(other in name for other in ignore)
        }
        named |= {name: {"bits": 16} for name in ignore}
        asymmetric = any(isinstance(grid, Asymmetric) for grid in grids.values())
        return {
            "quant_method": "auto-round",
            "packing_format": "auto_round" if asymmetric else "auto_round:auto_gptq",
            "bits": usual[0],
            "group_size": usual[1],
            "sym": not asymmetric,
            "data_type": "int",
            **({"extra_config": named} if named else {}),
        }


def _whole(group: int | str | None) -> bool:
    return group % WHOLE == 0 if isinstance(group, int) else group != "tensor"


def _inside(name: str) -> bool:
    """Whether a module is in a list of blocks, by its name."""
    return any(part.isdecimal() for part in name.split("."))


def _settings(grid: Grid) -> tuple[int, int]:
    assert isinstance(grid, Uniform | Asymmetric)
    return grid.width, grid.group if isinstance(grid.group, int) else -1


def _layout(grid: Uniform | Asymmetric, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return packed_layout(grid.width, shape[1] // grid.group if isinstance(grid.group, int) else 1, shape)
