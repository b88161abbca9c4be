"""Symmetric integers with *signed* scales per group of columns or per output channel.

Values are `q * s` with `q` in `-2^(b-1) .. 2^(b-1) - 1`. The range is longer on the negative side, so the sign of the
scale chooses which tail of a group gets the extra level: at 2 and 3 bits that and the search take 40 % off the KL of
nearest rounding, in the same file format (`docs/method.md`). A scale is searched over both signs and a line of
magnitudes for the least squared error weighted by column, then set to its closed-form optimum for the codes so found.
Cost: `2 * CANDIDATES` passes over the weights, in numba on the CPU.

Deliberately not here: zero points; the search under the full curvature (`rounding.scale` refits scales after rounding).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from roundel.errors import SchemeError
from roundel.grids.base import Grid

__all__ = ["Uniform", "parse", "storable"]

CANDIDATES = 48
"""Magnitudes tried for each sign, from 0.35 to 1.05 of the smallest scale that does not clip."""


@dataclass(frozen=True, kw_only=True)
class Uniform(Grid):
    """`b`-bit symmetric integers; `group` columns share a scale, all of them where `group` is None ("channel")."""

    width: int
    group: int | None

    def __post_init__(self) -> None:
        if not 2 <= self.width <= 8:
            raise SchemeError(f"int{self.width}: integers have 2 to 8 bits")
        if self.group is not None and self.group < 1:
            raise SchemeError(f"group size {self.group}: expected a positive number of columns")

    @property
    def name(self) -> str:
        return f"int{self.width}-" + ("channel" if self.group is None else f"g{self.group}")

    @property
    def bits(self) -> int:
        return self.width

    @property
    def code_range(self) -> tuple[int, int]:
        return -(2 ** (self.width - 1)), 2 ** (self.width - 1) - 1

    def group_size(self, d_in: int) -> int:
        if self.group is None:
            return d_in
        if d_in % self.group:
            fitting = [size for size in (256, 128, 64, 32, 16, 8, 4) if d_in % size == 0]
            choice = f"-g{fitting[0]} or " if fitting else ""
            raise SchemeError(f"group size {self.group} does not divide the width {d_in}; try int{self.width}{choice}-channel")
        return self.group

    def fit_scales(
        self, W: Float[Tensor, "d_out d_in"], weights: Float[Tensor, " d_in"], dtype: torch.dtype
    ) -> Float[Tensor, "d_out groups"]:
        grouped = W.unflatten(1, (-1, self.group_size(W.shape[1])))
        size = _nonzero(grouped.abs().amax(-1))  # groups are searched at size 1, where squares neither overflow nor vanish
        grouped = grouped / size.unsqueeze(-1)
        column = weights.to(W.dtype).reshape(1, *grouped.shape[1:])
        low, high = self.code_range
        top, bottom = grouped.amax(-1).clamp(min=0), (-grouped.amin(-1)).clamp(min=0)
        best_scale = torch.zeros_like(top)
        best_gain = torch.full_like(top, -1.0)
        for sign in (1.0, -1.0):
            # The smallest magnitude that clips neither tail, given which of them has the extra level.
            positive, negative = (top, bottom) if sign > 0 else (bottom, top)
            unclipped = torch.maximum(positive / high, negative / -low)
            for fraction in torch.linspace(0.35, 1.05, CANDIDATES).tolist():
                scale = sign * fraction * unclipped
                codes = (grouped / _nonzero(scale).unsqueeze(-1)).round_().clamp_(low, high)
                # For fixed codes the best scale is <w, q> / <q, q>, and it explains <w, q>^2 / <q, q> of the weighted norm.
                cross = (column * grouped * codes).sum(-1)
                norm = (column * codes * codes).sum(-1)
                gain = torch.where(norm > 0, cross * cross / norm, 0.0)
                better = gain > best_gain
                best_gain = torch.where(better, gain, best_gain)
                best_scale = torch.where(better, torch.where(norm > 0, cross / norm, scale), best_scale)
        return storable(best_scale * size, dtype)

    def encode(self, values: Float[Tensor, "*shape"], scales: Float[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        return (values / scales).round().clamp(*self.code_range).to(torch.int8)

    def decode(self, codes: Int[Tensor, "*shape"], scales: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return codes.to(scales.dtype) * scales


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
    """The grid of a name like `int4-g128` or `int3-channel`, else None."""
    found = re.fullmatch(r"int(\d+)-(?:g(\d+)|channel)", name)
    if not found:
        return None
    return Uniform(width=int(found[1]), group=int(found[2]) if found[2] else None)
