"""Integers with a zero point per group of columns or per output channel: `(q - z) * s`.

`q` and `z` are in `-2^(b-1) .. 2^(b-1) - 1` and `s > 0`, as in compressed-tensors: zero is always a value, and a group's range may lie
anywhere around it. Both ends of the range are searched jointly for the least squared error weighted by column; the scale is then the
closed-form optimum for its codes. The zero point is an integer and stays as it is when scales are refitted.
Cost: 52 candidates and 2 steps of polish, each one pass over the weights.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from roundel.grids.base import IntegerGrid, Scales, divisor_hint, refuse_width, spread
from roundel.grids.search import by_rows, column_weights, group_size, nonzero, positive, search_range
from roundel.grids.uniform import storable

__all__ = ["Asymmetric", "parse"]


@dataclass(frozen=True, kw_only=True)
class Asymmetric(IntegerGrid):
    """`b`-bit integers; `group` columns share a scale and a zero point, all of them where `group` is None ("channel")."""

    group: int | None

    @property
    def name(self) -> str:
        return f"int{self.width}-" + ("channel" if self.group is None else f"g{self.group}") + "-asym"

    def check(self, d_out: int, d_in: int) -> None:
        if self.group is not None and d_in % self.group:
            fitting = [f"int{self.width}-g{size}-asym" for size in divisor_hint(d_in)[:1]]
            raise refuse_width(self.name, self.group, d_in, " or ".join([*fitting, f"int{self.width}-channel-asym"]))

    def fit_scales(self, W: Float[Tensor, "d_out d_in"], weights: Float[Tensor, " d_in"], dtype: torch.dtype) -> dict[str, Tensor]:
        self.check(*W.shape)
        groups = 1 if self.group is None else W.shape[1] // self.group
        w = column_weights(weights, W).unflatten(0, (groups, -1))
        lowest, highest = self.code_range

        def fit(rows: Tensor) -> dict[str, Tensor]:
            grouped = rows.unflatten(1, (groups, -1))
            size = group_size(grouped)
            x = grouped / size.unsqueeze(-1)
            weighted = w * x

            def closed_form(scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
                shifted = zero.unsqueeze(-1)
                q = (x / scale.unsqueeze(-1) + shifted).round_().clamp_(lowest, highest).sub_(shifted)
                cross, norm = (weighted * q).sum(-1), (w * q.square_()).sum(-1)
                better = torch.where(norm > 0, cross / nonzero(norm), scale)
                return better * cross, better

            def score(low: Tensor, high: Tensor) -> tuple[Tensor, ...]:
                scale = ((high - low) / (highest - lowest)).clamp(min=1e-6)
                zero = (lowest - low / scale).round_().clamp_(lowest, highest)
                return *closed_form(scale, zero), zero

            scale, zero = search_range(x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0), score)
            for _ in range(2):
                _, scale = closed_form(scale.clamp(min=1e-6), zero)
            scale = torch.where(grouped.any(-1), scale * size, 0.0)
            return {"scale": storable(scale, dtype), "zero_point": zero.to(torch.int8)}

        return by_rows(W, fit)

    def affine(self, scales: Scales, shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        scale = scales["scale"].to(dtype)
        return spread(scale, shape), spread(-scales["zero_point"].to(dtype) * scale, shape)

    def dequantize(self, codes: Tensor, scales: Scales, shape: tuple[int, int], dtype: torch.dtype) -> Float[Tensor, "d_out d_in"]:
        # in the order of those who load the checkpoint: the difference is exact
        return self.parts(codes, scales, shape, dtype)["scale"] * spread(scales["scale"].to(dtype), shape)

    def parts(self, codes: Tensor, scales: Scales, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Tensor]:
        return {"scale": codes.to(dtype) - spread(scales["zero_point"].to(dtype), shape)}

    def stored(self, name: str, values: Tensor, like: Tensor) -> Tensor:
        return positive(values, like)

    def stored_bits(self, shape: tuple[int, int], dtype: torch.dtype) -> int:
        self.check(*shape)
        groups = 1 if self.group is None else shape[1] // self.group
        return shape[0] * (shape[1] * self.width + groups * (dtype.itemsize * 8 + self.width))


def parse(name: str) -> Asymmetric | None:
    """The grid of a name like `int4-g64-asym` or `int3-channel-asym`, else None."""
    found = re.fullmatch(r"int(\d+)-(?:g(\d+)|channel)-asym", name)
    if not found:
        return None
    return Asymmetric(width=int(found[1]), group=int(found[2]) if found[2] else None)
