"""Products of which half is known before: Gram matrices of token matrices, and products with triangular matrices.

Problem: `x^T x` for `x (tokens, d)` costs `2 tokens d^2` flops as a general product, although half of the answer is known by symmetry, and
torch has no symmetric rank-k update. Formed here in block rows, each up to its diagonal block: `(blocks + 1) / (2 blocks)` of the
flops, 9/16 for 8 blocks. Only the lower block triangle of a sum of such Grams means anything until `symmetrise` mirrors it, once, at the
end. The product with a lower triangular matrix is formed by the same block rows, without the zeros.

On a GPU 16-bit tokens are multiplied as they are and summed in float32: products of two 16-bit numbers are exact there, so this is the
float32 result at the tensor cores' speed. The CPU has no such product and converts first.

On a CPU with bfloat16 units, within `fast.fast_products`, factors are *converted* to bfloat16 and so is each product before it is added in
float32: a relative error of 2^-9 an entry that is independent from sum to sum, and 2.5 times as fast as letting oneDNN round float32
factors (2.4 instead of 6.1 ms for 512 x 1536 on two cores with AVX512-BF16). Blocks are larger there.

Not done: float32 emulation by three bfloat16 products.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from roundel.linalg.fast import are_fast

__all__ = ["add_gram", "add_product", "add_symmetric_product", "gram", "lower_product", "mirror", "symmetrise"]

LEAF = 256
MIRROR = 256
STRIP = {"cpu": 64, "cuda": 256}
LEAF_FAST, STRIP_FAST = 1024, 512
"""Of products with bfloat16 factors."""


def _rectangles(start: int, stop: int, leaf: int, strip: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of rectangles that together cover the lower triangle, each entry once."""
    if stop - start <= max(leaf, 2 * strip - 1):  # else a half would be empty
        for first in range(start, stop, strip):
            last = min(first + strip, stop)
            yield slice(first, last), slice(start, last)
        return
    middle = start + (stop - start) // (2 * strip) * strip
    yield from _rectangles(start, middle, leaf, strip)
    yield slice(middle, stop), slice(start, middle)
    yield from _rectangles(middle, stop, leaf, strip)


def add_gram(total: Float[Tensor, "d d"], x: Float[Tensor, "tokens d"]) -> None:
    """Adds `x^T x` to `total` in place, in float32; of the entries above the diagonal nothing is promised."""
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
        for rows, columns in _rectangles(0, x.shape[1], LEAF, STRIP["cuda"]):
            total[rows, columns] += torch.mm(x[:, rows].T, x[:, columns], out_dtype=torch.float32)
        return
    if not are_fast(x.device):
        x = x.float()
    add_symmetric_product(total, x, x)


def add_symmetric_product(total: Float[Tensor, "d d"], x: Float[Tensor, "tokens d"], y: Float[Tensor, "tokens d"]) -> None:
    """Adds `x^T y`, known to be symmetric (as for `y = M x` with a symmetric `M`), as `add_gram` adds `x^T x`; both are float32."""
    leaf, strip = LEAF, STRIP[x.device.type]
    if are_fast(x.device):
        leaf, strip, alike = LEAF_FAST, STRIP_FAST, y is x
        x = x.bfloat16()  # once, not for each rectangle
        y = x if alike else y.bfloat16()
    for rows, columns in _rectangles(0, x.shape[1], leaf, strip):
        add_product(total[rows, columns], x[:, rows], y[:, columns])


def add_product(total: Float[Tensor, "m n"], x: Float[Tensor, "tokens m"], y: Float[Tensor, "tokens n"]) -> None:
    """Adds `x^T y` to `total` in place; within `fast.fast_products` of factors in bfloat16, and the product in bfloat16 too."""
    if are_fast(x.device):
        total += x.bfloat16().T @ y.bfloat16()
    else:
        total.addmm_(x.T, y)


def lower_product(lower: Float[Tensor, "d d"], y: Float[Tensor, "d n"]) -> Float[Tensor, "d n"]:
    """`lower @ y` of a lower triangular matrix, above whose diagonal there must be zeros, in the type of both or in bfloat16."""
    if are_fast(y.device):
        lower, y = lower.bfloat16(), y.bfloat16()
        product = torch.empty_like(y)
        for start in range(0, len(lower), STRIP_FAST):
            stop = start + STRIP_FAST
            product[start:stop] = lower[start:stop, :stop] @ y[:stop]
        return product
    product = torch.zeros_like(y)
    strip = STRIP[y.device.type]
    for rows, columns in _rectangles(0, len(lower), 2 * strip, strip):
        product[rows].addmm_(lower[rows, columns], y[columns])
    return product


def gram(x: Float[Tensor, "tokens d"]) -> Float[Tensor, "d d"]:
    """`x^T x` in float32, only the lower triangle is promised: `symmetrise` after all sums."""
    total = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float32, device=x.device)
    add_gram(total, x)
    return total


def symmetrise(lower: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """The full symmetric matrix of which only the lower triangle is read."""
    full = lower.clone()
    mirror(full)
    return full


def mirror(lower: Float[Tensor, "d d"]) -> None:
    """Makes it symmetric in its place, by its lower triangle."""
    for start in range(0, len(lower), MIRROR):
        stop = start + MIRROR
        lower[start:stop, stop:] = lower[stop:, start:stop].T
        square = lower[start:stop, start:stop]
        square.copy_(square.tril() + square.tril(-1).T)
