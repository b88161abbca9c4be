"""What every grid can do: from values to codes and scales, and back.

Two kinds. A `ScalarGrid` rounds each weight by itself: values are `levels[code] * step + offset`, and families differ in their levels and
in how steps and offsets are stored (one scale for a group, a zero point, two levels of scales in a block). A `TileGrid` rounds tiles of
many weights at once (lattices, trellises, llama.cpp's codebooks), in units of one scale for the matrix, or of a step for each tile.

A grid never sees curvature, beyond how much each column, or each entry of a tile, weighs. What it stores it names: `scales` are tensors by
name, each `(rows, columns)` with `rows` dividing `d_out` and `columns` dividing `d_in`, one entry for each block of the weight so divided.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from roundel.errors import SchemeError
from roundel.grids.inputs import Inputs

__all__ = ["Grid", "IntegerGrid", "ScalarGrid", "Scales", "TileGrid", "divisor_hint", "gather", "spread"]

Scales = Mapping[str, Tensor]


def spread(values: Float[Tensor, "rows columns"], shape: tuple[int, int]) -> Float[Tensor, "d_out d_in"]:
    """Each entry over its block of the weight."""
    rows, columns = shape[0] // values.shape[0], shape[1] // values.shape[1]
    wide: Tensor = values[:, None, :, None].expand(-1, rows, -1, columns).reshape(shape)  # views until here: gradients are plain sums
    return wide


def gather(matrix: Float[Tensor, "d_out d_in"], rows: int, columns: int) -> Float[Tensor, "rows columns"]:
    """The sums over blocks: the transpose of `spread`."""
    summed: Tensor = matrix.unflatten(1, (columns, -1)).sum(-1).unflatten(0, (rows, -1)).sum(1)
    return summed


def divisor_hint(width: int) -> list[int]:
    """Usual group sizes that divide the width, the largest first."""
    return [size for size in (256, 128, 64, 32, 16, 8, 4) if width % size == 0]


class Grid(ABC):
    """Representable values of a weight and their coder."""

    rotates: bool = False
    """Whether the grid is made for weights that look Gaussian: they are rotated then, unless the recipe says otherwise."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The scheme's name, which `parse_scheme` reads back."""

    @property
    @abstractmethod
    def bits(self) -> float:
        """Bits of one weight's code, scales not counted."""

    @property
    def inputs(self) -> Inputs | None:
        """How engines round what the linear reads; None: not at all."""
        return None

    @abstractmethod
    def check(self, d_out: int, d_in: int) -> None:
        """Refuses a weight of a shape that the grid cannot store.

        Raises:
            SchemeError: with the reason, and what would fit.
        """

    @abstractmethod
    def fit_scales(self, W: Float[Tensor, "d_out d_in"], weights: Float[Tensor, " d_in"], dtype: torch.dtype) -> dict[str, Tensor]:
        """Scales that make the rounding error of `W` small, weighted by column; those of free type in `dtype`."""

    def fit_rows(
        self, W: Float[Tensor, "rows d_in"], weights: Float[Tensor, " d_in"], dtype: torch.dtype, shared: Scales
    ) -> dict[str, Tensor]:
        """The same of some rows of a weight, given what all rows share; grids that have both kinds of scales keep the latter."""
        return self.fit_scales(W, weights, dtype)

    @abstractmethod
    def dequantize(self, codes: Tensor, scales: Scales, shape: tuple[int, int], dtype: torch.dtype) -> Float[Tensor, "d_out d_in"]:
        """The weight that codes and scales stand for."""

    @abstractmethod
    def parts(self, codes: Tensor, scales: Scales, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Float[Tensor, "d_out d_in"]]:
        """The weight's derivatives by those scales that may be refitted: it is linear in them, `sum_name spread(scales[name]) * part`."""

    @abstractmethod
    def stored(self, name: str, values: Float[Tensor, "rows columns"], like: Tensor) -> Tensor:
        """Wanted values of the scales `name` in the form in which they are stored, that of `like`."""

    @abstractmethod
    def stored_bits(self, shape: tuple[int, int], dtype: torch.dtype) -> int:
        """Bits of all codes and scales of a weight, free scales in `dtype`."""

    def draft(self) -> Grid:
        """A grid of nearly the same errors that is much cheaper to round to, if this one is expensive: for choosing between factors."""
        return self


