"""From measured factors to a rounding problem: damping that is always enough, and LDL factors."""

from __future__ import annotations

import torch
from torch import Tensor

from roundel.linalg.ldl import damped_cholesky, of_cholesky
from roundel.types import KroneckerFactors, RoundingProblem

__all__ = ["make_problem"]


def make_problem(
    W: Tensor, factors: KroneckerFactors, *, damping: float, dtype: torch.dtype = torch.float32, ordered: bool = False
) -> RoundingProblem:
    """Damps each factor by `damping` times its mean diagonal, ten times more while it is not positive definite, and factorises it.

    Factorised in float64, handed on in `dtype`. Cost `(d_out^3 + d_in^3) / 3`.

    Args:
        ordered: rows and columns are decided with the largest diagonal first, for grids that round each weight by itself.

    Raises:
        NumericalError: a factor is not finite or cannot be made positive definite.
    """
    order = (factors.H_out.diagonal().argsort(stable=True), factors.H_in.diagonal().argsort(stable=True)) if ordered else None
    rows, columns = order or (None, None)
    H_out, L_out, D_out, used_out = _factorised(factors.H_out, damping, dtype, rows)
    H_in, L_in, D_in, used_in = _factorised(factors.H_in, damping, dtype, columns)
    return RoundingProblem(
        W=W.to(dtype),
        H_out=H_out,
        H_in=H_in,
        L_out=L_out,
        L_in=L_in,
        D_out=D_out,
        D_in=D_in,
        scale=factors.scale,
        damping=max(used_out, used_in),
        order=order,
    )


def _factorised(H: Tensor, damping: float, dtype: torch.dtype, order: Tensor | None) -> tuple[Tensor, Tensor, Tensor, float]:
    """`H` damped, `L` in the order of decisions, `D` in that of the weight, and the damping."""
    wide, C, used = damped_cholesky(H, damping, order=order)
    damped = wide.to(dtype)
    del wide
    L, D = (part.to(dtype) for part in of_cholesky(C))
    del C
    if order is not None:
        damped = torch.empty_like(damped).index_put_((order[:, None], order), damped)
        D = torch.empty_like(D).index_put_((order,), D)
    return damped, L, D, used
