"""Linears whose weights are made, in each forward pass, of parameters that can be trained: what tuning moves.

Grids of scalars: a latent code `V` for each weight and a factor `a` for each scale that the grid can refit,

    V = q + clip(position(W) - q, -.49, .49),    W_hat = level(round(V)) * step(a) + offset(a),

where `position` places a value among the levels, neighbouring codes one apart: rounding `V` gives the code `q` from which tuning starts,
and codes near a boundary flip first. Gradients pass `round` as if it were not there, and the levels as if they were evenly spaced.

Grids of tiles: codes stay, and the signs of the rotation become free vectors,

    W_hat = diag(v_out) M diag(v_in),    M = H^T W~ H without signs;

without a rotation only the one scale is left. They are stored in float16, the scale's significand taken into `v_out`, so that every format
with float16 vectors holds the same weight.

Cost of a pass: some ten elementwise operations a weight, for `V` two more matrices of the weight's size while gradients flow.
Reference: QTIP (Tseng et al. 2024, arXiv 2406.11235) for vectors in place of signs.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import replace

import torch
from jaxtyping import Float, Int8
from torch import Tensor, nn

from roundel.grids import ScalarGrid, TileGrid, parse_scheme
from roundel.grids.base import spread
from roundel.rotation import Rotation
from roundel.rounding.round import dequantized
from roundel.tuning.sharded import local, whole
from roundel.types import RoundedWeight

__all__ = ["Trained", "trained"]

INSIDE = 0.49
"""Farthest that a latent code starts from its code."""


class Trained(nn.Module):
    """Takes the place of a linear; its weight is `W_hat()`."""

    def __init__(self, linear: nn.Linear, weight: RoundedWeight) -> None:
        super().__init__()
        self.bias = linear.bias
        self.start = weight

    @property
    @abstractmethod
    def codes(self) -> list[nn.Parameter]:
        """What moves in units of codes."""

    @property
    @abstractmethod
    def scales(self) -> list[nn.Parameter]:
        """What moves in units of its own start."""

    @abstractmethod
    def W_hat(self) -> Float[Tensor, "d_out d_in"]:
        """The weight, with gradients."""

    @abstractmethod
    def stored(self) -> RoundedWeight:
        """Codes and scales as they would be written."""

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """`W_hat x + bias`, in the type of `x`."""
        return nn.functional.linear(x, self.W_hat().to(x.dtype), self.bias)

    def confine(self) -> None:
        """Brings parameters back into their range after a step."""


class TrainedScalars(Trained):
    """Latent codes and factors of scales."""

    def __init__(self, linear: nn.Linear, weight: RoundedWeight, grid: ScalarGrid) -> None:
        super().__init__(linear, weight)
        self.grid, device = grid, linear.weight.device
        self.fixed = {name: scale.to(device) for name, scale in weight.scales.items()}
        W = linear.weight.detach().float()
        if weight.rotation is not None:
            assert isinstance(weight.rotation, Rotation)
            W = weight.rotation.rotate_weight(W)
        codes = weight.codes.to(device)
        step, offset = grid.affine(self.fixed, weight.rotated_shape, torch.float32)
        units = (W if offset is None else W - offset) / step
        position = _position(torch.where(torch.isfinite(units), units, grid.units(codes, torch.float32)), grid)
        self.latent = nn.Parameter(codes + (position - codes).clamp(-INSIDE, INSIDE))
        refitted = grid.parts(codes, self.fixed, weight.rotated_shape, torch.float32)
        self.factors = nn.ParameterDict({name: torch.ones_like(self.fixed[name], dtype=torch.float32) for name in refitted})

    @property
    def codes(self) -> list[nn.Parameter]:
        return [self.latent]

    @property
    def scales(self) -> list[nn.Parameter]:
        return list(self.factors.values())

    def W_hat(self) -> Float[Tensor, "d_out d_in"]:
        moved = {name: self.fixed[name].float() * factor for name, factor in self.factors.items()}
        step, offset = self.grid.affine({**self.fixed, **moved}, self.start.rotated_shape, torch.float32)
        units = self.grid.units(self._codes(), torch.float32)
        W = (units + (self.latent - self.latent.detach())) * step
        W = W if offset is None else W + offset
        return W if self.start.rotation is None else self.start.rotation.restore_weight(W)

    @torch.no_grad()
    def stored(self) -> RoundedWeight:
        scales = {
            name: self.grid.stored(name, (self.fixed[name].float() * whole(local(factor), factor)).cpu(), self.start.scales[name])
            for name, factor in self.factors.items()
        }
        codes = whole(local(self.latent), self.latent).round().to(torch.int8)
        return replace(self.start, codes=codes.cpu(), scales={**self.start.scales, **scales}, trace=())

    @torch.no_grad()
    def confine(self) -> None:
        low, high = self.grid.code_range
        local(self.latent).clamp_(low - INSIDE, high + INSIDE)

    def _codes(self) -> Int8[Tensor, "d_out d_in"]:
        return self.latent.detach().round().to(torch.int8)


class TrainedTiles(Trained):
    """Vectors in place of the rotation's signs, or factors of the scale."""

    def __init__(self, linear: nn.Linear, weight: RoundedWeight, grid: TileGrid) -> None:
        super().__init__(linear, weight)
        self.grid, rotation, device = grid, weight.rotation, linear.weight.device
        fixed = dequantized(weight).to(device)
        if isinstance(rotation, Rotation):
            signs = zip((rotation.signs_out, rotation.signs_in), weight.shape, strict=True)
            out, into = (each[:width].to(device, torch.float32) for each, width in signs)
            fixed = fixed / out[:, None] / into
            self.vectors = nn.ParameterList([nn.Parameter(out), nn.Parameter(into)])
        else:
            self.vectors = nn.ParameterList([nn.Parameter(torch.ones_like(weight.scales[grid.free], dtype=torch.float32, device=device))])
        self.fixed = nn.Parameter(fixed, requires_grad=False)

    @property
    def codes(self) -> list[nn.Parameter]:
        return []

    @property
    def scales(self) -> list[nn.Parameter]:
        return list(self.vectors)

    def W_hat(self) -> Float[Tensor, "d_out d_in"]:
        if len(self.scales) == 1:
            return self.fixed * spread(self.scales[0], self.start.shape)
        out, into = self.scales
        return out[:, None] * self.fixed * into

    @torch.no_grad()
    def stored(self) -> RoundedWeight:
        scale, rotation = self.start.scales[self.grid.free], self.start.rotation
        vectors = [whole(local(vector), vector).detach().cpu() for vector in self.scales]
        if not isinstance(rotation, Rotation):
            stored = self.grid.stored(self.grid.free, scale.float() * vectors[0], scale)
            return replace(self.start, scales={**self.start.scales, self.grid.free: stored}, trace=())
        mantissa, exponent = math.frexp(scale.item())
        out, into = (
            torch.cat([vector, signs[len(vector) :]])
            for vector, signs in zip(vectors, (rotation.signs_out, rotation.signs_in), strict=True)
        )
        turned = replace(rotation, signs_out=(out * mantissa).half(), signs_in=into.half())
        return replace(self.start, scales={"scale": torch.full_like(scale, math.ldexp(1.0, exponent))}, rotation=turned, trace=())


def trained(linear: nn.Linear, weight: RoundedWeight) -> Trained:
    """The linear with what can be trained of its grid."""
    grid = parse_scheme(weight.scheme)
    if isinstance(grid, TileGrid):
        return TrainedTiles(linear, weight, grid)
    assert isinstance(grid, ScalarGrid)
    return TrainedScalars(linear, weight, grid)


def _position(units: Float[Tensor, "*shape"], grid: ScalarGrid) -> Float[Tensor, "*shape"]:
    """Values in units of the step as real-valued codes: linear between neighbouring levels, and beyond the last ones."""
    table = grid.level_table()
    if table is None:
        return units
    levels = table.to(units)
    below = (torch.bucketize(units.contiguous(), levels) - 1).clamp(0, len(levels) - 2)
    return grid.code_range[0] + below + (units - levels[below]) / (levels[below + 1] - levels[below])
