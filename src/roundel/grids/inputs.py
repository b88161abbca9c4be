"""What engines round while they run: what linears read, the second half of schemes that end in `-a8` or `-a4`, and keys and values.

Scales are made when a token comes, so that the largest number of the token, or of 16 columns of it, is the largest that the bits hold:

    int8    x = q s, q in -128 .. 127, s = max / 127.5 (compressed-tensors; vLLM's kernels divide by 127, which cannot be told apart)
    fp8     x = q s, q in e4m3fn, s = max / 448
    nvfp4   x = q s / c, q in e2m1, s = c max / 6 in e4m3fn for 16 columns, with one number c for the linear that does not change

Only `c` is stored: 448 * 6 over the largest input that the original has on some calibration text; where more comes, it is clipped. Keys and
values that are kept in e4m3fn have a scale each for every attention, found likewise. Cost: a few elementwise passes.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from roundel.grids.search import nearest_e4m3, nonzero

__all__ = ["CALIBRATED", "Inputs", "cache_scale", "calibrated_scale", "round_inputs", "round_to_fp8"]

Inputs = Literal["int8", "fp8", "nvfp4"]

CALIBRATED = "input_global_scale"
"""The name of `c` among a weight's scales."""

GROUP = 16
"""Columns of nvfp4."""
BETWEEN = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
"""Numbers half-way between those of e2m1; every second one goes up, to the even significand."""


def calibrated_scale(largest: float) -> float:
    """`c` for inputs of this size: a number that bfloat16 holds, so that models in that type have the very same."""
    mantissa, exponent = math.frexp(448 * 6 / largest if largest > 0 else 1.0)
    return min(math.ldexp(math.floor(mantissa * 256), exponent - 8), 2.0**100)


def round_inputs(x: Float[Tensor, "*tokens d_in"], kind: Inputs, calibrated: float = 1.0) -> Float[Tensor, "*tokens d_in"]:
    """Inputs of a linear as its product sees them, in their type; `calibrated` is `c`."""
    wide = x.float()
    match kind:
        case "int8":
            scale = nonzero(wide.abs().amax(-1, keepdim=True) / 127.5)
            found = (wide / scale).round().clamp(-128, 127) * scale
        case "fp8":
            scale = nonzero(wide.abs().amax(-1, keepdim=True) / 448)
            found = nearest_e4m3(wide / scale) * scale
        case "nvfp4":
            groups = wide.unflatten(-1, (-1, GROUP))
            scale = nonzero(nearest_e4m3(calibrated * (groups.abs().amax(-1, keepdim=True) / 6))) / calibrated
            found = (_e2m1(groups / scale) * scale).flatten(-2)
    return found.to(x.dtype)


def cache_scale(largest: float) -> float:
    """The scale with which e4m3fn holds numbers up to this size, in bfloat16."""
    mantissa, exponent = math.frexp(largest / 448 if largest > 0 else 1.0)
    return max(math.ldexp(math.ceil(mantissa * 256), exponent - 8), 2.0**-100)


def round_to_fp8(x: Float[Tensor, "..."], scale: float) -> Float[Tensor, "..."]:
    """Numbers as e4m3fn holds them with a scale that does not change, in their type."""
    return (nearest_e4m3(x.float() / scale) * scale).to(x.dtype)


def _e2m1(units: Tensor) -> Tensor:
    size, levels = units.abs(), torch.tensor((0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0), device=units.device)
    above = [size >= edge if place % 2 else size > edge for place, edge in enumerate(BETWEEN)]
    return levels[torch.stack(above).sum(0)].copysign(units)
