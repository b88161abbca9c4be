"""Unit lower triangular factors: the one place that states the order of feedback.

`H = L D L^T` with `L` unit lower triangular and `D` positive diagonal. With rounding from the *last* row and column to the *first*, and
each target shifted by the strict lower parts, `L_out^T E L_in` equals the grid's own error (YAQA, arXiv 2505.22988, eq. 7), so
`tr(E^T H_out E H_in) = sum_ij D_out,i D_in,j eta_ij^2`. Cost `d^3 / 3` in float64.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from roundel.errors import NumericalError

__all__ = ["block_lower", "damped_cholesky", "damped_ldl", "ldl", "of_cholesky"]


STRIP = 512


def ldl(H: Float[Tensor, "d d"]) -> tuple[Float[Tensor, "d d"], Float[Tensor, " d"]] | None:
    """`(L, D)` in float64, or None where `H` is not numerically positive definite."""
    if (C := _cholesky(H.double())) is None:
        return None
    return of_cholesky(C)


def of_cholesky(C: Float[Tensor, "d d"]) -> tuple[Float[Tensor, "d d"], Float[Tensor, " d"]]:
    """`(L, D)` of the matrix with this Cholesky factor, `L` in its place."""
    diagonal = C.diagonal().clone()
    return C.div_(diagonal), diagonal**2


def _cholesky(H: Float[Tensor, "d d"]) -> Float[Tensor, "d d"] | None:
    C, info = torch.linalg.cholesky_ex(H)
    finite = torch.isfinite(C.diagonal()).all()  # what is not finite in a row also is in its diagonal entry
    return C if info.item() == 0 and finite else None


def block_lower(L: Float[Tensor, "d d"], block: int) -> Float[Tensor, "d d"]:
    """The unit *block* lower factor of the same matrix: column blocks `L[:, i] L_ii^-1`, with identities on the diagonal.

    With it `D` is block diagonal, `D_i = L_ii D_ii L_ii^T`. Cost `d^2 block / 2`; `block` divides `d`.
    """
    wide = L.double()
    result = torch.zeros_like(wide)
    for start in range(0, len(L), block):
        own = wide[start : start + block, start : start + block]
        result[start:, start : start + block] = torch.linalg.solve_triangular(
            own, wide[start:, start : start + block], upper=False, left=False, unitriangular=True
        )
    return result.to(L.dtype)


def damped_ldl(H: Float[Tensor, "d d"], damping: float) -> tuple[Float[Tensor, "d d"], Float[Tensor, "d d"], float]:
    """`(H + lambda mean(diag H) I, its L, lambda)` with the first `lambda` of `damping * 10^k` for which the result is positive definite.

    Raises:
        NumericalError: `H` holds a value that is not finite, or stays indefinite with `lambda = 100`.
    """
    damped, C, used = damped_cholesky(H, damping)
    return damped, of_cholesky(C)[0], used


def damped_cholesky(
    H: Float[Tensor, "d d"], damping: float, dtype: torch.dtype = torch.float64, order: Int[Tensor, " d"] | None = None
) -> tuple[Float[Tensor, "d d"], Float[Tensor, "d d"], float]:
    """The same with the Cholesky factor, of rows and columns in another order if one is given.

    Memory: these two matrices, and nothing else of their size.
    """
    if not torch.isfinite(H).all():
        raise NumericalError("a curvature factor holds values that are not finite; try float32 (--dtype float32) or other calibration text")
    damped = H.to(dtype, copy=True) if order is None else H[order[:, None], order].to(dtype)
    _average(damped)
    diagonal = damped.diagonal().clone()
    mean, used = H.diagonal().to(dtype).mean(), damping  # summed in the same order whatever `order` is
    while used <= 100:
        damped.diagonal().copy_(diagonal + used * mean)
        if (factor := _cholesky(damped)) is not None:
            return damped, factor, used
        used = max(used, 1e-6) * 10
    raise NumericalError(f"a curvature factor stays indefinite with damping {used / 10:g}; its mean diagonal is {mean.item():.3g}")


def _average(H: Float[Tensor, "d d"]) -> None:
    """The mean of `H` and its transpose, in its place."""
    for start in range(0, len(H), STRIP):
        rows = H[start : start + STRIP, start:]
        columns = H[start:, start : start + STRIP]
        mean = (rows + columns.T) / 2
        rows.copy_(mean)
        columns.copy_(mean.T)
