"""Bytes of llama.cpp's block types: from codes and scales of `roundel.grids.blocks`, `.codebooks` and `mxfp4` to rows for a GGUF file.

Every function takes int8 codes `(d_out, d_in)`, or of codebooks int16 `(d_out, tiles, symbols)`, and the grid's scales, and returns uint8
`(d_out, bytes of a row)`, little-endian.
In what follows `q` are codes counted from the lowest, and `fields(n, b)` means: of each `n * 8 / b` elements, byte `l` holds elements
`l, l + n, l + 2 n, ...`, `b` bits each, the first in the lowest bits.

    q4_0, iq4_nl   d f16, q fields(16, 4)
    q5_0           d f16, bit 4 of q fields(1, 1), bits 0..3 of q fields(16, 4)
    q8_0           d f16, codes as int8
    mxfp4          exponent + 127, q fields(16, 4) with the sign in bit 3 and the magnitude's index in bits 0..2
    iq4_xs         d f16, u16 and 4 bytes of sc, of each 32 elements q fields(16, 4)
    q2_k           16 bytes sc | m << 4, q fields(32, 2), d f16, dmin f16
    q3_k           bit 2 of q fields(32, 1), bits 0..1 of q fields(32, 2), 12 bytes sc + 32, d f16
    q4_k           d f16, dmin f16, 12 bytes sc and m, q fields(32, 4)
    q5_k           d f16, dmin f16, 12 bytes sc and m, bit 4 of q fields(32, 1), bits 0..3 of q fields(32, 4)
    q6_k           bits 0..3 of q fields(64, 4), bits 4..5 of q fields(32, 2), 16 int8 sc, d f16
    iq2_xxs        d f16, for each 32 columns 4 numbers and a word
    iq2_xs         d f16, 16 bits number | signs << 9, sc fields(1, 4)
    iq2_s          d f16, bits 0..7 of numbers, signs, bits 8..9 of numbers fields(1, 2), sc fields(1, 4)
    iq3_xxs        d f16, numbers, for each 32 columns a word
    iq3_s          d f16, bits 0..7 of numbers, bit 8 fields(1, 1), signs fields(1, 4), sc fields(1, 4)

A word is `signs 0 | signs 1 << 7 | signs 2 << 14 | signs 3 << 21 | sc << 28`; of signs that are even in number the eighth is left out.

The 12 bytes of q4_k and q5_k, for 8 groups with 6 bits each: `sc[i] | sc[i+4] >> 4 << 6`, `m[i] | m[i+4] >> 4 << 6`,
`sc[i+4] & 15 | (m[i+4] & 15) << 4`, i = 0..3. Those of iq4_xs, for 8 groups with u = sc + 32: the two high bits of u, fields(1, 2), then
the low halves of u, fields(1, 4). Those of q3_k, for 16 groups with u = sc + 32: the low halves of u, fields(8, 4), then
the two high bits of u, fields(4, 2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float16, Int8, Int16, UInt8
from torch import Tensor

__all__ = [
    "PACKERS",
    "pack_iq2_s",
    "pack_iq2_xs",
    "pack_iq2_xxs",
    "pack_iq3_s",
    "pack_iq3_xxs",
    "pack_iq4_xs",
    "pack_mxfp4",
    "pack_q2_k",
    "pack_q3_k",
    "pack_q4_0",
    "pack_q4_k",
    "pack_q5_0",
    "pack_q5_k",
    "pack_q6_k",
    "pack_q8_0",
]

Codes = Int8[Tensor, "d_out d_in"]
Symbols = Int16[Tensor, "d_out tiles symbols"]
Rows = UInt8[Tensor, "d_out bytes"]
Bytes = UInt8[Tensor, "blocks bytes"]


def pack_q4_0(codes: Codes, scales: Mapping[str, Tensor]) -> Rows:
    """Also `iq4_nl`, whose codes stand for other levels; 18 bytes for 32 columns."""
    return _rows(codes, _floats(scales["d"]), _fields(_blocks(codes, 32, 8), 16, 4))


def pack_q5_0(codes: Codes, scales: Mapping[str, Tensor]) -> Rows:
    """22 bytes for 32 columns."""
    q = _blocks(codes, 32, 16)
    return _rows(codes, _floats(scales["d"]), _fields(q >> 4, 1, 1), _fields(q & 15, 16, 4))


def pack_iq4_xs(codes: Codes, scales: Mapping[str, Tensor]) -> Rows:
    """136 bytes for 256 columns."""
    steps = _blocks(scales["sc"], 8, 32)
    return _rows(codes, _floats(scales["d"]), _fields(steps >> 4, 1, 2), _fields(steps & 15, 1, 4), _fields(_blocks(codes, 256, 8), 16, 4))


def pack_q8_0(codes: Codes, scales: Mapping[str, Tensor]) -> Rows:
    """34 bytes for 32 columns."""
    return _rows(codes, _floats(scales["d"]), _blocks(codes, 32, 0))


def pack_mxfp4(codes: Codes, scales: Mapping[str, Tensor]) -> Rows:
    """17 bytes for 32 columns."""
    nibbles = torch.where(codes < 0, 8 - codes, codes)
    return _rows(codes, scales["scale"].reshape(-1, 1), _fields(_blocks(nibbles, 32, 0), 16, 4))


def pack_q2_k(codes: Codes, scales: Mapping[str, Tensor]) -> Rows:
    """84 bytes for 256 columns."""
    steps = (scales["sc"] | scales["m"] << 4).reshape(-1, 16)
    return _rows(codes, steps, _fields(_blocks(codes, 256, 0), 32, 2), _floats(scales["d"]), _floats(scales["dmin"]))


def pack_q3_k(codes: Codes, scales: Mapping[str, Tensor]) -> Rows:
    """110 bytes for 256 columns."""
    q, steps = _blocks(codes, 256, 4), _blocks(scales["sc"], 16, 32)
    scale_bytes = torch.cat([_fields(steps & 15, 8, 4), _fields(steps >> 4, 4, 2)], dim=1)
    return _rows(codes, _fields(q >> 2, 32, 1), _fields(q & 3, 32, 2), scale_bytes, _floats(scales["d"]))


def pack_q4_k(codes: Codes, scales: Mapping[str, Tensor]) -> Rows:
    """144 bytes for 256 columns."""
    return _rows(codes, _scales_and_minima(scales), _fields(_blocks(codes, 256, 0), 32, 4))


def pack_q5_k(codes: Codes, scales: Mapping[str, Tensor]) -> Rows:
    """176 bytes for 256 columns."""
    q = _blocks(codes, 256, 0)
    return _rows(codes, _scales_and_minima(scales), _fields(q >> 4, 32, 1), _fields(q & 15, 32, 4))


def pack_q6_k(codes: Codes, scales: Mapping[str, Tensor]) -> Rows:
    """210 bytes for 256 columns."""
    q = _blocks(codes, 256, 32)
    return _rows(codes, _fields(q & 15, 64, 4), _fields(q >> 4, 32, 2), _blocks(scales["sc"], 16, 0), _floats(scales["d"]))


def pack_iq2_xxs(codes: Symbols, scales: Mapping[str, Tensor]) -> Rows:
    """66 bytes for 256 columns."""
    numbers = codes[:, :, 0].to(torch.uint8).reshape(-1, 8, 4)
    return _rows(codes, _floats(scales["d"]), torch.cat([numbers, _words(codes, scales)], dim=2).flatten(1))


def pack_iq2_xs(codes: Symbols, scales: Mapping[str, Tensor]) -> Rows:
    """74 bytes for 256 columns."""
    both = (codes[:, :, 0] | (codes[:, :, 1] & 127) << 9).reshape(-1, 32)
    return _rows(codes, _floats(scales["d"]), both.view(torch.uint8), _fields(scales["sc"].reshape(-1, 16), 1, 4))


def pack_iq2_s(codes: Symbols, scales: Mapping[str, Tensor]) -> Rows:
    """82 bytes for 256 columns."""
    low, high, signs = (each.to(torch.uint8).reshape(-1, 32) for each in (codes[:, :, 0] & 255, codes[:, :, 0] >> 8, codes[:, :, 1]))
    return _rows(codes, _floats(scales["d"]), low, signs, _fields(high, 1, 2), _fields(scales["sc"].reshape(-1, 16), 1, 4))


def pack_iq3_xxs(codes: Symbols, scales: Mapping[str, Tensor]) -> Rows:
    """98 bytes for 256 columns."""
    numbers = codes[:, :, :2].to(torch.uint8).reshape(-1, 64)
    return _rows(codes, _floats(scales["d"]), numbers, _words(codes, scales).flatten(1))


def pack_iq3_s(codes: Symbols, scales: Mapping[str, Tensor]) -> Rows:
    """110 bytes for 256 columns."""
    low, high, signs = (each.to(torch.uint8).reshape(-1, 64) for each in (codes[:, :, 0] & 255, codes[:, :, 0] >> 8, codes[:, :, 1]))
    steps = _fields(scales["sc"].reshape(-1, 8), 1, 4)
    return _rows(codes, _floats(scales["d"]), low, _fields(high, 1, 1), _fields(signs, 1, 4), steps)


PACKERS: dict[str, Callable[[Tensor, Mapping[str, Tensor]], Tensor]] = {
    "q4_0": pack_q4_0,
    "iq4_nl": pack_q4_0,
    "q5_0": pack_q5_0,
    "iq4_xs": pack_iq4_xs,
    "q8_0": pack_q8_0,
    "mxfp4": pack_mxfp4,
    "q2_k": pack_q2_k,
    "q3_k": pack_q3_k,
    "q4_k": pack_q4_k,
    "q5_k": pack_q5_k,
    "q6_k": pack_q6_k,
    "iq2_xxs": pack_iq2_xxs,
    "iq2_xs": pack_iq2_xs,
    "iq2_s": pack_iq2_s,
    "iq3_xxs": pack_iq3_xxs,
    "iq3_s": pack_iq3_s,
}
"""By the grid's name."""


