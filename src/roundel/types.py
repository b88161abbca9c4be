"""The values that flow through Roundel, one way.

    TokenBatch -> LayerGrad -> KroneckerFactors -> RoundingProblem -> RoundedWeight

Orientation everywhere: weights, codes and errors are `(d_out, d_in)` as in `torch.nn.Linear.weight`; `vec` is row-major
(`W.flatten()`), so the Fisher is `kron(H_out, H_in)`; losses are nats per token.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from roundel.linalg.gram import gram

__all__ = ["Factors", "GroupedFactors", "KroneckerFactors", "LayerGrad", "LayerInput", "RoundedWeight", "RoundingProblem", "TokenBatch"]


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """Packed token sequences of one length; no padding.

    `ids` is `(sequences, tokens)`. `sequence_ids` seeds all randomness of a sequence, so that no result depends on how
    sequences are grouped into batches.
    """

    ids: Int[Tensor, "sequences tokens"]
    sequence_ids: tuple[int, ...]

    @classmethod
    def of(cls, ids: Int[Tensor, "sequences tokens"]) -> TokenBatch:
        """Sequences that are known by their contents: 48 bits of the SHA-256 of their tokens."""
        rows = (row.astype("<i4").tobytes() for row in ids.numpy())
        return cls(ids=ids, sequence_ids=tuple(int.from_bytes(hashlib.sha256(row).digest()[:6], "big") for row in rows))

    def __post_init__(self) -> None:
        if len(self.sequence_ids) != self.ids.shape[0]:
            raise ValueError(f"{len(self.sequence_ids)} sequence ids for {self.ids.shape[0]} sequences")

    def __len__(self) -> int:
        return self.ids.shape[0]

    def __getitem__(self, rows: slice) -> TokenBatch:
        return TokenBatch(ids=self.ids[rows], sequence_ids=self.sequence_ids[rows])

    def select(self, rows: Sequence[int]) -> TokenBatch:
        """These rows, in this order."""
        return TokenBatch(ids=self.ids[list(rows)], sequence_ids=tuple(self.sequence_ids[row] for row in rows))

    def split(self, size: int) -> list[TokenBatch]:
        """Consecutive parts of at most `size` sequences."""
        return [self[start : start + size] for start in range(0, len(self), size)]


class LayerInput:
    """The input `x` of one or several linears (q, k and v read the same tensor), with what they share.

    The Gram matrix and the norms of each sequence are formed at most once, however many linears and estimators ask for them.
    """

    def __init__(self, x: Float[Tensor, "sequences tokens d_in"]) -> None:
        self.x = x
        self._grams: list[Tensor | None] = [None] * x.shape[0]
        self._norms: list[Tensor | None] = [None] * x.shape[0]

    def gram(self, sequence: int) -> Float[Tensor, "d_in d_in"]:
        """`sum_t x_t x_t^T` of one sequence, in float32; only the lower block triangle is filled (see `linalg.gram`)."""
        found = self._grams[sequence]
        if found is None:
            found = self._grams[sequence] = gram(self.x[sequence])
        return found

    def norms(self, sequence: int) -> Float[Tensor, " tokens"]:
        """`|x_t|` of one sequence, in float32."""
        found = self._norms[sequence]
        if found is None:
            found = self._norms[sequence] = torch.linalg.vector_norm(self.x[sequence], dim=-1, dtype=torch.float32)
        return found


@dataclass(frozen=True, kw_only=True)
class LayerGrad:
    """What one linear saw in one backward pass.

    `input.x` is `(sequences, rows, d_in)`; `g` is `(sequences, rows, d_out)`, the gradient of the *summed* negative log-likelihood at the
    linear's output. A row is a token, unless the linear sees some tokens only, or more than once. Lives only inside the backward hook.
    """

    input: LayerInput
    g: Float[Tensor, "sequences rows d_out"]
    text: int | None = None
    """Tokens of each sequence, where they are not the rows: what is given per token is per token of text."""
    blind: bool = False
    """Whether it was used although no gradient came back."""

    @property
    def tokens(self) -> int:
        """Of each sequence."""
        return self.g.shape[1] if self.text is None else self.text

    def sequences(self) -> range:
        """Rows of the batch."""
        return range(self.g.shape[0])

    def weight_gradient(self, sequence: int) -> Float[Tensor, "d_out d_in"]:
        """`G_s = sum_t g_t x_t^T` of one sequence, in float32."""
        return self.g[sequence].float().T @ self.input.x[sequence].float()

    def inner(self, sequence: int, E: Float[Tensor, "d_out d_in"]) -> Float[Tensor, ""]:
        """`<G_s, E>` of one sequence in float64, without forming `G_s`."""
        x = self.input.x[sequence].to(torch.float32, copy=True)  # at an address that is not aligned some machines round differently
        return ((x @ E.T) * self.g[sequence].float()).sum(dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class KroneckerFactors:
    """Curvature of the model's KL in one weight: `F ~ scale * kron(H_out, H_in)` in nats per token per weight squared.

    Both factors are symmetric, positive semi-definite and normalised to a mean diagonal of 1; `scale` carries the absolute size, so
    that `scale * 1/2 tr(E^T H_out E H_in)` is a KL in nats per token.
    """

    H_out: Float[Tensor, "d_out d_out"]
    H_in: Float[Tensor, "d_in d_in"]
    scale: float
    carry: Mapping[str, Tensor] = field(default_factory=dict)
    """What else the estimator's next pass needs, if it has one."""

    def row_groups(self) -> list[tuple[slice, KroneckerFactors]]:
        """Rows of the weight and their own factors: one group of all rows."""
        return [(slice(0, self.H_out.shape[0]), self)]

    def loss(self, E: Float[Tensor, "d_out d_in"]) -> float:
        """`scale * 1/2 tr(E^T H_out E H_in)`, nats per token, summed in float64; all in float64 where float32 does not hold it."""
        found = torch.sum(self.H_out @ E @ self.H_in * E, dtype=torch.float64).item()
        if not math.isfinite(found):
            wide = E.double()
            found = torch.sum(self.H_out.double() @ wide @ self.H_in.double() * wide).item()
        return 0.5 * self.scale * found

    @classmethod
    def normalised(cls, H_out: Tensor, H_in: Tensor, *, trace: float) -> KroneckerFactors:
        """Factors from any positive multiples of them and `trace`, the trace of the per-token Fisher of the whole matrix.

        A factor whose trace is zero or not finite is returned as it is, with scale 0: the caller decides what to do.
        """
        d_out, d_in = H_out.shape[0], H_in.shape[0]
        mean_out, mean_in = H_out.diagonal().mean().item(), H_in.diagonal().mean().item()
        usable = all(torch.isfinite(torch.tensor([mean_out, mean_in, trace]))) and min(mean_out, mean_in, trace) > 0
        if not usable:
            return cls(H_out=H_out, H_in=H_in, scale=0.0)
        return cls(H_out=H_out / mean_out, H_in=H_in / mean_in, scale=trace / (d_out * d_in))


