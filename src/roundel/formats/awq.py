"""AWQ, AutoAWQ's layout for its GEMM kernels, which vLLM, SGLang and Transformers read: 4 bits in groups with zero points.

For a linear of `(N, K) = (d_out, d_in)` with groups of `g` columns; everything is transposed, and eight outputs share a word:

    qweight   int32 (K, N / 8)       u = q + 8; bits 4i .. of a word are output `ORDER[i]` of its eight
    qzeros    int32 (K / g, N / 8)   z + 8 in the same order
    scales    float16 (K / g, N)

    W = (u - z) scale

`int4-gN-asym` has zero points of its own; `int4-gN` has 8 everywhere. The name says how others choose these numbers; nothing of the
activation-aware scaling of channels is in the format. Scales are float16 always, so weights are best rounded with such (`scale_dtype`).

Not done: other widths and the GEMV layouts, which few engines read; several schemes in a model, which it has no place for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from roundel.errors import ModelError, SchemeError
from roundel.formats.base import CheckpointFormat, expect, half_scales, only_grid
from roundel.formats.bits import pack_rows, unpack_rows
from roundel.grids import Grid, Uniform
from roundel.grids.asymmetric import Asymmetric
from roundel.types import RoundedWeight

__all__ = ["Awq"]

GROUPS = (32, 64, 128)

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight outputs each place of a word holds."""

PLACES = tuple(ORDER.index(output) for output in range(8))


class Awq(CheckpointFormat):
    """The format `awq`."""

    fuses = True

    loads = False

    scale_dtype = torch.float16
    """The type in which all scales are stored."""

    @property
    def name(self) -> str:
        return "awq"

    def check(self, grid: Grid, rotation: str | None) -> None:
        if rotation is not None:
            raise SchemeError(f"awq cannot hold {grid.name}, rotated ({rotation}): its readers undo no rotation; try rotate none")
        if not isinstance(grid, Uniform | Asymmetric) or grid.width != 4 or grid.group not in GROUPS:
            raise SchemeError(
                f"awq cannot hold {grid.name}: it has 4 bits in groups of 32, 64 or 128, with zero points or without; "
                "try int4-g128-asym, or the format compressed-tensors, which has 2 to 8 bits"
            )

    def check_mixture(self, schemes: Iterable[str]) -> None:
        only_grid(self.name, schemes)

    def check_shape(self, grid: Grid, d_out: int, d_in: int) -> None:
        if d_out % 8:
            raise SchemeError(f"awq: {d_out} outputs do not fill words of 8; the format compressed-tensors has no such limit")

    def pack(self, rounded: RoundedWeight) -> dict[str, Tensor]:
        grid, scales = self.check_weight(rounded), half_scales(self.name, rounded.scales["scale"])
        zeros = rounded.scales["zero_point"] if isinstance(grid, Asymmetric) else torch.zeros(scales.shape, dtype=torch.int8)
        return {"qweight": _pack(rounded.codes), "qzeros": _pack(zeros), "scales": scales.T.contiguous()}

    def unpack(self, tensors: Mapping[str, Tensor], grid: Grid, shape: tuple[int, int]) -> RoundedWeight:
        self.check(grid, None)
        grid.check(*shape)
        self.check_shape(grid, *shape)
        expect(tensors, _layout(grid, shape), f"a {grid.name} weight of shape {shape} in awq")
        scales = {"scale": tensors["scales"].T.contiguous()}
        if not scales["scale"].isfinite().all():
            raise ModelError("scales hold NaN or infinite values; the checkpoint is damaged")
        zeros = _unpack(tensors["qzeros"], shape[0])
        if isinstance(grid, Asymmetric):
            scales["zero_point"] = zeros
        elif zeros.any():
            raise ModelError(f"qzeros are not all 8: {grid.name} has no zero points")
        return RoundedWeight(scheme=grid.name, codes=_unpack(tensors["qweight"], shape[0]), scales=scales, shape=shape)

    def packed_bytes(self, shape: tuple[int, int], grid: Grid, scale_dtype: torch.dtype, rotation: str | None) -> int:
        self.check(grid, rotation)
        self.check_shape(grid, *shape)
        return sum(math.prod(size) * dtype.itemsize for size, dtype in _layout(grid, shape).values())

    def config(self, rounded: Mapping[str, RoundedWeight], ignore: Sequence[str]) -> dict[str, Any]:
        """As in `CheckpointFormat`; readers take a linear for one that is not quantized if its name contains one of the list.

        Raises:
            SchemeError: there is more than one scheme, or such a name contains another.
        """
        grid = only_grid(self.name, (weight.scheme for weight in rounded.values()))
        for name in ignore:
            if taken := next((other for other in rounded if name in other), None):
                raise SchemeError(f"awq: {name} is not quantized, and readers would take {taken} for it; try the format compressed-tensors")
        assert isinstance(grid, Uniform | Asymmetric)
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": 4,
            "group_size": grid.group,
            "zero_point": True,
            "modules_to_not_convert": list(ignore) or None,
        }


def _pack(values: Tensor) -> Tensor:
    """Signed numbers of four bits, `(d_out, columns)`."""
    return pack_rows((values.T.to(torch.int16) + 8).unflatten(1, (-1, 8))[..., ORDER].flatten(1), 4)


def _unpack(words: Tensor, d_out: int) -> Tensor:
    values: Tensor = unpack_rows(words, 4, d_out).unflatten(1, (-1, 8))[..., PLACES].flatten(1) - 8
    return values.T.to(torch.int8).contiguous()


def _layout(grid: Grid, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    assert isinstance(grid, Uniform | Asymmetric)
    assert isinstance(grid.group, int)
    (d_out, d_in), groups = shape, shape[1] // grid.group
    return {
        "qweight": ((d_in, d_out // 8), torch.int32),
        "qzeros": ((groups, d_out // 8), torch.int32),
        "scales": ((groups, d_out), torch.float16),
    }
