"""MLX, the format of mlx-lm on Apple's machines: integers of 2 to 8 bits in groups of 32, 64 or 128 columns, with a scale and a bias each.

For a linear of `(N, K) = (d_out, d_in)` with `b`-bit codes `q` in groups of `g` columns:

    weight   uint32 (N, K b / 32)   q + 2^(b-1) along K, a stream of bits from the least significant on, which crosses words
    scales   16 bits (N, K / g)     of either sign
    biases   16 bits (N, K / g)     the value of the code 0

    W = u scale + bias

Symmetric schemes have the bias `-2^(b-1) scale`, which is exact in any type; `intB-gN-affine` has one of its own. Those with zero points do
not fit: a zero point times its scale has more bits than a bias.

config.json has `quantization`, with bits and group size of most linears and those of others by name. What has no scales is not quantized,
the embedding and the output head among it (mlx-lm's own files have them in the same bits as the rest).

Not done: 7 bits, which MLX lacks; its other modes (mxfp4, nvfp4).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from roundel.errors import ModelError, SchemeError
from roundel.formats.base import CheckpointFormat, expect
from roundel.formats.bits import pack_rows, unpack_rows
from roundel.grids import Grid, Uniform, parse_scheme
from roundel.grids.affine import Affine
from roundel.types import RoundedWeight

__all__ = ["Mlx"]

WIDTHS, GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)


class Mlx(CheckpointFormat):
    """The format `mlx`."""

    section = "quantization"

    loads = False

    @property
    def name(self) -> str:
        return "mlx"

    def check(self, grid: Grid, rotation: str | None) -> None:
        if rotation is not None:
            raise SchemeError(f"mlx cannot hold {grid.name}, rotated ({rotation}): its readers undo no rotation; try rotate none")
        if not isinstance(grid, Uniform | Affine) or grid.width not in WIDTHS or grid.group not in GROUPS:
            raise SchemeError(
                f"mlx cannot hold {grid.name}: it has integers of 2, 3, 4, 5, 6 or 8 bits in groups of 32, 64 or 128, "
                "symmetric or with biases; try int4-g64 or int4-g64-affine"
            )

    def pack(self, rounded: RoundedWeight) -> dict[str, Tensor]:
        grid = self.check_weight(rounded)
        assert isinstance(grid, Uniform | Affine)
        middle, scale = 2 ** (grid.width - 1), rounded.scales["scale"]
        bias = rounded.scales["bias"] if isinstance(grid, Affine) else -middle * scale
        if not bias.isfinite().all():
            raise SchemeError(f"mlx: scales of {scale.abs().max().item():.1e} times {middle} are beyond {scale.dtype}; try bfloat16")
        return {
            "weight": pack_rows(rounded.codes.to(torch.int16) + middle, grid.width).view(torch.uint32),
            "scales": scale.contiguous(),
            "biases": bias.contiguous(),
        }

    def unpack(self, tensors: Mapping[str, Tensor], grid: Grid, shape: tuple[int, int]) -> RoundedWeight:
        self.check(grid, None)
        grid.check(*shape)
        assert isinstance(grid, Uniform | Affine)
        expect(tensors, _layout(grid, shape), f"a {grid.name} weight of shape {shape} in mlx")
        middle, scale, bias = 2 ** (grid.width - 1), tensors["scales"], tensors["biases"]
        if not (scale.isfinite().all() and bias.isfinite().all()):
            raise ModelError("scales or biases hold NaN or infinite values; the checkpoint is damaged")
        scales = {"scale": scale}
        if isinstance(grid, Affine):
            scales["bias"] = bias
        elif not torch.equal(bias, -middle * scale):
            raise ModelError(f"biases are not -{middle} times the scales: {grid.name} is symmetric")
        codes = unpack_rows(tensors["weight"].view(torch.int32), grid.width, shape[1]) - middle
        return RoundedWeight(scheme=grid.name, codes=codes.to(torch.int8), scales=scales, shape=shape)

    def packed_bytes(self, shape: tuple[int, int], grid: Grid, scale_dtype: torch.dtype, rotation: str | None) -> int:
        self.check(grid, rotation)
        assert isinstance(grid, Uniform | Affine)
        return sum(math.prod(size) * (dtype or scale_dtype).itemsize for size, dtype in _layout(grid, shape).values())

    def wrote(self, config: Mapping[str, Any]) -> bool:
        return self.section in config

    def config(self, rounded: Mapping[str, RoundedWeight], ignore: Sequence[str]) -> dict[str, Any]:
        settings = {name: _settings(weight.scheme) for name, weight in rounded.items()}
        (usual, _), *_ = Counter(settings.values()).most_common(1)
        others = {name: {"group_size": group, "bits": bits} for name, (group, bits) in settings.items() if (group, bits) != usual}
        return {"group_size": usual[0], "bits": usual[1], "mode": "affine", **others}


def _settings(scheme: str) -> tuple[int, int]:
    grid = parse_scheme(scheme)
    assert isinstance(grid, Uniform | Affine)
    assert isinstance(grid.group, int)
    return grid.group, grid.width


def _layout(grid: Uniform | Affine, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
    (d_out, d_in), group = shape, grid.group
    assert isinstance(group, int)
    return {
        "weight": ((d_out, d_in * grid.width // 32), torch.uint32),
        "scales": ((d_out, d_in // group), None),
        "biases": ((d_out, d_in // group), None),
    }
