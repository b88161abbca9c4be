"""Gram matrices of token matrices, at half the flops.

Problem: `x^T x` for `x (tokens, d)` costs `2 tokens d^2` flops as a general product, although half of the answer is known by symmetry, and
torch has no symmetric rank-k update. Formed here in block rows, each up to its diagonal block: `(blocks + 1) / (2 blocks)` of the
flops. Only the lower block triangle of a sum of such Grams means anything until `symmetrise` mirrors it, once, at the end.

On a GPU 16-bit tokens are multiplied as they are and summed in float32: products of two 16-bit numbers are exact there, so this is the
float32 result at the tensor cores' speed. The CPU has no such product and converts first.

Not done: float32 emulation by three bfloat16 products.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["add_gram", "add_symmetric_product", "gram", "symmetrise"]

BLOCK = 256


def add_gram(total: Float[Tensor, "d d"], x: Float[Tensor, "tokens d"]) -> None:
    """Adds `x^T x` to `total` in place, in float32; of the blocks above the diagonal nothing is promised."""
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
        for start in range(0, x.shape[1], BLOCK):
            stop = min(start + BLOCK, x.shape[1])
            total[start:stop, :stop] += torch.mm(x[:, start:stop].T, x[:, :stop], out_dtype=torch.float32)
        return
    x = x.float()
    add_symmetric_product(total, x, x)


def add_symmetric_product(total: Float[Tensor, "d d"], x: Float[Tensor, "tokens d"], y: Float[Tensor, "tokens d"]) -> None:
    """Adds `x^T y`, known to be symmetric (as for `y = M x` with a symmetric `M`), as `add_gram` adds `x^T x`; both are float32."""
    d = x.shape[1]
    for start in range(0, d, BLOCK):
        stop = min(start + BLOCK, d)
        total[start:stop, :stop].addmm_(x[:, start:stop].T, y[:, :stop])


def gram(x: Float[Tensor, "tokens d"]) -> Float[Tensor, "d d"]:
    """`x^T x` in float32, lower block triangle only (the rest is zero): `symmetrise` after all sums."""
    total = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float32, device=x.device)
    add_gram(total, x)
    return total


def symmetrise(lower: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """The full symmetric matrix of which only the lower triangle is read."""
    below = lower.tril(-1)
    return below + below.T + torch.diag(lower.diagonal())
