"""Dense bit streams: `b`-bit codes, least significant bit first, crossing byte and word borders.

Element `i` of a row occupies bits `i b .. (i + 1) b - 1` of the row's little-endian stream, which is padded with
zeros to whole 32-bit words.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

__all__ = ["pack_rows", "unpack_rows"]

_ROWS = 256
"""Rows expanded to single bits at a time."""


def pack_rows(codes: Int[Tensor, "rows columns"], bits: int) -> Int[Tensor, "rows words"]:
    """int32 words of unsigned codes `0 .. 2^bits - 1`."""
    rows, columns = codes.shape
    words = -(-columns * bits // 32)
    packed = np.zeros((rows, words * 4), dtype=np.uint8)
    values = codes.to(torch.uint8).numpy()
    for start in range(0, rows, _ROWS):
        part = values[start : start + _ROWS]
        stream = np.unpackbits(part[..., None], axis=-1, bitorder="little")[..., :bits].reshape(len(part), -1)
        filled = np.packbits(stream, axis=1, bitorder="little")
        packed[start : start + _ROWS, : filled.shape[1]] = filled
    return torch.from_numpy(packed.view("<i4").astype(np.int32))


def unpack_rows(words: Int[Tensor, "rows words"], bits: int, columns: int) -> Int[Tensor, "rows columns"]:
    """Inverse of `pack_rows`: unsigned codes as int16."""
    raw = words.numpy().astype("<i4").view(np.uint8)
    stream = np.unpackbits(raw, axis=1, bitorder="little", count=columns * bits).reshape(len(raw), columns, bits)
    values = np.packbits(stream, axis=-1, bitorder="little")[..., 0]
    return torch.from_numpy(values.astype(np.int16))
