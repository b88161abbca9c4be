"""From measured factors to a rounding problem: damping that is always enough, and LDL factors."""

from __future__ import annotations

import torch
from torch import Tensor

from roundel.linalg.ldl import damped_ldl
from roundel.types import KroneckerFactors, RoundingProblem

__all__ = ["make_problem"]


def make_problem(W: Tensor, factors: KroneckerFactors, *, damping: float, dtype: torch.dtype = torch.float32) -> RoundingProblem:
    """Damps each factor by `damping` times its mean diagonal, ten times more while it is not positive definite, and factorises it.

    Factorised in float64, handed on in `dtype`. Cost `(d_out^3 + d_in^3) / 3`.

    Raises:
        NumericalError: a factor is not finite or cannot be made positive definite.
    """
    H_out, L_out, used_out = _factorised(factors.H_out, damping, dtype)
    H_in, L_in, used_in = _factorised(factors.H_in, damping, dtype)
    return RoundingProblem(
        W=W.to(dtype), H_out=H_out, H_in=H_in, L_out=L_out, L_in=L_in, scale=factors.scale, damping=max(used_out, used_in)
    )


def _factorised(H: Tensor, damping: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
    wide, L, used = damped_ldl(H, damping)
    damped = wide.to(dtype)
    del wide
    return damped, L.to(dtype), used
