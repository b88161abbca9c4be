"""compressed-tensors: what vLLM and Transformers read without any code of ours.

For a linear of `(N, K)`, with `b`-bit codes `q` and groups of `g` columns (`g = K`: a scale for each row):

    pack-quantized        weight_packed int32 (N, ceil(K b / 32)): the dense bit stream of q + 2^(b-1) along K (`bits.pack_rows`);
      intB, intB-...-asym weight_scale (N, K / g), signed; weight_shape int64 [N, K]; with zero points z also
                          weight_zero_point int32 (ceil(N b / 32), K / g): the bit stream of z + 2^(b-1) along N.     W = (q - z) scale
    nvfp4-pack-quantized  weight_packed uint8 (N, K / 2): two e2m1 numbers in a byte, the first in the low half, the sign in its bit 3;
      nvfp4, nvfp4-a4     weight_scale e4m3 (N, K / 16); weight_global_scale float32 (1,);                 W = e2m1 scale / global
                          -a4: input_global_scale float32 (1,)
    mxfp4-pack-quantized  weight_packed as above; weight_scale uint8 (N, K / 32), an exponent + 127        W = e2m1 2^(scale - 127)
      mxfp4
    float-quantized       weight e4m3 (N, K); weight_scale (N, 1), or (1,) for the whole weight            W = weight scale
      fp8, fp8-tensor
    int-quantized         weight int8 (N, K); weight_scale as above                                          W = weight scale
      int8-channel-a8, int8-tensor-a8

Linears of different schemes are different `config_groups`. `intB-tensor` is written with its scale repeated for each row.

vLLM runs q, k, v and gate, up as one product each. They must share a scheme, and with `nvfp4` it takes the largest of their global scales
for all: `share_tensor_scale` makes them one. Dense packing of 3, 5, 6 and 7 bits needs compressed-tensors 0.17 or later in the reader.

Checked against compressed-tensors 0.20 and Transformers 5.23 (tests/e2e/test_other_readers.py). `-a8` and `-a4` are `input_activations`,
with scales that are made as tokens come. Not done: activations of mxfp4; 2:4 sparsity; `transform_config`, which Transformers ignores
without a word: rotated weights go to EXL3.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from roundel.errors import ModelError, SchemeError
from roundel.formats.base import CheckpointFormat, expect
from roundel.formats.bits import pack_rows, unpack_rows
from roundel.grids import Grid, Uniform, parse_scheme
from roundel.grids.asymmetric import Asymmetric
from roundel.grids.inputs import CALIBRATED, Inputs
from roundel.grids.minifloat import Fp8, MxFp4, NvFp4
from roundel.rotation import Rotation
from roundel.types import RoundedWeight

__all__ = ["CompressedTensors", "share_tensor_scale"]

FORMAT = "pack-quantized"
VERSION = "0.20.0"
"""The compressed-tensors release whose layout this is."""

Integers = Uniform | Asymmetric
"""Grids of `pack-quantized`."""

E2m1 = NvFp4 | MxFp4

_NAN = 0x7F
"""A byte of e4m3, but for its sign."""


class CompressedTensors(CheckpointFormat):
    """The format `compressed-tensors`."""

    fuses = True
    rounds_inputs = True
    cache_scheme: Mapping[str, Any] = {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "strategy": "tensor",
        "group_size": None,
        "dynamic": False,
        "actorder": None,
    }

    @property
    def name(self) -> str:
        return "compressed-tensors"

    def check(self, grid: Grid, rotation: str | None) -> None:
        if rotation is not None:
            raise SchemeError(
                f"compressed-tensors cannot hold {grid.name}, rotated ({rotation}): Transformers does not undo rotations; "
                "try rotate none, or trellis schemes with rotate hadamard128 in the format exl3"
            )
        if not isinstance(grid, Integers | E2m1 | Fp8):
            nearest = f"int{min(8, max(2, math.ceil(grid.bits)))}-g128"
            raise SchemeError(
                f"compressed-tensors cannot hold {grid.name}: vLLM reads integers of 2 to 8 bits, nvfp4, mxfp4 and fp8 in it; "
                f"try {nearest}, or the format gguf or exl3"
            )

    def together(self, rounded: Mapping[str, RoundedWeight]) -> dict[str, RoundedWeight]:
        """vLLM multiplies fused `nvfp4` linears by one tensor scale, so they get one."""
        if all("tensor_scale" in weight.scales for weight in rounded.values()):
            return share_tensor_scale(rounded)
        return dict(rounded)

    def pack(self, rounded: RoundedWeight) -> dict[str, Tensor]:
        grid, codes, scales = parse_scheme(rounded.scheme), rounded.codes, rounded.scales
        self.check(grid, rounded.rotation.kind if isinstance(rounded.rotation, Rotation) else None)
        match grid:
            case Uniform(rounds_inputs=True):
                return {"weight": codes.contiguous(), "weight_scale": _of_channels(scales["scale"], grid)}
            case Uniform():
                return {
                    "weight_packed": pack_rows(codes.to(torch.int16) + 2 ** (grid.bits - 1), grid.bits),
                    "weight_scale": scales["scale"].expand(len(codes), -1).contiguous(),
                    "weight_shape": torch.tensor(rounded.shape, dtype=torch.int64),
                }
            case Asymmetric():
                offset = 2 ** (grid.bits - 1)
                return {
                    "weight_packed": pack_rows(codes.to(torch.int16) + offset, grid.bits),
                    "weight_scale": scales["scale"].contiguous(),
                    "weight_zero_point": pack_rows(scales["zero_point"].T.to(torch.int16) + offset, grid.bits).T.contiguous(),
                    "weight_shape": torch.tensor(rounded.shape, dtype=torch.int64),
                }
            case NvFp4():
                inverse = 1 / scales["tensor_scale"].reshape(1)
                assert torch.equal(torch.frexp(inverse).mantissa, torch.full((1,), 0.5)), "the tensor scale is a power of two"
                own = {"weight_packed": _pack_e2m1(codes), "weight_scale": scales["scale"].contiguous(), "weight_global_scale": inverse}
                return own | ({CALIBRATED: scales[CALIBRATED].reshape(1).contiguous()} if grid.rounds_inputs else {})
            case MxFp4():
                return {"weight_packed": _pack_e2m1(codes), "weight_scale": scales["scale"].contiguous()}
            case Fp8():
                return {
                    "weight": grid.units(codes, torch.float32).to(torch.float8_e4m3fn),
                    "weight_scale": _of_channels(scales["scale"], grid),
                }
        raise AssertionError(grid.name)

    def unpack(self, tensors: Mapping[str, Tensor], grid: Grid, shape: tuple[int, int]) -> RoundedWeight:
        self.check(grid, None)
        grid.check(*shape)
        _expect(tensors, self._layout(grid, shape), grid, shape)
        match grid:
            case Uniform(rounds_inputs=True):
                scales = {"scale": tensors["weight_scale"].reshape(-1, 1)}
                codes = tensors["weight"]
            case Uniform() | Asymmetric():
                return _unpack_integers(tensors, grid, shape)
            case NvFp4():
                inverse = tensors["weight_global_scale"]
                if not torch.equal(torch.frexp(inverse).mantissa, torch.full((1,), 0.5)) or not torch.isfinite(1 / inverse).all():
                    raise ModelError(f"weight_global_scale is {inverse.item():g}: {grid.name} of Roundel has a power of two there")
                codes = _unpack_e2m1(tensors["weight_packed"])
                scales = {"scale": tensors["weight_scale"], "tensor_scale": (1 / inverse).reshape(1, 1)}
                if grid.rounds_inputs:
                    scales[CALIBRATED] = tensors[CALIBRATED].reshape(1, 1)
                    if not 0 < scales[CALIBRATED].item() < math.inf:
                        raise ModelError(f"{CALIBRATED} is {scales[CALIBRATED].item():g}: expected a positive number")
            case MxFp4():
                codes, scales = _unpack_e2m1(tensors["weight_packed"]), {"scale": tensors["weight_scale"]}
            case _:
                assert isinstance(grid, Fp8)
                scales = {"scale": tensors["weight_scale"].reshape(-1, 1)}
                codes = _e4m3_codes(tensors["weight"])
        return RoundedWeight(scheme=grid.name, codes=codes, scales=scales, shape=shape)

    def packed_bytes(self, shape: tuple[int, int], grid: Grid, scale_dtype: torch.dtype, rotation: str | None) -> int:
        self.check(grid, rotation)
        layout = self._layout(grid, shape).values()
        return sum(math.prod(size) * (dtype or scale_dtype).itemsize for size, dtype in layout)

    def config(self, rounded: Mapping[str, RoundedWeight], ignore: Sequence[str]) -> dict[str, Any]:
        members: dict[str, list[str]] = {}
        for name, weight in rounded.items():
            members.setdefault(weight.scheme, []).append(name)
        alone = ["Linear", *sorted(name for name in rounded if not _in_a_layer(name))]  # vLLM's class of output heads has another name
        groups = {  # one group alone is of all linears that are not ignored
            f"group_{index}": _group(parse_scheme(scheme), alone if len(members) == 1 else sorted(names))
            for index, (scheme, names) in enumerate(sorted(members.items()))
        }
        formats = {group["format"] for group in groups.values()}
        return {
            "quant_method": "compressed-tensors",
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "kv_cache_scheme": None,
            "ignore": sorted(ignore),
            "sparsity_config": {},
            "transform_config": {},
            "version": VERSION,
            "config_groups": groups,
        }

    def _layout(self, grid: Grid, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        """Shape and type of each tensor; None: that of free scales."""
        d_out, d_in = shape
        match grid:
            case Uniform(rounds_inputs=True):
                return {"weight": (shape, torch.int8), "weight_scale": ((d_out, 1) if grid.group == "channel" else (1,), None)}
            case Uniform() | Asymmetric():
                groups = d_in // grid.group if isinstance(grid.group, int) else 1
                layout: dict[str, tuple[tuple[int, ...], torch.dtype | None]] = {
                    "weight_packed": ((d_out, -(-d_in * grid.bits // 32)), torch.int32),
                    "weight_scale": ((d_out, groups), None),
                    "weight_shape": ((2,), torch.int64),
                }
                if isinstance(grid, Asymmetric):
                    layout["weight_zero_point"] = ((-(-d_out * grid.bits // 32), groups), torch.int32)
                return layout
            case NvFp4():
                return {
                    "weight_packed": ((d_out, d_in // 2), torch.uint8),
                    "weight_scale": ((d_out, d_in // 16), torch.float8_e4m3fn),
                    **dict.fromkeys(["weight_global_scale", *[CALIBRATED] * grid.rounds_inputs], ((1,), torch.float32)),
                }
            case MxFp4():
                return {"weight_packed": ((d_out, d_in // 2), torch.uint8), "weight_scale": ((d_out, d_in // 32), torch.uint8)}
            case Fp8():
                return {
                    "weight": (shape, torch.float8_e4m3fn),
                    "weight_scale": ((d_out, 1) if grid.scope == "channel" else (1,), None),
                }
        raise AssertionError(grid.name)


def share_tensor_scale(parts: Mapping[str, RoundedWeight]) -> dict[str, RoundedWeight]:
    """`nvfp4` weights that an engine runs as one product, with the largest of their tensor scales for all.

    The scale of each group becomes smaller by that power of two. That is exact unless it becomes subnormal in e4m3, in groups some `2^-13`
    as large as the largest weight of all; those scales are rounded, none of them to zero.
    """
    largest = torch.stack([part.scales["tensor_scale"] for part in parts.values()]).amax(0)
    return {name: _with_tensor_scale(part, largest) for name, part in parts.items()}


def _with_tensor_scale(part: RoundedWeight, shared: Tensor) -> RoundedWeight:
    scale = part.scales["scale"].float() * (part.scales["tensor_scale"] / shared)
    kept = scale.clamp(min=2.0**-9).to(torch.float8_e4m3fn)
    return dataclasses.replace(part, scales={**part.scales, "scale": kept, "tensor_scale": shared.clone()})


def _in_a_layer(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


def _group(grid: Grid, targets: list[str]) -> dict[str, Any]:
    layout, weights = _arguments(grid)
    return {
        "targets": targets,
        "format": layout,
        "input_activations": None if grid.inputs is None else _dynamic(grid.inputs),
        "output_activations": None,
        "weights": {"symmetric": True, "group_size": None, "dynamic": False, "actorder": None, **weights},
    }


def _arguments(grid: Grid) -> tuple[str, dict[str, Any]]:
    """The format of a grid, and what is particular to its weights."""
    match grid:
        case Uniform(rounds_inputs=True):
            return "int-quantized", {"num_bits": 8, "type": "int", "strategy": grid.group}
        case Uniform() | Asymmetric():
            grouped = {"strategy": "group", "group_size": grid.group} if isinstance(grid.group, int) else {"strategy": "channel"}
            return FORMAT, {"num_bits": grid.bits, "type": "int", "symmetric": isinstance(grid, Uniform), **grouped}
        case NvFp4():
            kinds = dict.fromkeys(("scale_dtype", "zp_dtype"), "torch.float8_e4m3fn")
            return "nvfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, **kinds}
        case MxFp4():
            kinds = dict.fromkeys(("scale_dtype", "zp_dtype"), "torch.uint8")
            return "mxfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, **kinds}
        case Fp8():
            return "float-quantized", {"num_bits": 8, "type": "float", "strategy": grid.scope}
    raise AssertionError(grid.name)


def _dynamic(inputs: Inputs) -> dict[str, Any]:
    """Inputs with scales that are made as tokens come."""
    if inputs == "nvfp4":
        own = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "dynamic": "local"}
        return {**own, "symmetric": True, "actorder": None, **dict.fromkeys(("scale_dtype", "zp_dtype"), "torch.float8_e4m3fn")}
    kind = "int" if inputs == "int8" else "float"
    return {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "token", "group_size": None, "dynamic": True, "actorder": None}


def _of_channels(scale: Tensor, grid: Uniform | Fp8) -> Tensor:
    """A scale for each row as it is, that of a whole weight alone."""
    whole = (grid.group if isinstance(grid, Uniform) else grid.scope) == "tensor"
    return (scale.reshape(1) if whole else scale).contiguous()


def _expect(
    tensors: Mapping[str, Tensor],
    layout: Mapping[str, tuple[tuple[int, ...], torch.dtype | None]],
    grid: Grid,
    shape: tuple[int, int],
) -> None:
    """Refuses tensors of other names, shapes or types than `layout`, other sizes than `shape`, or scales that are no numbers."""
    whose = f"a {grid.name} weight of shape {shape} in compressed-tensors"
    expect(tensors, layout, whose)
    if "weight_shape" in tensors and tensors["weight_shape"].tolist() != list(shape):
        raise ModelError(f"weight_shape is {tensors['weight_shape'].tolist()}: expected {list(shape)}")
    scale = tensors["weight_scale"]
    if not (scale != 255 if scale.dtype == torch.uint8 else scale.float().isfinite()).all():
        raise ModelError(f"weight_scale of {whose} holds NaN or infinite values; the checkpoint is damaged")


def _unpack_integers(tensors: Mapping[str, Tensor], grid: Integers, shape: tuple[int, int]) -> RoundedWeight:
    offset, scale = 2 ** (grid.bits - 1), tensors["weight_scale"]
    codes = (unpack_rows(tensors["weight_packed"], grid.bits, shape[1]) - offset).to(torch.int8)
    scales = {"scale": scale}
    if isinstance(grid, Asymmetric):
        zero_point = unpack_rows(tensors["weight_zero_point"].T.contiguous(), grid.bits, shape[0]).T - offset
        scales["zero_point"] = zero_point.to(torch.int8).contiguous()
    elif grid.group == "tensor":
        if not (scale == scale[:1]).all():
            raise ModelError(f"weight_scale differs from row to row: {grid.name} has one scale for the weight")
        scales["scale"] = scale[:1].clone()
    return RoundedWeight(scheme=grid.name, codes=codes, scales=scales, shape=shape)


def _pack_e2m1(codes: Tensor) -> Tensor:
    """Codes -7 .. 7, the number of the level with its sign, as sign and magnitude."""
    nibbles = torch.where(codes < 0, 8 - codes, codes).to(torch.uint8)
    return nibbles[:, ::2] | nibbles[:, 1::2] << 4


def _unpack_e2m1(packed: Tensor) -> Tensor:
    nibbles = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1).to(torch.int8)
    return torch.where(nibbles > 7, 8 - nibbles, nibbles)


def _e4m3_codes(weight: Tensor) -> Tensor:
    """The number of each value, counted from zero, with its sign: the byte without the sign's bit.

    Raises:
        ModelError: a value is NaN.
    """
    stored = weight.view(torch.uint8)
    size = (stored & 0x7F).to(torch.int8)
    if (size == _NAN).any():
        raise ModelError("weight holds NaN; the checkpoint is damaged")
    return torch.where(stored > 0x7F, -size, size)
