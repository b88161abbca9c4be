"""What every grid of scalars can do."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["Grid"]


class Grid(ABC):
    """Representable values of one weight, given the scale of its group.

    Scales are stored one for each group of columns, `(d_out, groups)`; `expand` spreads them over the columns.
    `encode` and `decode` work entry by entry on expanded scales of any shape and are inverses on the grid's own
    values: `encode(decode(q, s), s) == q` for `s != 0`.
    """

    group: int | None
    """Columns that share a scale; None: all of a row."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The scheme's name, which `parse_scheme` reads back."""

    @property
    @abstractmethod
    def bits(self) -> int:
        """Bits of one code."""

    @property
    @abstractmethod
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code."""

    @abstractmethod
    def group_size(self, d_in: int) -> int:
        """Columns that share a scale in a weight of width `d_in`.

        Raises:
            SchemeError: the width cannot be divided into groups.
        """

    @abstractmethod
    def fit_scales(
        self, W: Float[Tensor, "d_out d_in"], weights: Float[Tensor, " d_in"], dtype: torch.dtype
    ) -> Float[Tensor, "d_out groups"]:
        """Scales that make the rounding error of `W` small, weighted by column; in `dtype`, the type in which they are stored."""

    @abstractmethod
    def encode(self, values: Float[Tensor, "*shape"], scales: Float[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """int8 codes of the nearest representable values."""

    @abstractmethod
    def decode(self, codes: Int[Tensor, "*shape"], scales: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Values of codes, in the type of the scales."""

    def expand(self, scales: Float[Tensor, "d_out groups"], d_in: int) -> Float[Tensor, "d_out d_in"]:
        """Each column's scale."""
        return scales.repeat_interleave(self.group_size(d_in), dim=1)

    def bits_per_weight(self, d_in: int, scale_dtype: torch.dtype) -> float:
        """Bits of the codes and scales of a weight, for each of its entries."""
        return self.bits + scale_dtype.itemsize * 8 / self.group_size(d_in)
