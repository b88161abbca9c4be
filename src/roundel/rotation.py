"""Rotations that spread outliers: weights that look Gaussian, factors without preferred coordinates, and the same loss.

    W~ = H_m S_out W S_in H_n^T                                              W (m, n) = (d_out, d_in), H orthonormal, S = diag(+-1)
    H_out~ = H_m S_out H_out S_out H_m^T,    H_in~ = H_n S_in H_in S_in H_n^T
    tr(E~^T H_out~ E~ H_in~) = tr(E^T H_out E H_in)
    W x = S_out H_m^T (W~ (H_n S_in x))

"hadamard" is `linalg.hadamard` over the full width, "hadamard128" that of blocks of 128 on both sides. Under "hadamard" one entry of the
weight becomes entries of at most `2 / sqrt(m n)`, half of that where both are Hadamard matrices; the signs make sums of many normal.
Where blocks of 128 do not divide a width, zeros are added up to the next multiple, as exllamav3 does: the rotated weight is as much larger,
and what comes out for them is left out, so that errors there cost nothing.
Cost: two transforms of the weight and of each factor; `m + n` bits are stored, or the seed.
Reference: QuIP# (Tseng et al., arXiv 2402.04396).

Signs may be vectors of other numbers than +-1, in float16: recovery tuning trains them (`tuning.trained`). Then `rotate_weight` divides by
what `restore_weight` multiplies with, and a rotated weight is applied by the same `rotate_input` and `restore_output`.

`GroupedFactors` are not rotated as one: an output side that mixes rows of different groups has no Kronecker form. Each group is a weight
with a rotation of its own; those of one seed and width share `signs_in`, so that inputs are rotated once for all.

Not done: rotations that are learned or that whiten; one side alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float16, Int8, Integer
from torch import Tensor
from torch.nn.functional import pad

from roundel.errors import SchemeError
from roundel.linalg.hadamard import BLOCK, block_hadamard, hadamard
from roundel.types import KroneckerFactors

__all__ = ["KINDS", "Permutation", "Rotation", "rotated_shape"]

KINDS = ("hadamard", "hadamard128")


def rotated_shape(kind: str | None, shape: tuple[int, int]) -> tuple[int, int]:
    """Of a weight after a rotation of this kind, or after none."""
    d_out, d_in = shape
    return (-(-d_out // BLOCK) * BLOCK, -(-d_in // BLOCK) * BLOCK) if kind == "hadamard128" else (d_out, d_in)


@dataclass(frozen=True, kw_only=True, eq=False)
class Rotation:
    """A fixed rotation of both sides of a weight; everything is computed in the type (float32, float64) and place of what is given."""

    kind: str
    shape: tuple[int, int]
    """Of the weight, `(d_out, d_in)`."""
    signs_out: Int8[Tensor, " rows"] | Float16[Tensor, " rows"]
    signs_in: Int8[Tensor, " columns"] | Float16[Tensor, " columns"]
    """As many as `rotated_shape` has."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise SchemeError(f"rotation {self.kind!r}: expected one of {', '.join(KINDS)}")
        for side, signs in (("output", self.signs_out), ("input", self.signs_in)):
            usable = (signs.abs() == 1) if signs.dtype == torch.int8 else torch.isfinite(signs) & (signs != 0)
            if signs.dtype not in (torch.int8, torch.float16) or signs.ndim != 1 or not usable.all():
                given = f"{signs.dtype} of shape {tuple(signs.shape)}"
                raise ValueError(f"signs of the {side} side: expected a vector of +-1 in int8, or of float16 without zeros, got {given}")
        if self.rotated_shape(self.shape) != (len(self.signs_out), len(self.signs_in)):
            raise ValueError(f"{len(self.signs_out)} and {len(self.signs_in)} signs for a weight of {self.shape} under {self.kind}")

    @property
    def has_vectors(self) -> bool:
        """Whether its signs are vectors of other numbers."""
        return torch.float16 in (self.signs_out.dtype, self.signs_in.dtype)

    @classmethod
    def draw(cls, d_out: int, d_in: int, kind: str, seed: int) -> Rotation:
        """Random signs; those of the input side depend on `d_in` and `seed` alone.

        Raises:
            SchemeError: the kind is unknown.
        """
        generator, (rows, columns) = torch.Generator().manual_seed(seed), rotated_shape(kind, (d_out, d_in))
        signs_in, signs_out = (2 * torch.randint(2, (d,), generator=generator, dtype=torch.int8) - 1 for d in (columns, rows))
        return cls(kind=kind, shape=(d_out, d_in), signs_out=signs_out, signs_in=signs_in)

    def rotated_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Of the rotated weight."""
        return rotated_shape(self.kind, shape)

    def rotate_weight(self, W: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "rows columns"]:
        """`W~ = H_m S_out W S_in H_n^T`; also for errors of a weight."""
        into, out = (1 / signs.to(W.device, W.dtype) for signs in (self.signs_in, self.signs_out))
        return self._forward(self._forward(W, into).T, out).T.contiguous()

    def restore_weight(self, rotated: Float[Tensor, "rows columns"]) -> Float[Tensor, "d_out d_in"]:
        """`W = S_out H_m^T W~ H_n S_in`, the inverse of `rotate_weight`."""
        return self._backward(self.restore_output(rotated.T).T, self.signs_in)[:, : self.shape[1]].contiguous()

    def rotate_factors(self, factors: KroneckerFactors) -> KroneckerFactors:
        """The curvature in `W~`: the same scale, and factors of the same trace. What estimators carry is dropped."""
        return KroneckerFactors(
            H_out=self._congruent(factors.H_out, self.signs_out), H_in=self._congruent(factors.H_in, self.signs_in), scale=factors.scale
        )

    def rotate_input(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch columns"]:
        """`H_n S_in x`, what `W~` is applied to."""
        return self._forward(x, self.signs_in)

    def restore_output(self, y: Float[Tensor, "*batch rows"]) -> Float[Tensor, "*batch d_out"]:
        """`S_out H_m^T y`, the output of `W` from that of `W~`."""
        return self._backward(y, self.signs_out)[..., : self.shape[0]]

    def _forward(self, x: Tensor, signs: Tensor) -> Tensor:
        if x.shape[-1] < len(signs):
            x = pad(x, (0, len(signs) - x.shape[-1]))
        x = x * signs.to(x.device)
        return hadamard(x) if self.kind == "hadamard" else block_hadamard(x)

    def _backward(self, x: Tensor, signs: Tensor) -> Tensor:
        return (hadamard(x, transpose=True) if self.kind == "hadamard" else block_hadamard(x)) * signs.to(x.device)

    def _congruent(self, H: Tensor, signs: Tensor) -> Tensor:
        """`H_n S H S H_n^T`, symmetric to the last bit."""
        rotated = self._forward(self._forward(H, signs).T, signs)
        return (rotated + rotated.T) / 2


@dataclass(frozen=True, kw_only=True, eq=False)
class Permutation:
    """Columns in another order: those that share a scale side by side, where a model of others has them apart (GPTQ's activation order)."""

    columns: Integer[Tensor, " d_in"]
    """Of each column in that order, the weight's."""

    def rotate_weight(self, W: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "d_out d_in"]:
        """The weight in that order; also an error of it."""
        return W[:, self.columns].contiguous()

    def rotated_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Of the weight in that order."""
        return shape

    def restore_weight(self, rotated: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "d_out d_in"]:
        """The inverse."""
        return rotated[:, torch.argsort(self.columns)].contiguous()

    def rotate_factors(self, factors: KroneckerFactors) -> KroneckerFactors:
        """The curvature of the weight in that order."""
        H_in = factors.H_in[self.columns][:, self.columns].contiguous()
        return KroneckerFactors(H_out=factors.H_out, H_in=H_in, scale=factors.scale)