@dataclass(frozen=True, kw_only=True)
class GroupedFactors:
    """Groups of consecutive rows with factors of their own and no coupling: `F ~ blockdiag_k(scale_k * kron(H_out_k, H_in_k))`."""

    groups: tuple[KroneckerFactors, ...]

    @property
    def scale(self) -> float:
        """0 where a group has no usable curvature; else the mean over groups."""
        scales = [group.scale for group in self.groups]
        return sum(scales) / len(scales) if min(scales) > 0 else 0.0

    def row_groups(self) -> list[tuple[slice, KroneckerFactors]]:
        """Rows of the weight and their own factors."""
        found, start = [], 0
        for group in self.groups:
            stop = start + group.H_out.shape[0]
            found.append((slice(start, stop), group))
            start = stop
        return found


Factors = KroneckerFactors | GroupedFactors
"""What an estimator makes of its sums: groups of rows are rounded by themselves."""


@dataclass(frozen=True, kw_only=True)
class RoundingProblem:
    """Find codes whose error `E = W - W_hat` makes `1/2 tr(E^T H_out E H_in)` small.

    Here the factors are damped and positive definite: `L_out`, `L_in` are their unit lower triangular LDL factors, of rows and columns in
    `order` (None: as they are), and `D_out`, `D_in` the diagonals, row by row and column by column as in `W`: what an error
    there costs after what others take back. `scale` turns the (undamped) loss into nats per token; `damping` is what was really added,
    relative to the mean diagonal.
    """

    W: Float[Tensor, "d_out d_in"]
    H_out: Float[Tensor, "d_out d_out"]
    H_in: Float[Tensor, "d_in d_in"]
    L_out: Float[Tensor, "d_out d_out"]
    L_in: Float[Tensor, "d_in d_in"]
    D_out: Float[Tensor, " d_out"]
    D_in: Float[Tensor, " d_in"]
    scale: float
    damping: float
    order: tuple[Int[Tensor, " d_out"], Int[Tensor, " d_in"]] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """`(d_out, d_in)`."""
        return self.W.shape[0], self.W.shape[1]

    def loss(self, E: Float[Tensor, "d_out d_in"], curved: Float[Tensor, "d_out d_in"] | None = None) -> float:
        """The damped proxy loss `1/2 tr(E^T H_out E H_in)`, summed in float64; `curved` is `H_out E H_in`, where it is there already."""
        curved = self.H_out @ E @ self.H_in if curved is None else curved
        return 0.5 * torch.sum(curved * E, dtype=torch.float64).item()


@runtime_checkable
class Undoable(Protocol):
    """What a weight went through before it was rounded (`rotation.Rotation`)."""

    def rotated_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Of what is rounded of a weight of this shape."""

    def restore_weight(self, rotated: Float[Tensor, "rows columns"]) -> Float[Tensor, "d_out d_in"]:
        """The weight as it was before."""


@dataclass(frozen=True, kw_only=True)
class RoundedWeight:
    """Integer codes and their scales by name; what they mean is the grid's business.

    `codes` is `(d_out, d_in)` int8 for grids of scalars, `(tile rows, tile columns, symbols)` for tiles; of `scales` each entry is for a
    block of the weight, in the type in which it is stored.
    """

    scheme: str
    """Name of the grid."""
    codes: Integer[Tensor, "..."]
    scales: Mapping[str, Tensor]
    shape: tuple[int, int]
    """Of the weight, `(d_out, d_in)`."""
    rotation: Undoable | None = None
    """What the weight went through before it was rounded, and is to be undone after decoding."""
    trace: tuple[float, ...] = field(default=())
    """The damped proxy loss before the sweeps over the whole weight and after each: never rising."""

    @property
    def rotated_shape(self) -> tuple[int, int]:
        """Of what the codes stand for: the rotated weight's."""
        return self.shape if self.rotation is None else self.rotation.rotated_shape(self.shape)
