"""An orthonormal transform with flat entries for every width, in a time that is nearly linear.

    H_n = [cas_m kron] P_1 kron ... kron P_r kron S_1 kron ... kron S_t,      y = H_n x along the last axis

`S` are Sylvester's Hadamard matrices of orders up to 64, together the power of two. With `n = odd * 2^k` the odd part is

1. a product of Hadamard matrices `P` of orders `divisor * 2^j`, where Paley's constructions reach all of it within `LARGEST`: of order
   `q + 1` for a prime `q = 3 mod 4`, of order `2 (q + 1)` for a prime or the square of a prime `q = 1 mod 4`. All entries of `H_n` are
   then `+-1 / sqrt(n)`. The cheapest product is taken (28 for 14336, 12 * 28 * 44 for 29568);
2. else the discrete Hartley transform of the whole odd part, `cas_m[i, j] = (cos + sin)(2 pi i j / m) / sqrt(m)`, by a Fourier
   transform. It is symmetric, and the entries of `H_n` are at most `sqrt(2 / n)`.

Cost for each vector: `2 n` flops times the sum of the orders, `n log m` for the Hartley part, and one pass over memory for each factor. The
largest sum of Paley orders among the usual widths of models is 148 (18944). Tables: the factors alone, at most 256 x 256 numbers each.
References: Paley, J. Math. Phys. 12 (1933); Bracewell, J. Opt. Soc. Am. 73 (1983).

Not done: Williamson's and other constructions (172 = 4 * 43 uses Hartley), prime powers beyond squares, 16-bit types.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from roundel.errors import SchemeError

__all__ = ["BLOCK", "block_hadamard", "hadamard"]

BLOCK = 128
"""Columns of one block of the block form."""
LARGEST = 256
"""Largest order of a Paley matrix: beyond, Hartley is nearly as flat and much cheaper."""
SYLVESTER = 6
"""A factor of a power of two has at most this many twos: larger ones are more flops, smaller ones more passes over memory."""


def hadamard(x: Float[Tensor, "*batch n"], *, transpose: bool = False) -> Float[Tensor, "*batch n"]:
    """`H_n x` for each vector `x` along the last axis, or `H_n^T x`, its inverse; float32 or float64, on any device.

    Raises:
        ValueError: the type is another, or `n` is 0.
    """
    n = x.shape[-1]
    if x.dtype not in (torch.float32, torch.float64) or n == 0:
        raise ValueError(f"a transform of {n} numbers of {x.dtype}: expected at least 1 of float32 or float64; convert first")
    odd, orders = _plan(n)
    vectors = x.numel() // n
    y, inner = x * n**-0.5, 1
    for order in reversed(orders):
        factor = _matrix(order, x.dtype, x.device)
        if transpose:
            factor = factor.T
        if inner == 1:
            y = y.reshape(vectors * (n // order), order) @ factor.T
        else:
            y = factor @ y.reshape(vectors * (n // (order * inner)), order, inner)
        inner *= order
    if odd > 1:
        spectrum = torch.fft.fft(y.reshape(vectors, odd, inner), dim=1)
        y = spectrum.real - spectrum.imag
    result: Tensor = y.reshape(x.shape)
    return result


def block_hadamard(x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
    """`(I kron H_128) x` along the last axis, with Sylvester's `H_128`; its own inverse.

    Raises:
        SchemeError: 128 does not divide `n`.
    """
    if x.shape[-1] % BLOCK:
        raise SchemeError(f"blocks of {BLOCK} do not divide the width {x.shape[-1]}; try the Hadamard transform of the full width")
    return hadamard(x.unflatten(-1, (-1, BLOCK))).flatten(-2)


@cache
def _plan(n: int) -> tuple[int, tuple[int, ...]]:
    """The order of the Hartley part (1: none) and those of the Hadamard factors, the outermost first."""
    twos = (n & -n).bit_length() - 1
    odd = n >> twos
    paley = _cheapest(odd, twos)
    if paley is None:
        hartley, paley = odd, ()
    else:
        hartley = 1
        twos = (n // math.prod(paley)).bit_length() - 1
    parts = -(-twos // SYLVESTER)
    return hartley, (*paley, *(1 << (twos // parts + (part < twos % parts)) for part in range(parts)))


@cache
def _cheapest(odd: int, twos: int) -> tuple[int, ...] | None:
    """Paley orders of the least sum whose product is `odd` times at most `2^twos`; None: there are none."""
    if odd == 1:
        return ()
    best = None
    for divisor in range(3, min(odd, LARGEST // 4) + 1, 2):
        orders = [divisor << j for j in range(2, twos + 1) if divisor << j <= LARGEST and _field(divisor << j)]
        if odd % divisor or not orders:
            continue
        rest = _cheapest(odd // divisor, twos - (orders[0] // divisor).bit_length() + 1)
        if rest is not None and (best is None or orders[0] + sum(rest) < sum(best)):
            best = (orders[0], *rest)
    return best


def _field(order: int) -> int | None:
    """The size `q` of the field from which Paley makes a Hadamard matrix of this order (a multiple of 4); None: there is none."""
    if _prime(order - 1):
        return order - 1
    q = order // 2 - 1
    return q if q % 4 == 1 and (_prime(q) or _prime(_root(q))) else None


def _prime(q: int) -> bool:
    return q > 1 and all(q % divisor for divisor in range(2, math.isqrt(q) + 1))


def _root(q: int) -> int:
    """The square root if it is whole, else 0."""
    root = math.isqrt(q)
    return root if root * root == q else 0


@cache
def _matrix(order: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "order order"]:
    """A Hadamard matrix with entries of +-1: Sylvester's for a power of two, else Paley's."""
    with torch.inference_mode(False):  # kept for all callers, some of which may differentiate
        q = None if order & (order - 1) == 0 else _field(order)
        if q is None:
            sylvester = torch.ones(1, 1, dtype=torch.int64)
            while len(sylvester) < order:
                sylvester = torch.kron(torch.tensor([[1, 1], [1, -1]]), sylvester)
            return sylvester.to(device, dtype)
        core = torch.ones(q + 1, q + 1, dtype=torch.int64)
        core[0, 0] = 0
        core[1:, 1:] = _characters(q)
        identity = torch.eye(q + 1, dtype=torch.int64)
        if q % 4 == 3:
            core[1:, 0] = -1  # skew, and core core^T = q I
            return (core + identity).to(device, dtype)
        one, other = torch.tensor([[1, 1], [1, -1]]), torch.tensor([[1, -1], [-1, -1]])
        return (torch.kron(core, one) + torch.kron(identity, other)).to(device, dtype)


def _characters(q: int) -> Int[Tensor, "q q"]:
    """`chi(a - b)` over all pairs of the field with `q` elements: 1 for squares, -1 for others, 0 for 0.

    In the field of `p^2`, numbers `u + v sqrt(r)` with a non-square `r`, the squares are those whose norm `u^2 - r v^2` is one mod `p`.
    """
    p = _root(q) or q
    chi = torch.full((p,), -1)
    chi[torch.arange(p) ** 2 % p] = 1
    chi[0] = 0
    element = torch.arange(q)
    u = (element[:, None] % p - element % p) % p
    if p == q:
        return chi[u]
    v = element[:, None] // p - element // p
    r = int((chi == -1).nonzero()[0])
    return chi[(u * u - r * v * v) % p]
