"""What a linear reads, rounded to 8 bits as engines do it while they run: the second half of schemes that end in `-a8`.

Each token has a scale of its own, made when it comes, so that its largest number is the largest that 8 bits hold; nothing is calibrated or
stored. `int8` is `max / 127.5` and -128 .. 127, as compressed-tensors has it (vLLM's kernels divide by 127, which makes no difference that
can be measured), `fp8` is e4m3fn up to 448. Cost: a few elementwise passes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["INPUTS", "Inputs", "round_inputs"]

Inputs = Literal["int8", "fp8"]


def _int8(units: Tensor) -> Tensor:
    return units.round().clamp(-128, 127)


def _fp8(units: Tensor) -> Tensor:
    return units.clamp(-448, 448).to(torch.float8_e4m3fn).to(units.dtype)


INPUTS: dict[Inputs, tuple[float, Callable[[Tensor], Tensor]]] = {"int8": (127.5, _int8), "fp8": (448.0, _fp8)}
"""The size of the largest number of a token in units of its scale, and the rounding of units."""


def round_inputs(x: Float[Tensor, "*tokens d_in"], kind: Inputs) -> Float[Tensor, "*tokens d_in"]:
    """Inputs of a linear as its product sees them, in their type."""
    largest, nearest = INPUTS[kind]
    scale = x.float().abs().amax(-1, keepdim=True) / largest
    scale = torch.where(scale == 0, 1.0, scale)
    return (nearest(x.float() / scale) * scale).to(x.dtype)