class ScalarGrid(Grid):
    """Each weight by itself: `levels[code - lowest code] * step + offset`; codes are int8, `(d_out, d_in)`."""

    @property
    @abstractmethod
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code; both in -128 .. 127."""

    @property
    def levels(self) -> tuple[float, ...] | None:
        """The values of all codes, ascending; None: the codes themselves."""
        return None

    @abstractmethod
    def affine(
        self, scales: Scales, shape: tuple[int, int], dtype: torch.dtype
    ) -> tuple[Float[Tensor, "d_out d_in"], Float[Tensor, "d_out d_in"] | None]:
        """Each weight's step and offset (None: zero)."""

    def encode(
        self, values: Float[Tensor, "*shape"], step: Float[Tensor, "*shape"], offset: Float[Tensor, "*shape"] | None = None
    ) -> Int[Tensor, "*shape"]:
        """int8 codes of the nearest representable values; where a step is zero, any code."""
        shifted = values if offset is None else values - offset
        units = torch.where(step == 0, 0.0, shifted / step)
        low, high = self.code_range
        table = self.level_table()
        if table is None:
            return units.round().clamp(low, high).to(torch.int8)
        levels = table.to(units)
        return (torch.bucketize(units.contiguous(), (levels[1:] + levels[:-1]) / 2) + low).to(torch.int8)

    def decode(
        self, codes: Int[Tensor, "*shape"], step: Float[Tensor, "*shape"], offset: Float[Tensor, "*shape"] | None = None
    ) -> Float[Tensor, "*shape"]:
        """Values of codes, in the type of the steps."""
        values = self.units(codes, step.dtype) * step
        return values if offset is None else values + offset

    def units(self, codes: Int[Tensor, "*shape"], dtype: torch.dtype) -> Float[Tensor, "*shape"]:
        """The levels of codes."""
        table = self.level_table()
        return codes.to(dtype) if table is None else table.to(codes.device, dtype)[codes.long() - self.code_range[0]]

    def level_table(self) -> Float[Tensor, " levels"] | None:
        """The levels as a tensor, in float64."""
        return None if self.levels is None else torch.tensor(self.levels, dtype=torch.float64)

    def dequantize(self, codes: Tensor, scales: Scales, shape: tuple[int, int], dtype: torch.dtype) -> Float[Tensor, "d_out d_in"]:
        return self.decode(codes, *self.affine(scales, shape, dtype))


@dataclass(frozen=True, kw_only=True)
class IntegerGrid(ScalarGrid):
    """`b`-bit integers; `group` columns share what is stored, where it is a number."""

    width: int
    group: int | str | None

    def __post_init__(self) -> None:
        if not 2 <= self.width <= 8:
            raise SchemeError(f"int{self.width}: integers have 2 to 8 bits")
        if isinstance(self.group, int) and self.group < 1:
            raise SchemeError(f"group size {self.group}: expected a positive number of columns")

    @property
    def bits(self) -> int:
        return self.width

    @property
    def code_range(self) -> tuple[int, int]:
        return -(2 ** (self.width - 1)), 2 ** (self.width - 1) - 1