def _blocks(signed: Int8[Tensor, "d_out columns"], size: int, offset: int) -> Bytes:
    """Signed numbers plus the offset as bytes, a row for each block."""
    return (signed + offset).view(torch.uint8).reshape(-1, size)


def _floats(values: Float16[Tensor, "d_out columns"]) -> Bytes:
    return values.reshape(-1, 1).view(torch.uint8)


def _fields(values: Bytes, run: int, bits: int) -> Bytes:
    """The layout `fields(run, bits)`."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=values.device).unsqueeze(-1)
    merged: Tensor = (values.unflatten(1, (-1, len(shifts), run)) << shifts).sum(2, dtype=torch.uint8)
    return merged.flatten(1)


def _scales_and_minima(scales: Mapping[str, Tensor]) -> Bytes:
    sc, m = scales["sc"].reshape(-1, 8), scales["m"].reshape(-1, 8)
    high = [each[:, :4] | each[:, 4:] >> 4 << 6 for each in (sc, m)]
    return torch.cat([_floats(scales["d"]), _floats(scales["dmin"]), *high, sc[:, 4:] & 15 | (m[:, 4:] & 15) << 4], dim=1)


def _words(codes: Symbols, scales: Mapping[str, Tensor]) -> UInt8[Tensor, "blocks 8 4"]:
    """Four times seven signs and `sc`, in 32 bits."""
    signs = codes[:, :, -1].long().reshape(-1, 8, 4) & 127
    words = (signs << 7 * torch.arange(4, device=codes.device)).sum(2) | scales["sc"].long().reshape(-1, 8) << 28
    return words.unsqueeze(2).view(torch.uint8)[:, :, :4]


def _rows(codes: Codes | Symbols, *fields: Bytes) -> Rows:
    return torch.cat(fields, dim=1).reshape(codes.shape[0], -1)
