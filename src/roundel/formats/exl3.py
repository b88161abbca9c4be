"""EXL3, the trellis format of exllamav3: weights of `trellisB` grids under the rotation `hadamard128`, to the last bit.

For a linear of `(d_out, d_in)`, in which `N` and `K` are these widths up to the next multiple of 128, with `B` bits a weight:

    trellis       int16 (K / 16, N / 16, 16 B)   tile (a, b) is of inputs 16 a .. and outputs 16 b ..: its 256 symbols of B bits in the
                                                 order of the trellis, as `bits.pack_tiles` lays them out
    suh, svh      float16 (K,), (N,)             signs of the two sides, times scales whose product is that of the grid
    mul1 or mcg   int32 ()                       which code the states stand for, by its multiplier; neither: 3inst

    W = diag(svh) H T^T H diag(suh),     H = I kron H_128 orthonormal,     T[a, b] the decoded tiles

of which the first `d_out` rows and `d_in` columns are the weight. exllamav3 gives the other inputs zeros; `svh` is zero for the other
outputs, and so are biases there, so that whoever does not cut them off goes on with zeros.

This is `Rotation.restore_weight(scale * T^T)` with `svh = signs_out * 2^e`, `suh = signs_in * scale / 2^e`: exact, since a tile grid's
scale has 11 significant bits, and is a power of two where tuned vectors stand in place of the signs. Engines compute `H (x * suh)` and
`y / svh` in float16, so `e = 0` unless `suh` would leave its normal range.
A weight whose scale is below `2^-38` is written as zeros, which is what engines make of it: no entry reaches half of the least float16.

exllamav3 looks at the tensors alone. Other readers want `quantization_config` with a `tensor_storage`, which names every quantized module
and each of its tensors, and quantization_config.json beside it with the same.

Not done: `lm_head` in a tied model; modules that Transformers fuses and exllamav3 does not (`qkv_proj`, `gate_up_proj`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from roundel.errors import ModelError, SchemeError
from roundel.formats.base import CheckpointFormat, expect
from roundel.formats.bits import pack_tiles, unpack_tiles
from roundel.grids import Grid, parse_scheme
from roundel.grids.trellis import SIZE, Trellis
from roundel.rotation import Rotation, rotated_shape
from roundel.types import RoundedWeight

__all__ = ["Exl3"]

VERSION = "1.4.1"
"""The exllamav3 release whose layout this is."""

MARKERS = {"mul1": 0x83DCD12D, "mcg": 0xCBAC1FED, "3inst": None}
"""Codes that exllamav3 decodes, and the multiplier that says so."""

STATE_BITS = 16
ROTATION = "hadamard128"
BLOCK = 128
TILE = 16

FUSED = ("qkv_proj", "gate_up_proj", "query_key_value")

INPUT_EXPONENTS = (-13, 16)
"""Of normal float16 numbers, as `frexp` counts them."""

MARGIN = 3
"""Powers of two that tuned vectors may be away from 1 and still be normal float16 numbers."""

OUTPUT_EXPONENTS = (-24, 15)
"""Of powers of two in float16."""


class Exl3(CheckpointFormat):
    """The format `exl3`."""

    fuses = False

    loads = False

    @property
    def name(self) -> str:
        return "exl3"

    def check(self, grid: Grid, rotation: str | None) -> None:
        if not isinstance(grid, Trellis):
            nearest = min(8, max(1, round(grid.bits)))
            raise SchemeError(f"exl3 cannot hold {grid.name}: exllamav3 reads trellises of 1 to 8 bits; try trellis{nearest}")
        if grid.code not in MARKERS or grid.state_bits != STATE_BITS:
            raise SchemeError(
                f"exl3 cannot hold {grid.name}: exllamav3 decodes the codes {', '.join(MARKERS)} with {STATE_BITS} state bits; "
                f"try trellis{grid.width}"
            )
        if rotation != ROTATION:
            raise SchemeError(
                f"exl3 cannot hold a weight that was rotated with {rotation or 'nothing'}: exllamav3 applies Hadamard transforms of "
                f"{BLOCK} on both sides; try rotate {ROTATION}"
            )

    def outputs(self, d_out: int) -> int:
        return rotated_shape(ROTATION, (d_out, d_out))[0]

    def check_names(self, names: Iterable[str]) -> None:
        """Refuses modules that exllamav3 knows by other names.

        Raises:
            SchemeError: one holds what exllamav3 reads as several.
        """
        fused = sorted(name for name in names if name.rpartition(".")[2] in FUSED)
        if fused:
            raise SchemeError(f"exl3: exllamav3 reads the parts of {fused[0]} as linears of their own; try compressed-tensors or gguf")

    def pack(self, rounded: RoundedWeight) -> dict[str, Tensor]:
        grid, rotation = parse_scheme(rounded.scheme), rounded.rotation
        self.check(grid, rotation.kind if isinstance(rotation, Rotation) else None)
        assert isinstance(grid, Trellis)
        assert isinstance(rotation, Rotation)
        scale_in, scale_out = _split(rounded.scales["scale"].item(), margin=MARGIN if rotation.has_vectors else 0)
        symbols = rounded.codes.to(torch.uint8).transpose(0, 1)
        svh = rotation.signs_out.to(torch.float16) * scale_out
        svh[rounded.shape[0] :] = 0
        tensors = {
            "trellis": pack_tiles(symbols, grid.width),
            "suh": rotation.signs_in.to(torch.float16) * scale_in,
            "svh": svh,
        }
        marker = MARKERS[grid.code]
        return tensors if marker is None else {**tensors, grid.code: torch.tensor(_signed(marker), dtype=torch.int32)}

    def unpack(self, tensors: Mapping[str, Tensor], grid: Grid, shape: tuple[int, int]) -> RoundedWeight:
        self.check(grid, ROTATION)
        assert isinstance(grid, Trellis)
        expect(tensors, _layout(grid, shape), f"a {grid.name} weight of shape {shape} in exl3")
        marker = MARKERS[grid.code]
        if marker is not None and tensors[grid.code].item() != _signed(marker):
            raise ModelError(f"{grid.code} is {tensors[grid.code].item()}: expected {_signed(marker)}")
        (scale_in, signs_in), (scale_out, signs_out) = (
            _signs(name, tensors[name], d) for name, d in (("suh", shape[1]), ("svh", shape[0]))
        )
        return RoundedWeight(
            scheme=grid.name,
            codes=unpack_tiles(tensors["trellis"], grid.width).transpose(0, 1).contiguous(),
            scales={"scale": torch.full((1, 1), scale_in * scale_out)},
            shape=shape,
            rotation=Rotation(kind=ROTATION, shape=shape, signs_out=signs_out, signs_in=signs_in),
        )

    def packed_bytes(self, shape: tuple[int, int], grid: Grid, scale_dtype: torch.dtype, rotation: str | None) -> int:
        self.check(grid, rotation)
        assert isinstance(grid, Trellis)
        return sum(math.prod(size) * dtype.itemsize for size, dtype in _layout(grid, shape).values())

    def config(self, rounded: Mapping[str, RoundedWeight], ignore: Sequence[str]) -> dict[str, Any]:
        """As in `CheckpointFormat`. `calibration` counts what exllamav3 itself would have seen: none.

        Raises:
            SchemeError: linears have different codes, or names that exllamav3 does not know.
        """
        self.check_names(rounded)
        grids = {name: grid for name, weight in rounded.items() if isinstance(grid := parse_scheme(weight.scheme), Trellis)}
        codes = sorted({grid.code for grid in grids.values()})
        if len(codes) != 1:
            raise SchemeError(f"exl3: linears with the codes {', '.join(codes)}: exllamav3 needs one code for the whole model")
        heads = [grid.width for name, grid in grids.items() if _is_head(name)]
        sizes = {name: math.prod(rounded[name].shape) for name in grids}
        body = {name: grid for name, grid in grids.items() if not _is_head(name)} or grids
        bits = sum(sizes[name] * grid.width for name, grid in body.items()) / sum(sizes[name] for name in body)
        return {
            "quant_method": "exl3",
            "version": VERSION,
            "bits": round(bits, 2),
            "head_bits": heads[0] if heads else None,
            "calibration": {"rows": 0, "cols": 0},
            "out_scales": "always",
            "codebook": codes[0],
            "tensor_storage": {name: _storage(name, grid, rounded[name].shape) for name, grid in grids.items()},
        }

    def files(self, rounded: Mapping[str, RoundedWeight], tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
        return {"quantization_config.json": self.config(rounded, [])}


def _layout(grid: Trellis, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    d_out, d_in = rotated_shape(ROTATION, shape)
    layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "trellis": ((d_in // TILE, d_out // TILE, SIZE * grid.width // 16), torch.int16),
        "suh": ((d_in,), torch.float16),
        "svh": ((d_out,), torch.float16),
    }
    return layout if MARKERS[grid.code] is None else {**layout, grid.code: ((), torch.int32)}


def _storage(name: str, grid: Trellis, shape: tuple[int, int]) -> dict[str, Any]:
    """What `tensor_storage` says of a module; `dtype` is for exllamav3, `torch_dtype` for GPTQModel."""
    stored = {
        f"{name}.{part}": {
            "shape": list(size),
            "n_bytes": math.prod(size) * dtype.itemsize,
            "dtype": str(dtype),
            "torch_dtype": str(dtype).removeprefix("torch."),
        }
        for part, (size, dtype) in _layout(grid, shape).items()
    }
    entry = {"stored_tensors": stored, "quant_format": "exl3", "bits_per_weight": grid.width}
    marker = MARKERS[grid.code]
    return entry if marker is None else {**entry, f"{grid.code}_multiplier": marker}


def _is_head(name: str) -> bool:
    return name.rpartition(".")[2] == "lm_head"


def _signed(word: int) -> int:
    """As int32."""
    return word - (1 << 32) if word >> 31 else word


def _split(scale: float, margin: int = 0) -> tuple[float, float]:
    """Factors of the scale for the input and the output side, both in float16; the latter is a power of two, 1 if possible, or zero.

    Raises:
        SchemeError: there are none.
    """
    mantissa, exponent = math.frexp(scale)
    if (mantissa * 2**11) % 1:
        raise SchemeError(f"exl3: the scale {scale!r} has more than the 11 significant bits of float16; round the weight again")
    kept = min(max(exponent, INPUT_EXPONENTS[0] + margin), INPUT_EXPONENTS[1] - margin)
    if exponent - kept > OUTPUT_EXPONENTS[1]:
        raise SchemeError(f"exl3: a weight of size {abs(scale):.1e} is beyond float16, in which exllamav3 computes; leave it as it is")
    if exponent - kept < OUTPUT_EXPONENTS[0] or scale == 0:
        return 1.0, 0.0
    return math.ldexp(mantissa, kept), math.ldexp(1.0, exponent - kept)


def _signs(name: str, values: Tensor, width: int) -> tuple[float, Tensor]:
    """The one magnitude of a vector, and its signs; 1 and the vector, if it has several. Zeros beyond the width become 1.

    Raises:
        ModelError: a number is not finite, or zero among others that are not.
    """
    size = values[0].abs().item()
    if not torch.isfinite(values).all():
        raise ModelError(f"{name} holds NaN or infinite values; the checkpoint is damaged")
    if not (values[:width].abs() == size).all():
        if not values[:width].all():
            raise ModelError(f"{name} holds zeros among other numbers: no tuned weight of Roundel has any")
        return 1.0, torch.where(values == 0, 1, values)
    return size, torch.where(torch.signbit(values), -1, 1).to(torch.int8)
