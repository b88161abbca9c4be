"""Integers with a scale and a bias per group of columns, both of free type: `q s + m`.

`q` is in `0 .. 2^b - 1` and `m`, the value of the code 0, is a number like `s` (the bias of MLX, the minimum of llama.cpp's blocks): unlike
a zero point it need be no multiple of the scale. Codes are stored as `q - 2^(b-1)`, which fits int8. Both ends of the range are searched
jointly for the least squared error weighted by column; scale and bias are then the closed-form optimum for their codes, and they are
refitted together. Cost: 52 candidates and 2 steps of polish, each one pass over the weights.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from roundel.grids.base import IntegerGrid, Scales, divisor_hint, refuse_width, spread
from roundel.grids.search import by_rows, column_weights, group_size, positive, search_range
from roundel.grids.uniform import storable

__all__ = ["Affine", "parse"]


@dataclass(frozen=True, kw_only=True)
class Affine(IntegerGrid):
    """`b`-bit integers; `group` columns share a scale and a bias."""

    group: int

    @property
    def name(self) -> str:
        return f"int{self.width}-g{self.group}-affine"

    def check(self, d_out: int, d_in: int) -> None:
        if d_in % self.group:
            fitting = [f"int{self.width}-g{size}-affine" for size in divisor_hint(d_in)[:1]]
            raise refuse_width(self.name, self.group, d_in, " or ".join([*fitting, f"int{self.width}-channel-asym"]))

    def fit_scales(self, W: Float[Tensor, "d_out d_in"], weights: Float[Tensor, " d_in"], dtype: torch.dtype) -> dict[str, Tensor]:
        self.check(*W.shape)
        w = column_weights(weights, W).unflatten(0, (-1, self.group))
        total, most = w.sum(-1), 2**self.width - 1

        def fit(rows: Tensor) -> dict[str, Tensor]:
            grouped = rows.unflatten(1, (-1, self.group))
            size = group_size(grouped)
            x = grouped / size.unsqueeze(-1)
            weighted = w * x
            mean = weighted.sum(-1) / total

            def closed_form(scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
                q = ((x - bias.unsqueeze(-1)) / scale.unsqueeze(-1)).round_().clamp_(0, most)
                centre = (w * q).sum(-1) / total
                cross, norm = (weighted * q).sum(-1) - total * mean * centre, (w * q.square_()).sum(-1) - total * centre.square()
                positive = (norm > 1e-6) & (cross > 0)
                better = torch.where(positive, cross / torch.where(positive, norm, 1.0), scale)
                return torch.where(positive, better * cross, 0.0), better, mean - better * centre

            def score(low: Tensor, high: Tensor) -> tuple[Tensor, ...]:
                return closed_form(((high - low) / most).clamp(min=1e-6), low)

            scale, bias = search_range(x.amin(-1), x.amax(-1), score)
            for _ in range(2):
                _, scale, bias = closed_form(scale.clamp(min=1e-6), bias)
            flat = grouped.amin(-1) == grouped.amax(-1)
            scale, bias = torch.where(flat, 0.0, scale * size), torch.where(flat, grouped[..., 0], bias * size)
            return {"scale": storable(scale, dtype), "bias": _finite(bias, dtype)}

        return by_rows(W, fit)

    def affine(self, scales: Scales, shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        scale, bias = scales["scale"].to(dtype), scales["bias"].to(dtype)
        return spread(scale, shape), spread(bias + 2 ** (self.width - 1) * scale, shape)

    def dequantize(self, codes: Tensor, scales: Scales, shape: tuple[int, int], dtype: torch.dtype) -> Float[Tensor, "d_out d_in"]:
        # in the order of those who load the checkpoint
        unsigned = codes.to(dtype) + 2 ** (self.width - 1)
        W_hat: Tensor = unsigned * spread(scales["scale"].to(dtype), shape) + spread(scales["bias"].to(dtype), shape)
        return W_hat

    def parts(self, codes: Tensor, scales: Scales, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Tensor]:
        unsigned = codes.to(dtype) + 2 ** (self.width - 1)
        return {"scale": unsigned, "bias": torch.ones_like(unsigned)}

    def stored(self, name: str, values: Tensor, like: Tensor) -> Tensor:
        return positive(values, like) if name == "scale" else _finite(values, like.dtype)

    def stored_bits(self, shape: tuple[int, int], dtype: torch.dtype) -> int:
        self.check(*shape)
        return shape[0] * (shape[1] * self.width + shape[1] // self.group * 2 * dtype.itemsize * 8)


def _finite(values: Tensor, dtype: torch.dtype) -> Tensor:
    limit = torch.finfo(dtype).max
    return values.clamp(-limit, limit).to(dtype)


def parse(name: str) -> Affine | None:
    """The grid of a name like `int4-g64-affine`, else None."""
    found = re.fullmatch(r"int(\d+)-g(\d+)-affine", name)
    return Affine(width=int(found[1]), group=int(found[2])) if found else None
