"""Bytes of llama.cpp's block types: codes and scales of `roundel.grids.blocks`, `.codebooks` and `mxfp4` as rows of a GGUF file, and back.

Every `pack_` takes int8 codes `(d_out, d_in)`, or of codebooks int16 `(d_out, tiles, symbols)`, and the grid's scales, and returns uint8
`(d_out, bytes of a row)`, little-endian; `unpack` takes those.
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
    "unpack",
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


def unpack(kind: str, rows: Rows) -> tuple[Codes | Symbols, dict[str, Tensor]]:
    """Codes and scales of the rows of a block type, by its grid's name: the inverse of `PACKERS[kind]`."""
    return _UNPACKERS[kind](rows)


class _Bytes:
    """Blocks of a type, read field after field."""

    def __init__(self, rows: Rows, size: int) -> None:
        self.rows = len(rows)
        self._blocks, self._at = rows.contiguous().reshape(-1, size), 0

    def bytes(self, count: int) -> Bytes:
        """The next ones of each block."""
        self._at += count
        return self._blocks[:, self._at - count : self._at]

    def half(self) -> Float16[Tensor, "d_out columns"]:
        """A float16 number of each block."""
        values: Tensor = self.bytes(2).contiguous().view(torch.float16).reshape(self.rows, -1)
        return values

    def fields(self, count: int, run: int, bits: int) -> Bytes:
        """`count` elements of each block in the layout `fields(run, bits)`."""
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=self._blocks.device).unsqueeze(-1)
        values: Tensor = self.bytes(count * bits // 8).unflatten(1, (-1, 1, run)) >> shifts & (1 << bits) - 1
        return values.flatten(1)

    def of_rows(self, values: Bytes, offset: int = 0) -> Tensor:
        """Numbers of blocks as rows of the weight: unsigned, or int8 less an offset."""
        whole = values.reshape(self.rows, -1)
        return whole if not offset else (whole.to(torch.int16) - offset).to(torch.int8)


def _unpack_block(kind: str, size: int, offset: int) -> Callable[[Rows], tuple[Codes, dict[str, Tensor]]]:
    def unpacked(rows: Rows) -> tuple[Codes, dict[str, Tensor]]:
        own = _Bytes(rows, size)
        scales = {"d": own.half()}
        if kind == "q8_0":
            return own.of_rows(own.bytes(32)).view(torch.int8), scales
        high = own.fields(32, 1, 1) << 4 if kind == "q5_0" else 0
        return own.of_rows(own.fields(32, 16, 4) | high, offset), scales

    return unpacked


def _unpack_mxfp4(rows: Rows) -> tuple[Codes, dict[str, Tensor]]:
    own = _Bytes(rows, 17)
    scale, nibbles = own.of_rows(own.bytes(1)), own.of_rows(own.fields(32, 16, 4)).to(torch.int8)
    return torch.where(nibbles > 7, 8 - nibbles, nibbles), {"scale": scale}


def _unpack_iq4_xs(rows: Rows) -> tuple[Codes, dict[str, Tensor]]:
    own = _Bytes(rows, 136)
    d, high = own.half(), own.fields(8, 1, 2)
    scales = {"d": d, "sc": own.of_rows(own.fields(8, 1, 4) | high << 4, 32)}
    return own.of_rows(own.fields(256, 16, 4), 8).to(torch.int8), scales


def _unpack_q2_k(rows: Rows) -> tuple[Codes, dict[str, Tensor]]:
    own = _Bytes(rows, 84)
    steps = own.of_rows(own.bytes(16))
    q = own.fields(256, 32, 2)
    scales = {"d": own.half(), "dmin": own.half(), "sc": steps & 15, "m": steps >> 4}
    return own.of_rows(q).to(torch.int8), scales


def _unpack_q3_k(rows: Rows) -> tuple[Codes, dict[str, Tensor]]:
    own = _Bytes(rows, 110)
    high, low = own.fields(256, 32, 1), own.fields(256, 32, 2)
    steps = own.fields(16, 8, 4)
    steps |= own.fields(16, 4, 2) << 4
    scales = {"sc": own.of_rows(steps, 32), "d": own.half()}
    return own.of_rows(low | high << 2, 4).to(torch.int8), scales


def _unpack_q45_k(bits: int) -> Callable[[Rows], tuple[Codes, dict[str, Tensor]]]:
    def unpacked(rows: Rows) -> tuple[Codes, dict[str, Tensor]]:
        own = _Bytes(rows, 144 if bits == 4 else 176)
        scales = {"d": own.half(), "dmin": own.half()}
        first_sc, first_m, both = own.bytes(4), own.bytes(4), own.bytes(4)
        for name, first, rest in (("sc", first_sc, both & 15), ("m", first_m, both >> 4)):
            scales[name] = own.of_rows(torch.cat([first & 63, rest | first >> 6 << 4], dim=1))
        high = own.fields(256, 32, 1) << 4 if bits == 5 else 0
        return own.of_rows(own.fields(256, 32, 4) | high).to(torch.int8), scales

    return unpacked


def _unpack_q6_k(rows: Rows) -> tuple[Codes, dict[str, Tensor]]:
    own = _Bytes(rows, 210)
    low, high = own.fields(256, 64, 4), own.fields(256, 32, 2)
    steps = own.of_rows(own.bytes(16)).view(torch.int8)
    scales = {"sc": steps, "d": own.half()}
    return own.of_rows(low | high << 4, 32).to(torch.int8), scales


def _symbols(own: _Bytes, *symbols: Tensor) -> Symbols:
    return torch.stack([each.to(torch.int16).reshape(own.rows, -1) for each in symbols], dim=2)


def _even(signs: Tensor) -> Tensor:
    """Seven signs with the eighth, which makes their number even."""
    odd = sum((signs >> place & 1 for place in range(7)), torch.zeros_like(signs)) & 1
    return signs | odd << 7


def _of_words(own: _Bytes, words: Tensor) -> tuple[Tensor, Tensor]:
    """Signs and `sc`, `(blocks, 8, 4)` and `(d_out, groups)`, of words `(blocks, 8, 4)` of four bytes."""
    word = (words.long() << 8 * torch.arange(4, device=words.device)).sum(2)
    signs = _even(word[:, :, None] >> 7 * torch.arange(4, device=words.device) & 127)
    return signs, own.of_rows((word >> 28).to(torch.uint8))


def _unpack_iq2_xxs(rows: Rows) -> tuple[Symbols, dict[str, Tensor]]:
    own = _Bytes(rows, 66)
    d, parts = own.half(), own.bytes(64).unflatten(1, (8, 8))
    signs, sc = _of_words(own, parts[:, :, 4:])
    return _symbols(own, parts[:, :, :4], signs), {"d": d, "sc": sc}


def _unpack_iq2_xs(rows: Rows) -> tuple[Symbols, dict[str, Tensor]]:
    own = _Bytes(rows, 74)
    d, both = own.half(), own.bytes(64).contiguous().view(torch.int16).int() & 0xFFFF
    return _symbols(own, both & 511, _even(both >> 9)), {"d": d, "sc": own.of_rows(own.fields(16, 1, 4))}


def _unpack_iq2_s(rows: Rows) -> tuple[Symbols, dict[str, Tensor]]:
    own = _Bytes(rows, 82)
    d, low, signs = own.half(), own.bytes(32), own.bytes(32)
    numbers = low.to(torch.int16) | own.fields(32, 1, 2).to(torch.int16) << 8
    return _symbols(own, numbers, signs), {"d": d, "sc": own.of_rows(own.fields(16, 1, 4))}


def _unpack_iq3_xxs(rows: Rows) -> tuple[Symbols, dict[str, Tensor]]:
    own = _Bytes(rows, 98)
    d, numbers = own.half(), own.bytes(64).unflatten(1, (-1, 2))
    signs, sc = _of_words(own, own.bytes(32).unflatten(1, (8, 4)))
    return _symbols(own, numbers[:, :, 0], numbers[:, :, 1], signs), {"d": d, "sc": sc}


def _unpack_iq3_s(rows: Rows) -> tuple[Symbols, dict[str, Tensor]]:
    own = _Bytes(rows, 110)
    d, low = own.half(), own.bytes(64)
    numbers = low.to(torch.int16) | own.fields(64, 1, 1).to(torch.int16) << 8
    signs = own.fields(64, 1, 4)
    return _symbols(own, numbers, signs), {"d": d, "sc": own.of_rows(own.fields(8, 1, 4))}


_UNPACKERS: dict[str, Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]] = {
    **{
        kind: _unpack_block(kind, *layout)
        for kind, layout in {"q4_0": (18, 8), "iq4_nl": (18, 8), "q5_0": (22, 16), "q8_0": (34, 0)}.items()
    },
    "mxfp4": _unpack_mxfp4,
    "iq4_xs": _unpack_iq4_xs,
    "q2_k": _unpack_q2_k,
    "q3_k": _unpack_q3_k,
    "q4_k": _unpack_q45_k(4),
    "q5_k": _unpack_q45_k(5),
    "q6_k": _unpack_q6_k,
    "iq2_xxs": _unpack_iq2_xxs,
    "iq2_xs": _unpack_iq2_xs,
    "iq2_s": _unpack_iq2_s,
    "iq3_xxs": _unpack_iq3_xxs,
    "iq3_s": _unpack_iq3_s,
}


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
