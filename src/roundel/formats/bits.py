"""Dense bit streams of `b`-bit codes, which cross byte and word borders.

`pack_rows`: least significant bit first. Element `i` of a row occupies bits `i b .. (i + 1) b - 1` of the row's little-endian stream, which
is padded with zeros to whole 32-bit words.

`pack_tiles`: most significant bit first. The symbols of a tile, one after the other, are a stream of bits; it is cut into 32-bit words, the
first bit in the highest place of the first word. A file holds the little-endian words as pairs of int16.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

__all__ = ["pack_rows", "pack_tiles", "unpack_rows", "unpack_tiles"]

_ROWS = 256
"""Rows expanded to single bits at a time."""

_TILES = 4096
"""Tiles expanded to single bits at a time."""


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


def pack_tiles(symbols: UInt8[Tensor, "down across steps"], bits: int) -> Int[Tensor, "down across halves"]:
    """int16 halves of the words of each tile; its bits must fill whole words."""
    flat = symbols.flatten(0, 1).numpy()
    packed = np.empty((len(flat), flat.shape[1] * bits // 32), dtype="<u4")
    for start in range(0, len(flat), _TILES):
        part = flat[start : start + _TILES]
        stream = np.unpackbits(part[..., None], axis=-1)[..., 8 - bits :].reshape(len(part), -1)
        packed[start : start + _TILES] = np.packbits(stream, axis=1).view(">u4")
    halves: Tensor = torch.from_numpy(packed.view("<i2").astype(np.int16)).unflatten(0, symbols.shape[:2])
    return halves


def unpack_tiles(halves: Int[Tensor, "down across halves"], bits: int) -> UInt8[Tensor, "down across steps"]:
    """Inverse of `pack_tiles`."""
    words = halves.flatten(0, 1).numpy().astype("<i2").view("<u4")
    steps = words.shape[1] * 32 // bits
    symbols = np.empty((len(words), steps), dtype=np.uint8)
    for start in range(0, len(words), _TILES):
        part = words[start : start + _TILES].astype(">u4").view(np.uint8)
        stream = np.unpackbits(part, axis=1).reshape(len(part), steps, bits)
        symbols[start : start + _TILES] = np.packbits(stream, axis=-1)[..., 0] >> (8 - bits)
    unpacked: Tensor = torch.from_numpy(symbols).unflatten(0, halves.shape[:2])
    return unpacked
