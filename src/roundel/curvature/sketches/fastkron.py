"""The nearest Kronecker product to the Fisher by a Krylov method: FastKron (ACL 2026), from scratch and without stored gradients.

The best approximation of the Fisher by one Kronecker product in the Frobenius norm is the leading singular pair of the rearranged
Fisher (Van Loan and Pitsianis 1993), which maps `(d_in, d_in)` matrices to `(d_out, d_out)` matrices:

    R(V) = E[G V G^T],    R^T(U) = E[G^T U G].

Pass k over the same data and labels applies `R` to the newest vector `v_k` of the input side and `R^T` to the newest `u_k` of the
output side; the images, made orthogonal to all vectors of their side (twice), are the next `u_k+1` and `v_k+1`. From `u_0 = I`,
`v_0 = I`, so the first pass is Sketch B and all vectors are symmetric matrices. `span(u_0 .. u_k)` and `span(v_0 .. v_k)` contain
the two sides of the Krylov space of `[[0, R], [R^T, 0]]`. Rayleigh-Ritz: the singular value decomposition of the small matrix
`<u_i, R(v_j)>` gives Ritz values, the Ritz pair `(u, v)` and its residual `max(|R(v) - sigma u|, |R^T(u) - sigma v|) / sigma`.

A Ritz vector need not be positive semi-definite, where power iterates are. The image of the Ritz pair is known without another
pass, since images of basis vectors are: so `H_out = R(v)`, `H_in = R^T(u)`, half a step of power iteration beyond the Ritz pair, and
what is then still negative is clipped. A pair whose residual is within the tolerance stays as it is in later passes, which are not
run once that holds for all linears.

`batch=B`: `G` is the sum over `B` consecutive sequences, as in the paper (whose means differ by a factor). With labels from the
model sequences are independent with mean zero, so `sum_b G_b G_b^T` has the expectation of `sum_s G_s G_s^T`: no factor is
needed, and a last, smaller batch has its due weight. (Labels from the data have a mean, which such sums weigh `B` times.) It is
cheaper but noisier: `B` times fewer samples of the Fisher. The absolute scale is that of the single sequences, `E |G_s|^2` in nats
per token, whatever the batch.

Cost: `steps` passes. Per token, in sequences of `T`, the first as `sketch-b`, `2 d_in d_out + d_in d_out (d_in + d_out) / T` flops or
less, the others as `weighted`, `2 d_in d_out + 3 d_in d_out (d_in + d_out) / T` or less; with batches just these, with `B T` in the
place of `T`. Between passes `O(k (d_in^2 + d_out^2))`, and `d^3 / 3` for a Cholesky factor that tells whether anything is negative (an
eigendecomposition if so). Memory: `4 (k + 1) (d_in^2 + d_out^2)` bytes for the vectors of pass k and half as much as `weighted` for its
sums; an image is kept as its coefficients in the vectors. With batches one `G` for each linear. Sums and vectors float32, inner products
summed in float64.

Not done: block starts, restarts. The first two passes bring what those of `power` bring, the later ones more (docs/method.md); like
that of `power`, the converged pair is not the best one to round with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from roundel.curvature.sketches.base import Estimator, Sketch
from roundel.curvature.sketches.sketch_b import SketchBSums
from roundel.curvature.sketches.weighted import Weighted
from roundel.errors import SchemeError
from roundel.linalg.gram import symmetrise
from roundel.types import KroneckerFactors, LayerGrad

__all__ = ["FastKron", "FastKronSums"]

EXHAUSTED = 1e-5
"""What is left of an image after orthogonalisation, relative to the leading singular value, that is taken for rounding errors."""
LARGEST = 1e35
"""Of images and coefficients: sums of such vectors are formed in float32."""
CLIPPED = 1e-6
"""Negative eigenvalues down to this multiple of the mean diagonal are left to damping."""


def _inner(one: Tensor, other: Tensor) -> float:
    return torch.sum(one * other, dtype=torch.float64).item()


def _norm(image: Tensor) -> float:
    return float(torch.linalg.vector_norm(image, dtype=torch.float64))  # squares of small float32 numbers would vanish in float32


def _expanded(image: Tensor, basis: tuple[Tensor, ...], floor: float) -> tuple[Tensor, Tensor]:
    """Coefficients of `image` in `basis` and one more unit vector, and that vector: zero, if no more than `floor` is left.

    What float32 does not hold has coefficients that are infinite.
    """
    coefficients, rest = torch.zeros(len(basis) + 1, dtype=torch.float64), image.clone()
    for _twice in range(2):
        for i, vector in enumerate(basis):
            along = _inner(vector, rest)
            if not abs(along) < LARGEST:
                coefficients[i] = torch.inf
                return coefficients, torch.zeros_like(rest)
            rest.sub_(vector, alpha=along)
            coefficients[i] += along
    norm = _norm(rest)
    if norm <= floor:
        return coefficients, torch.zeros_like(rest)
    coefficients[-1] = norm
    return coefficients, symmetrise(rest / norm)


def _combined(coefficients: Tensor, basis: tuple[Tensor, ...]) -> Tensor:
    total = torch.zeros_like(basis[0])
    for value, vector in zip(coefficients.tolist(), basis, strict=True):
        total.add_(vector, alpha=value)
    return symmetrise(total)


def _positive(H: Tensor) -> Tensor:
    """The nearest positive semi-definite matrix to `H` or `-H`, whichever has the positive trace."""
    H = H.double() * (1 if H.trace() >= 0 else -1)
    shift = CLIPPED * H.diagonal().mean() * torch.eye(H.shape[0], dtype=H.dtype, device=H.device)
    if not torch.linalg.cholesky_ex(H + shift).info:
        return H.float()
    values, vectors = torch.linalg.eigh(H)
    return symmetrise(((vectors * values.clamp(min=0)) @ vectors.T).float())


@dataclass(frozen=True, kw_only=True)
class _Ritz:
    """Ritz values, the relative residual of the leading Ritz pair `(u, v)`, and the coefficients of `R(v)` and `R^T(u)`."""

    values: Tensor
    residual: float
    Rv: Tensor
    Rtu: Tensor


@dataclass(frozen=True, kw_only=True)
class _Krylov:
    """Orthonormal symmetric matrices `u_i`, `v_i`, `k + 1` on each side (zero where a side is exhausted), and the images of the first `k`.

    `R(v_j) = sum_i R[i, j] u_i` and `R^T(u_j) = sum_i Rt[i, j] v_i`, both `(k + 1, k)`, on the CPU.
    """

    u: tuple[Tensor, ...]
    v: tuple[Tensor, ...]
    R: Tensor
    Rt: Tensor

    @classmethod
    def start(cls, d_out: int, d_in: int, device: torch.device) -> _Krylov:
        u, v = (torch.eye(d, device=device) / d**0.5 for d in (d_out, d_in))
        none = torch.zeros(1, 0, dtype=torch.float64)
        return cls(u=(u,), v=(v,), R=none, Rt=none)

    @classmethod
    def carried(cls, carry: Mapping[str, Tensor]) -> _Krylov:
        R, Rt = carry["R"].cpu(), carry["Rt"].cpu()
        u, v = (tuple(carry[f"{side}.{i}"] for i in range(len(R))) for side in "uv")
        return cls(u=u, v=v, R=R, Rt=Rt)

    def carry(self) -> dict[str, Tensor]:
        vectors = {f"{side}.{i}": vector for side, basis in (("u", self.u), ("v", self.v)) for i, vector in enumerate(basis)}
        return {**vectors, "R": self.R, "Rt": self.Rt}

    def extended(self, Rv: Tensor, Rtu: Tensor) -> _Krylov:
        """With the images of the newest vectors."""
        known = [self.R.norm(dim=0), self.Rt.norm(dim=0), torch.tensor([_norm(Rv), _norm(Rtu)])]
        floor = EXHAUSTED * torch.cat(known).max().item()  # |R(v)| of a unit vector is at most the leading singular value
        k = self.R.shape[1]
        column, u = _expanded(Rv, self.u, floor)
        column_t, v = _expanded(Rtu, self.v, floor)
        R, Rt = torch.zeros(2, k + 2, k + 1, dtype=torch.float64)
        R[:-1, :-1], Rt[:-1, :-1], R[:, -1], Rt[:, -1] = self.R, self.Rt, column, column_t
        return _Krylov(u=(*self.u, u), v=(*self.v, v), R=R, Rt=Rt)

    @property
    def exhausted(self) -> bool:
        """Whether neither side has a next vector."""
        return not (self.R[-1, -1] or self.Rt[-1, -1])

    def ritz(self) -> _Ritz:
        Y, values, Zt = torch.linalg.svd((self.R[:-1] + self.Rt[:-1].T) / 2)  # equal but for rounding errors
        y, z, leading = Y[:, 0], Zt[0], values[0].item()
        Rv, Rtu, nothing = self.R @ z, self.Rt @ y, torch.zeros(1, dtype=torch.float64)
        residuals = [(Rv - leading * torch.cat([y, nothing])).norm(), (Rtu - leading * torch.cat([z, nothing])).norm()]
        return _Ritz(values=values, residual=max(residuals).item() / leading, Rv=Rv, Rtu=Rtu)


class FastKronSums(Sketch):
    """One pass: sums for the images of the newest vectors; without sums, if the pass before has converged.

    With batches, `partial` is the running sum of the `count` gradients of an incomplete batch. It is kept flat, as what is not a matrix
    is stored whole. `finish` counts it as a batch; before that there are no factors and no merging.
    """

    def __init__(
        self, d_out: int, d_in: int, device: torch.device, index: int, settings: FastKron, previous: KroneckerFactors | None
    ) -> None:
        super().__init__(d_out, d_in, device, index)
        self.settings, self.previous = settings, previous
        self.known: _Krylov | None = None
        """The vectors so far; none if no usable gradient came in an earlier pass."""
        self.images: SketchBSums | Weighted | None = None
        if previous is None:
            self.known, self.images = _Krylov.start(d_out, d_in, device), SketchBSums(d_out, d_in, device)
        elif previous.scale > 0:
            self.known = _Krylov.carried(previous.carry)
            if not self.known.exhausted and self.known.ritz().residual > settings.tolerance:
                newest = KroneckerFactors(H_out=self.known.u[-1], H_in=self.known.v[-1], scale=1.0)
                self.images = Weighted(d_out, d_in, device, index, newest)
        if self.images is not None:
            self.sums = dict(self.images.sums)
            if settings.batch > 1:
                self.sums["partial"] = torch.zeros(d_out * d_in, dtype=torch.float32, device=device)
                self.sums["count"] = torch.zeros((), dtype=torch.int64, device=device)

    def add_sequence(self, grad: LayerGrad, sequence: int) -> None:
        if self.images is None:
            return
        if self.settings.batch == 1:
            self.images.add_sequence(grad, sequence)
            return
        G = grad.weight_gradient(sequence)
        self.sums["trace"] += G.square().sum(dtype=torch.float64)
        self.sums["partial"] += G.flatten()
        self.sums["count"] += 1
        if self.pending() == self.settings.batch:
            self.finish()

    def pending(self) -> int:
        return int(self.sums["count"]) if "count" in self.sums else 0

    def finish(self) -> None:
        if self.images is not None and self.pending():
            self.images.add_gradient(self.sums["partial"].view(self.d_out, self.d_in))
            self.sums["partial"].zero_()
            self.sums["count"].zero_()

    def merge(self, other: Sketch) -> None:
        for sketch in (self, other):
            if sketch.pending():
                raise ValueError(
                    f"cannot merge: a batch has only {sketch.pending()} of {self.settings.batch} sequences; give sketches whole "
                    "batches, or call finish() first"
                )
        super().merge(other)

    def total_trace(self) -> Tensor:
        if self.images is None:
            return torch.zeros((), dtype=torch.float64)
        return self.sums["trace"] if self.settings.batch > 1 else self.images.total_trace()

    def _image_pair(self) -> tuple[Tensor, Tensor]:
        """`R(v)` and `R^T(u)` of the newest vectors, of the Fisher per token."""
        assert not self.pending(), "finish() comes first"
        tokens = max(self.tokens, 1)
        if isinstance(self.images, SketchBSums):  # the newest vectors are identities, divided by their norms
            Rv, Rtu = self.sums["GGt"] / self.d_in**0.5, self.sums["GtG"] / self.d_out**0.5
        else:
            Rv, Rtu = self.sums["GMGt"], self.sums["GtMG"]
        return symmetrise(Rv / tokens), symmetrise(Rtu / tokens)

    def _krylov(self) -> _Krylov | None:
        """The vectors with this pass's; none if no usable gradient came."""
        if self.known is None or self.images is None:
            return self.known
        Rv, Rtu = self._image_pair()
        trace = self.total_trace()
        if not (trace > 0 and torch.isfinite(trace) and _norm(Rv) < LARGEST and _norm(Rtu) < LARGEST):
            return None
        found = self.known.extended(Rv, Rtu)
        return found if (found.R.abs() < LARGEST).all() and (found.Rt.abs() < LARGEST).all() else None

    def factors(self) -> KroneckerFactors:
        if self.images is None:
            assert self.previous is not None
            return self.previous
        krylov = self._krylov()
        if krylov is None:
            return dataclasses.replace(self.normalised(*self._image_pair()), scale=0.0)
        ritz = krylov.ritz()
        factors = self.normalised(_positive(_combined(ritz.Rv, krylov.u)), _positive(_combined(ritz.Rtu, krylov.v)))
        return dataclasses.replace(factors, carry={} if self.index + 1 == self.settings.steps else krylov.carry())

    def singular_values(self) -> Tensor:
        """Ritz values, descending: lower bounds of the leading singular values of the rearranged Fisher per token, one for each pass.

        Of symmetric matrices, that is: antisymmetric ones, which `R` keeps to themselves, never come in.
        """
        krylov = self._krylov()
        return torch.zeros(1, dtype=torch.float64) if krylov is None else krylov.ritz().values

    def relative_residual(self) -> float:
        """`max(|R(v) - sigma u|, |R^T(u) - sigma v|) / sigma` of the leading Ritz pair; 0 if no usable gradient came."""
        krylov = self._krylov()
        return 0.0 if krylov is None else krylov.ritz().residual


@dataclass(frozen=True, kw_only=True)
class FastKron(Estimator):
    """`steps` passes at most, over sums of `batch` sequences; a relative residual of `tolerance` is enough."""

    steps: int = 4
    batch: int = 1
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        for name, value in (("steps", self.steps), ("batch", self.batch)):
            if value < 1:
                raise SchemeError(f"fastkron: {name}={value}, expected 1 or more")
        if not 0 <= self.tolerance < 1:
            raise SchemeError(f"fastkron: tolerance={self.tolerance}, expected 0 (run every step) or more, and less than 1")

    @property
    def passes(self) -> int:
        return self.steps

    @property
    def together(self) -> int:
        return self.batch

    def converged(self, sketch: Sketch) -> bool:
        return isinstance(sketch, FastKronSums) and sketch.relative_residual() <= self.tolerance

    def sketch(self, d_out: int, d_in: int, device: torch.device, *, index: int = 0, previous: KroneckerFactors | None = None) -> Sketch:
        return FastKronSums(d_out, d_in, device, index, self, previous)