class TileGrid(Grid):
    """Tiles of many weights at once, each in units of a step.

    The step is one `scale` for the matrix, a float32 number of `SIGNIFICAND` significant bits, unless a family stores others: then it
    overrides what is about scales, and names in `free` the one that may be refitted.

    `codes` is `(tile rows, tile columns, symbols)`; a tile's entries are in row-major order. Where tiles do not divide a weight, its last
    rows and columns are filled up with zeros that weigh nothing.
    """

    rotates = True

    free: str = "scale"
    """The scale that steps, and so the weight, are proportional to."""

    @abstractmethod
    def tile(self, d_out: int, d_in: int) -> tuple[int, int]:
        """Rows and columns of a tile of a weight of this shape."""

    @property
    @abstractmethod
    def rms(self) -> float:
        """Root mean square of what random codes decode to."""

    @abstractmethod
    def encode_tiles(
        self, values: Float[Tensor, "tiles size"], weights: Float[Tensor, "tiles size"] | None = None
    ) -> Integer[Tensor, "tiles symbols"]:
        """Codes that make `sum weights (values - decoded)^2` small, tile by tile."""

    @abstractmethod
    def decode_tiles(self, codes: Integer[Tensor, "tiles symbols"]) -> Float[Tensor, "tiles size"]:
        """Values of codes, in float32."""

    @abstractmethod
    def tile_bits(self) -> int:
        """Bits of one tile's codes."""

    def check(self, d_out: int, d_in: int) -> None:
        """Every shape can be tiled."""

    def fit_scales(self, W: Float[Tensor, "d_out d_in"], weights: Float[Tensor, " d_in"], dtype: torch.dtype) -> dict[str, Tensor]:
        size = torch.linalg.vector_norm(W, dtype=torch.float64).item() / math.sqrt(W.numel())
        # Codes need not hold a zero: a weight of zeros gets a scale that makes them vanish.
        scale = max(size / (self.rms * HEADROOM), torch.finfo(torch.float32).tiny)
        return {"scale": _significand(torch.full((1, 1), scale, dtype=torch.float64, device=W.device)).clamp(max=LARGEST).float()}

    def steps(self, scales: Scales, shape: tuple[int, int], dtype: torch.dtype) -> Float[Tensor, "down across"]:
        """The step of each tile."""
        rows, columns = self.tile(*shape)
        return scales["scale"].to(dtype).expand(-(-shape[0] // rows), -(-shape[1] // columns))

    def dequantize(self, codes: Tensor, scales: Scales, shape: tuple[int, int], dtype: torch.dtype) -> Float[Tensor, "d_out d_in"]:
        return self.parts(codes, scales, shape, dtype)["scale"] * scales["scale"].to(dtype)

    def parts(self, codes: Tensor, scales: Scales, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Float[Tensor, "d_out d_in"]]:
        return {"scale": self.from_tiles(self.decode_tiles(codes.flatten(0, 1)).to(dtype), shape)}

    def stored(self, name: str, values: Float[Tensor, "rows columns"], like: Tensor) -> Tensor:
        kept = _significand(values.double())
        return torch.where((kept.abs() > torch.finfo(torch.float32).tiny) & (kept.abs() <= LARGEST), kept.float(), like)

    def stored_bits(self, shape: tuple[int, int], dtype: torch.dtype) -> int:
        rows, columns = self.tile(*shape)
        return -(-shape[0] // rows) * -(-shape[1] // columns) * self.tile_bits() + 32

    def to_tiles(self, matrix: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "tiles size"]:
        """The tiles of a matrix, row by row of tiles, filled up with zeros."""
        rows, columns = self.tile(*matrix.shape)
        padded: Tensor = torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % columns, 0, -matrix.shape[0] % rows))
        tiles: Tensor = padded.unflatten(0, (-1, rows)).unflatten(2, (-1, columns)).transpose(1, 2).flatten(0, 1).flatten(1)
        return tiles

    def from_tiles(self, tiles: Float[Tensor, "tiles size"], shape: tuple[int, int]) -> Float[Tensor, "d_out d_in"]:
        """Inverse of `to_tiles`."""
        rows, columns = self.tile(*shape)
        across = -(-shape[1] // columns)
        matrix: Tensor = tiles.unflatten(0, (-1, across)).unflatten(2, (rows, columns)).transpose(1, 2).flatten(0, 1).flatten(1)
        return matrix[: shape[0], : shape[1]]


HEADROOM = 0.9
"""Scales of tiles are chosen so that the weight's RMS is this part of the code's: feedback makes targets larger."""

SIGNIFICAND = 11
"""Bits of a tile scale's significand, those of float16: formats that store it so hold the very weight that was rounded to."""

LARGEST = (2.0 - 2.0 ** (1 - SIGNIFICAND)) * 2.0**127
"""The largest float32 number of so few bits."""


def _significand(values: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    """The nearest numbers of `SIGNIFICAND` bits."""
    mantissa, exponent = torch.frexp(values)
    return torch.ldexp((mantissa * 2**SIGNIFICAND).round(), exponent - SIGNIFICAND)


def refuse_width(name: str, group: int, width: int, alternatives: str) -> SchemeError:
    """The error of a group size that does not divide."""
    return SchemeError(f"{name}: groups of {group} do not divide the width {width}; try {alternatives}")
