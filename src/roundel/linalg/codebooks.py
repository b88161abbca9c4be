"""Codes of trellises: what each state of a shift register stands for, computed from the state by a few integer operations.

`s` is a state as an unsigned number, sums and products are modulo `2^32`, `f16(.)` reads 16 bits as a float16:

    1mad   y = 34038481 s + 76625530;  (sum of the 4 bytes of y - 510) / 147.800537109375
    3inst  y = 89226354 s + 64248484;  z = (y & 0x8FFF8FFF) ^ 0x3B603B60;  f16(low half of z) + f16(high half), rounded to float16
    mcg    the same with y = 0xCBAC1FED s
    mul1   y = 0x83DCD12D s;  (sum of the 4 bytes of y + 1024) 0.00676727294921875 - 10.3828125, rounded to float16
    hyb    two values: row (h >> 6) & 511 of a table, h = s (s + 1), the first of them negative where bit 15 of h is set

`1mad`, `3inst` and `hyb` are QTIP's (Tseng, Sun, Hou & De Sa 2024, arXiv 2406.11235), `mcg` and `mul1` EXL3's; `3inst`, `mcg` and `mul1`
with
16 state bits are what exllamav3 decodes, bit for bit. Registers of fewer bits use the same functions of smaller states; only `hyb` first
shifts its states up to 16 bits, so that they still reach the whole table.

The table of `hyb` is 512 centres of a Gaussian in the plane, made once by `hybrid_table` and kept beside this file, since sums and
logarithms of other machines may differ in the last bit. Not done: tables trained with the model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.resources import files

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["CODES", "code_table", "hybrid_table"]

CODES = {"1mad": 1, "3inst": 1, "mcg": 1, "mul1": 1, "hyb": 2}
"""Values of one state, by the code's name."""

HYBRID_STD = 0.9682458365518543
"""sqrt(15/16): the root mean square of the best two-bit code of a unit Gaussian."""

HYBRID_BITS = 9

_MODULUS = 0xFFFFFFFF


@cache
def code_table(name: str, state_bits: int) -> Float[Tensor, "states values"]:
    """The values of all `2^state_bits` states, float32. The table is shared: it must not be changed.

    Raises:
        KeyError: no such code.
        ValueError: state bits outside 1 to 16.
    """
    if not 1 <= state_bits <= 16:
        raise ValueError(f"{state_bits} state bits: the codes are functions of 1 to 16 bits")
    state = torch.arange(2**state_bits, dtype=torch.int64)  # products stay below 2^48
    values: dict[str, Callable[[Tensor], Tensor]] = {
        "1mad": _one_mad,
        "3inst": _three_instructions,
        "mcg": _mcg,
        "mul1": _mul1,
        "hyb": lambda s: _hybrid(s << (16 - state_bits)),
    }
    return values[name](state).reshape(2**state_bits, CODES[name])


def _one_mad(state: Tensor) -> Tensor:
    return ((_byte_sum((34038481 * state + 76625530) & _MODULUS) - 510) / 147.800537109375).float()


def _three_instructions(state: Tensor) -> Tensor:
    return _sum_of_halves((89226354 * state + 64248484) & _MODULUS)


def _mcg(state: Tensor) -> Tensor:
    return _sum_of_halves((0xCBAC1FED * state) & _MODULUS)


def _mul1(state: Tensor) -> Tensor:
    total = 1024 + _byte_sum((0x83DCD12D * state) & _MODULUS)
    return (total.double() * 0.00676727294921875 - 10.3828125).half().float()  # exact before it is rounded, once


def _byte_sum(word: Tensor) -> Tensor:
    return sum((word >> shift & 0xFF for shift in (8, 16, 24)), start=word & 0xFF)


def _sum_of_halves(word: Tensor) -> Tensor:
    mixed = ((word & 0x8FFF8FFF) ^ 0x3B603B60).numpy().astype("<u4")
    halves = torch.from_numpy(mixed.view("<f2").astype(np.float32).reshape(-1, 2))
    return halves.sum(1).half().float()  # the sum of two halves is exact in float32


def _hybrid(state: Tensor) -> Tensor:
    mixed = state * (state + 1)
    with files("roundel.linalg").joinpath("hybrid_table.npy").open("rb") as file:
        table = torch.from_numpy(np.load(file).astype(np.float32))
    values = table[mixed >> 6 & (2**HYBRID_BITS - 1)]
    sign = 1.0 - 2.0 * (mixed >> 15 & 1).float()
    return torch.stack([values[:, 0] * sign, values[:, 1]], 1)


def hybrid_table(points: int = 2**20, rounds: int = 100, seed: int = 0) -> np.ndarray[tuple[int, ...], np.dtype[np.float16]]:
    """The `512 x 2` table that was stored: Lloyd's algorithm on Gaussian points, from the first 512 of them; std `HYBRID_STD`, float16.

    Two minutes on one core; the stored bytes came from numpy 2.4 on x86-64.
    """
    size = 2**HYBRID_BITS
    cloud = np.random.default_rng(seed).standard_normal((points, 2)).astype(np.float32)
    centres = cloud[:size].astype(np.float64)
    for _ in range(rounds):
        nearest = np.concatenate([_nearest(part, centres.astype(np.float32)) for part in np.array_split(cloud, max(1, points // 2**14))])
        counts = np.maximum(np.bincount(nearest, minlength=size), 1)
        centres = np.stack([np.bincount(nearest, weights=cloud[:, axis], minlength=size) / counts for axis in (0, 1)], 1)
    table: np.ndarray = (centres * (HYBRID_STD / centres.std())).astype(np.float16)
    return table


def _nearest(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    nearest: np.ndarray = np.argmin((centres**2).sum(1) - 2 * points @ centres.T, axis=1)
    return nearest
