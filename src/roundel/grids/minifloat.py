"""Small floating-point numbers: FP8, MXFP4 and NVFP4.

`fp8` (or `fp8-channel`, `fp8-tensor`): the 253 finite values of e4m3fn, -448 .. 448, times one scale of free type per output channel or for
the weight. `mxfp4`: e2m1 (0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives), times a power of two for 32 columns, stored as E8M0, the
exponent + 127 in a byte (OCP Microscaling Formats 1.0). `nvfp4`: e2m1, times a positive e4m3 number for 16 columns, times one float32
number for the weight, here a power of two: readers that multiply by it, readers that divide by its inverse and readers that compute in
bfloat16 all find the same weight. That costs less than one octave at the low end of the group scales, those of groups 2^-13 as large as
the largest. Codes count the distinct values from zero. With `-a8` engines round what `fp8` weights
are multiplied with, too, with `-a4` what `nvfp4` weights are (`inputs`).

Scales are searched among those that the format can represent, for the least squared error weighted by column: for `nvfp4` 13
neighbours of `max / 6`, up to `max / 4`, which often is the better one because e2m1 has a wide gap between 4 and 6; for `mxfp4` 4
exponents. Cost: 40 passes over the weights for `fp8`, 13 and 4 for the others; 4096 x 4096 takes 5, 3 and 1 s on one core.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from roundel.grids.base import ScalarGrid, Scales, divisor_hint, refuse_width, spread
from roundel.grids.inputs import Inputs
from roundel.grids.search import by_rows, column_weights, group_size, nearest_e4m3, positive, search_scale, table
from roundel.grids.uniform import storable

__all__ = ["Fp8", "MxFp4", "NvFp4", "parse"]

_E2M1 = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E4M3 = tuple(torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).tolist())
"""The positive finite values; byte 127 is NaN."""


def _signed(positive_levels: tuple[float, ...]) -> tuple[float, ...]:
    return (*(-level for level in reversed(positive_levels)), 0.0, *positive_levels)


E2M1_LEVELS, E4M3_LEVELS = _signed(_E2M1), _signed(_E4M3)


@dataclass(frozen=True, kw_only=True)
class Fp8(ScalarGrid):
    """e4m3fn with one scale per output channel or for the weight."""

    scope: Literal["channel", "tensor"] = "channel"
    rounds_inputs: bool = False
    """To e4m3fn as well."""

    @property
    def name(self) -> str:
        return ("fp8" if self.scope == "channel" else "fp8-tensor") + ("-a8" if self.rounds_inputs else "")

    @property
    def inputs(self) -> Inputs | None:
        return "fp8" if self.rounds_inputs else None

    @property
    def bits(self) -> int:
        return 8

    @property
    def code_range(self) -> tuple[int, int]:
        return -126, 126

    @property
    def levels(self) -> tuple[float, ...]:
        return E4M3_LEVELS

    def check(self, d_out: int, d_in: int) -> None:
        """Every shape can be stored."""

    def fit_scales(self, W: Float[Tensor, "d_out d_in"], weights: Float[Tensor, " d_in"], dtype: torch.dtype) -> dict[str, Tensor]:
        w = column_weights(weights, W)
        nearest = nearest_e4m3
        # The values repeat with each octave: a little clipping, and one octave of scales that do not clip.
        fractions = torch.logspace(-0.25, 1.0, 38, base=2.0).tolist()

        def fit(rows: Tensor, column: Tensor) -> dict[str, Tensor]:
            size = group_size(rows)
            x = rows / size.unsqueeze(-1)
            scale = search_scale(x, column, nearest, ends=(-448.0, 448.0), fractions=fractions, signs=(1.0,))
            return {"scale": storable(scale * size, dtype).unsqueeze(1)}

        if self.scope == "channel":
            return by_rows(W, lambda rows: fit(rows, w))
        return fit(W.reshape(1, -1), w.repeat(W.shape[0]))

    def affine(self, scales: Scales, shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, None]:
        return spread(scales["scale"].to(dtype), shape), None

    def parts(self, codes: Tensor, scales: Scales, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Tensor]:
        return {"scale": self.units(codes, dtype)}

    def stored(self, name: str, values: Tensor, like: Tensor) -> Tensor:
        return positive(values, like)

    def stored_bits(self, shape: tuple[int, int], dtype: torch.dtype) -> int:
        return shape[0] * shape[1] * 8 + (shape[0] if self.scope == "channel" else 1) * dtype.itemsize * 8


class _E2m1(ScalarGrid):
    """e2m1 in groups of columns."""

    group: int

    @property
    def bits(self) -> int:
        return 4

    @property
    def code_range(self) -> tuple[int, int]:
        return -7, 7

    @property
    def levels(self) -> tuple[float, ...]:
        return E2M1_LEVELS

    def check(self, d_out: int, d_in: int) -> None:
        if d_in % self.group:
            fitting = [*(["nvfp4"] if d_in % 16 == 0 else []), *(f"int4-g{size}" for size in divisor_hint(d_in)[:1]), "int4-channel"]
            raise refuse_width(self.name, self.group, d_in, " or ".join(fitting))

    def affine(self, scales: Scales, shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, None]:
        return spread(self.group_scales(scales, dtype), shape), None

    @abstractmethod
    def group_scales(self, scales: Scales, dtype: torch.dtype) -> Float[Tensor, "d_out groups"]:
        """The real scale of each group."""


@dataclass(frozen=True)
class MxFp4(_E2m1):
    """e2m1 times a power of two; `scales["scale"]` is E8M0, uint8."""

    group = 32

    @property
    def name(self) -> str:
        return "mxfp4"

    def group_scales(self, scales: Scales, dtype: torch.dtype) -> Float[Tensor, "d_out groups"]:
        return _powers(scales["scale"].to(torch.int32) - 127, dtype)

    def fit_scales(self, W: Float[Tensor, "d_out d_in"], weights: Float[Tensor, " d_in"], dtype: torch.dtype) -> dict[str, Tensor]:
        self.check(*W.shape)
        w = column_weights(weights, W).unflatten(0, (-1, self.group))
        nearest = table(E2M1_LEVELS, 0.25)

        def fit(rows: Tensor) -> dict[str, Tensor]:
            grouped = rows.unflatten(1, (-1, self.group))
            size = group_size(grouped)
            # the least power of two that does not clip is the second largest that is tried; 2^-126 .. 2^125 keep values normal and finite
            unclipped = (size.double() / 6).log2().ceil().to(torch.int32)
            x = grouped / size.unsqueeze(-1)
            best_error, best = torch.full_like(size, torch.inf), unclipped
            for offset in (0, -1, -2, 1):
                exponent = (unclipped + offset).clamp(-126, 125)
                scale = (_powers(exponent, torch.float64) / size.double()).to(W.dtype).unsqueeze(-1)
                error = (w * (x - scale * nearest(x / scale)).square_()).sum(-1)
                best = torch.where(error < best_error, exponent, best)
                best_error = torch.minimum(error, best_error)
            stored = torch.where(grouped.any(-1), best, 0)
            return {"scale": (stored + 127).to(torch.uint8)}

        return by_rows(W, fit)

    def parts(self, codes: Tensor, scales: Scales, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Tensor]:
        return {}  # powers of two are too far apart to be refitted

    def stored(self, name: str, values: Tensor, like: Tensor) -> Tensor:
        exponent = values.double().clamp(min=2.0**-126, max=2.0**125).log2().round()
        return torch.where(values > 0, (exponent + 127).to(like.dtype), like)

    def stored_bits(self, shape: tuple[int, int], dtype: torch.dtype) -> int:
        self.check(*shape)
        return shape[0] * (shape[1] * 4 + shape[1] // self.group * 8)


@dataclass(frozen=True, kw_only=True)
class NvFp4(_E2m1):
    """e2m1 times e4m3 times 2^n: `scales["scale"]` is float8_e4m3fn `(d_out, groups)`, `scales["tensor_scale"]` float32 `(1, 1)`."""

    rounds_inputs: bool = False
    """To e2m1 as well."""

    group = 16

    @property
    def name(self) -> str:
        return "nvfp4-a4" if self.rounds_inputs else "nvfp4"

    @property
    def inputs(self) -> Inputs | None:
        return "nvfp4" if self.rounds_inputs else None

    def group_scales(self, scales: Scales, dtype: torch.dtype) -> Float[Tensor, "d_out groups"]:
        return scales["scale"].to(dtype) * scales["tensor_scale"].to(dtype)

    def fit_scales(self, W: Float[Tensor, "d_out d_in"], weights: Float[Tensor, " d_in"], dtype: torch.dtype) -> dict[str, Tensor]:
        # The largest group scale may be max / 4 (a smaller one is max / 6): the largest weight is then 4 or 6 times its group's scale.
        # From 2^-116 to 2^115 its products with the smallest, and with the largest, scale and level are normal numbers.
        unclipped = (W.abs().amax().double() / (4 * 448)).clamp(2.0**-116, 2.0**115)
        tensor_scale = _powers(unclipped.log2().ceil().to(torch.int32), torch.float32)
        return self.fit_rows(W, weights, dtype, {"tensor_scale": tensor_scale.reshape(1, 1)})

    def fit_rows(
        self, W: Float[Tensor, "rows d_in"], weights: Float[Tensor, " d_in"], dtype: torch.dtype, shared: Scales
    ) -> dict[str, Tensor]:
        if not shared:
            return self.fit_scales(W, weights, dtype)
        self.check(*W.shape)
        w = column_weights(weights, W).unflatten(0, (-1, self.group))
        nearest = table(E2M1_LEVELS, 0.25)
        tensor_scale = shared["tensor_scale"]
        positive_scales = torch.tensor(_E4M3, dtype=W.dtype, device=W.device)

        def fit(rows: Tensor) -> dict[str, Tensor]:
            x = rows.unflatten(1, (-1, self.group)) / tensor_scale.to(W.dtype)
            size = group_size(x)
            x = x / size.unsqueeze(-1)
            middle = torch.bucketize((size / 6).contiguous(), (positive_scales[1:] + positive_scales[:-1]) / 2)
            best_error, best = torch.full_like(size, torch.inf), middle
            for offset in range(-6, 7):
                index = (middle + offset).clamp(0, len(_E4M3) - 1)
                scale = (positive_scales[index] / size).unsqueeze(-1)
                error = (w * (x - scale * nearest(x / scale)).square_()).sum(-1)
                best = torch.where(error < best_error, index, best)
                best_error = torch.minimum(error, best_error)
            return {"scale": (best + 1).to(torch.uint8).view(torch.float8_e4m3fn)}

        return {**by_rows(W, fit), "tensor_scale": tensor_scale}

    def parts(self, codes: Tensor, scales: Scales, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Tensor]:
        return {"scale": self.units(codes, dtype) * scales["tensor_scale"].to(dtype)}

    def stored(self, name: str, values: Tensor, like: Tensor) -> Tensor:
        least, most = (0.0, torch.finfo(torch.float32).max) if like.dtype == torch.float32 else (_E4M3[0], _E4M3[-1])
        kept = values.clamp(least, most).to(like.dtype).to(torch.float32)
        return torch.where(values > 0, kept, like.to(torch.float32)).to(like.dtype)

    def stored_bits(self, shape: tuple[int, int], dtype: torch.dtype) -> int:
        self.check(*shape)
        return shape[0] * (shape[1] * 4 + shape[1] // self.group * 8) + (64 if self.rounds_inputs else 32)


def _powers(exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """Powers of two, exactly."""
    return torch.ldexp(torch.ones(exponents.shape, dtype=dtype, device=exponents.device), exponents)


def parse(name: str) -> ScalarGrid | None:
    """The grid `fp8`, `fp8-channel`, `fp8-tensor` (all three with `-a8` or without), `mxfp4`, `nvfp4` or `nvfp4-a4`, else None."""
    plain = name.removesuffix("-a8")
    if plain in {"fp8", "fp8-channel", "fp8-tensor"}:
        return Fp8(scope="tensor" if plain == "fp8-tensor" else "channel", rounds_inputs=plain != name)
    if name in {"nvfp4", "nvfp4-a4"}:
        return NvFp4(rounds_inputs=name == "nvfp4-a4")
    return MxFp4() if name == "mxfp4" else None
