"""Symmetric integers with *signed* scales per group of columns, per output channel or for the whole weight.

Values are `q * s` with `q` in `-2^(b-1) .. 2^(b-1) - 1`. The range is longer on the negative side, so the sign of the
scale chooses which tail of a group gets the extra level: at 2 and 3 bits that and the search take 40 % off the KL of
nearest rounding, in the same file format (`docs/method.md`). A scale is searched over both signs and a line of
magnitudes for the least squared error weighted by column, then set to its closed-form optimum for the codes so found.
Cost: `2 * CANDIDATES` passes over the weights, in numba on the CPU.

Deliberately not here: zero points (`asymmetric`); the search under the full curvature (`rounding.scale` refits scales after rounding).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from roundel.errors import SchemeError
from roundel.grids.base import IntegerGrid, Scales, divisor_hint, spread
from roundel.grids.inputs import Inputs
from roundel.kernels import scales as kernels

__all__ = ["Uniform", "parse", "storable"]

CANDIDATES = 48
"""Magnitudes tried for each sign, from 0.35 to 1.05 of the smallest scale that does not clip."""


@dataclass(frozen=True, kw_only=True)
class Uniform(IntegerGrid):
    """`b`-bit symmetric integers; `group` columns share a scale: a number, all of a row ("channel") or the whole weight ("tensor")."""

    group: int | Literal["channel", "tensor"]
    rounds_inputs: bool = False
    """To 8 bits as well."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounds_inputs and (self.width != 8 or isinstance(self.group, int)):
            raise SchemeError(
                f"{self.name}: engines round inputs beside int8-channel, int8-tensor, fp8 and fp8-tensor; try int8-channel-a8"
            )

    @property
    def name(self) -> str:
        group = f"g{self.group}" if isinstance(self.group, int) else self.group
        return f"int{self.width}-{group}" + ("-a8" if self.rounds_inputs else "")

    @property
    def inputs(self) -> Inputs | None:
        return "int8" if self.rounds_inputs else None

    def check(self, d_out: int, d_in: int) -> None:
        if isinstance(self.group, int) and d_in % self.group:
            fitting = divisor_hint(d_in)
            choice = f"-g{fitting[0]} or " if fitting else ""
            raise SchemeError(f"group size {self.group} does not divide the width {d_in}; try int{self.width}{choice}-channel")

    def scale_shape(self, d_out: int, d_in: int) -> tuple[int, int]:
        """Shape of the scales."""
        self.check(d_out, d_in)
        if isinstance(self.group, int):
            return d_out, d_in // self.group
        return (d_out, 1) if self.group == "channel" else (1, 1)

    def affine(self, scales: Scales, shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, None]:
        return spread(scales["scale"].to(dtype), shape), None

    def parts(self, codes: Tensor, scales: Scales, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Tensor]:
        return {"scale": codes.to(dtype)}

    def stored(self, name: str, values: Tensor, like: Tensor) -> Tensor:
        return storable(values, like.dtype)

    def stored_bits(self, shape: tuple[int, int], dtype: torch.dtype) -> int:
        rows, columns = self.scale_shape(*shape)
        return shape[0] * shape[1] * self.width + rows * columns * dtype.itemsize * 8

    def fit_scales(self, W: Float[Tensor, "d_out d_in"], weights: Float[Tensor, " d_in"], dtype: torch.dtype) -> dict[str, Tensor]:
        rows, columns = self.scale_shape(*W.shape)
        blocks = W.reshape(rows, -1, columns, W.shape[1] // columns).transpose(1, 2)
        grouped = blocks.flatten(2)
        size = _nonzero(grouped.abs().amax(-1))  # groups are searched at size 1, where squares neither overflow nor vanish
        grouped = grouped / size.unsqueeze(-1)
        column = weights.to(W.dtype).reshape(columns, 1, -1).expand(columns, blocks.shape[2], -1).flatten(1)
        fractions = torch.linspace(0.35, 1.05, CANDIDATES)
        compiled = W.device.type == "cpu" and W.dtype == torch.float32
        best = (kernels.search if compiled else search)(grouped, column, *self.code_range, fractions)
        return {"scale": storable(best * size, dtype)}


def search(
    grouped: Float[Tensor, "rows columns size"], weights: Float[Tensor, "columns size"], low: int, high: int, fractions: Tensor
) -> Float[Tensor, "rows columns"]:
    """The best scale of each group of size about 1; specification of `kernels.scales.search`."""
    top, bottom = grouped.amax(-1).clamp(min=0), (-grouped.amin(-1)).clamp(min=0)
    best_scale = torch.zeros_like(top)
    best_gain = torch.full_like(top, -1.0)
    for sign in (1.0, -1.0):
        # The smallest magnitude that clips neither tail, given which of them has the extra level.
        positive, negative = (top, bottom) if sign > 0 else (bottom, top)
        unclipped = torch.maximum(positive / high, negative / -low)
        for fraction in fractions.tolist():
            scale = sign * fraction * unclipped
            codes = (grouped / _nonzero(scale).unsqueeze(-1)).round_().clamp_(low, high)
            # For fixed codes the best scale is <w, q> / <q, q>, and it explains <w, q>^2 / <q, q> of the weighted norm.
            cross = (weights * grouped * codes).sum(-1)
            norm = (weights * codes * codes).sum(-1)
            gain = torch.where(norm > 0, cross * cross / norm, 0.0)
            better = gain > best_gain
            best_gain = torch.where(better, gain, best_gain)
            best_scale = torch.where(better, torch.where(norm > 0, cross / norm, scale), best_scale)
    return best_scale


def _nonzero(scales: Tensor) -> Tensor:
    return torch.where(scales == 0, 1.0, scales)


def storable(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales in the stored type: finite, never zero (that of an all-zero group becomes 1), so that codes can always be found."""
    limits = torch.finfo(dtype)
    # Subnormals are fine in float16, where they are needed; elsewhere engines may flush them to zero.
    least = limits.tiny * limits.eps if dtype == torch.float16 else limits.tiny
    stored = scales.clamp(-limits.max, limits.max).to(dtype)
    smallest = torch.full_like(stored, least)
    stored = torch.where((stored.abs() < least) & (scales != 0), torch.copysign(smallest, scales.to(dtype)), stored)
    return torch.where(stored == 0, torch.ones_like(stored), stored)


def parse(name: str) -> Uniform | None:
    """The grid of a name like `int4-g128`, `int3-channel` or `int8-channel-a8`, else None."""
    found = re.fullmatch(r"int(\d+)-(?:g(\d+)|(channel)|(tensor))(-a8)?", name)
    if not found:
        return None
    group: int | Literal["channel", "tensor"] = int(found[2]) if found[2] else "channel" if found[3] else "tensor"
    return Uniform(width=int(found[1]), group=group, rounds_inputs=found[5] is not None)
