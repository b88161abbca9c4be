"""The block types of llama.cpp whose magnitudes come from a codebook: superblocks of 256 columns in one row.

    value = d (2 sc + 1) unit sign magnitude

Magnitudes of 8 (iq2) or 4 (iq3) neighbours are an entry of the codebook, signs are free or, of 8 neighbours, even in number (7 bits).
`sc`, 0 to 15, is one for 16 or 32 columns, `d` a float16 for all 256.

    type      entries of   sc for   signs   unit   bits per weight
    iq2_xxs    256    8     32      even     1/8   2.0625
    iq2_xs     512    8     16      even     1/8   2.3125
    iq2_s     1024    8     16      free     1/8   2.5625
    iq3_xxs    256    4     32      even     1/4   3.0625
    iq3_s      512    4     32      free      1    3.4375

A tile is what shares signs: 8 columns (of `iq3_xxs` two entries), 4 of `iq3_s`. Its symbols, int16: the entries' numbers, then the signs,
bit `i` for column `i` (1: negative). The codebooks are those of the `gguf` package. None has a zero.

The nearest codeword is found exactly. With weights `w` and the signs of `x`, or all but the cheapest where their number has to be even:

    sum w (x - sign p)^2 = sum w x^2 + sum w p^2 - 2 sum w |x| p + 4 [odd] min_i w_i |x_i| p_i

where two entries share the signs, one of them has the flip. Cost: for a tile 16 (iq2) or 8 flops per entry in a matrix product, and 16 more
elsewhere for the half of the tiles that are odd.

Fit: a real scale of each group by search (`search_scale`), then the `d` around the largest that loses least as a quadratic says, with `sc`
chosen among neighbours by what they round the weights to, and `d` and `sc` once more, from the closed form. It takes 16 passes of the
coder, each 0.3 to 0.7 us for a weight on one core: more candidates gained about a part in a thousand of the error.

Not done: the types with 1 bit; llama.cpp's habit of enlarging `d` by a few percent afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from gguf import quants
from jaxtyping import Bool, Float, Int, Int16
from torch import Tensor

from roundel.grids.base import Scales, TileGrid, refuse_width, spread
from roundel.grids.lattice import CHUNK, cheapest_flip
from roundel.grids.search import by_rows, column_weights, group_size, nonzero, search_scale

__all__ = ["COLUMNS", "KINDS", "CodebookBlock", "parse"]

COLUMNS = 256
"""Of a superblock."""


class Kind(NamedTuple):
    """One block type."""

    tables: type[quants.IQ2_XXS | quants.IQ2_XS | quants.IQ2_S | quants.IQ3_XXS | quants.IQ3_S]
    bytes: int
    """Of a superblock."""
    entries: int
    """Entries of the codebook in a tile."""
    group: int
    """Columns that share `sc`."""
    even: bool
    """Whether a tile has an even number of negative signs."""
    unit: float

    @property
    def size(self) -> int:
        """Columns of a tile."""
        return self.entries * int(self.tables.grid_shape[1])


KINDS = {
    "iq2_xxs": Kind(quants.IQ2_XXS, 66, 1, 32, True, 1 / 8),
    "iq2_xs": Kind(quants.IQ2_XS, 74, 1, 16, True, 1 / 8),
    "iq2_s": Kind(quants.IQ2_S, 82, 1, 16, False, 1 / 8),
    "iq3_xxs": Kind(quants.IQ3_XXS, 98, 2, 32, True, 1 / 4),
    "iq3_s": Kind(quants.IQ3_S, 110, 1, 32, False, 1.0),
}

MOST = 15
"""The largest `sc`."""

_FRACTIONS = torch.linspace(0.5, 1.05, 7).tolist()
"""Scales of a group that are tried, in units of that which clips nothing."""

_LEAST_SIZE = 2.0**-40
"""Superblocks whose largest weight is below this are fitted at this size: no float16 `d` can hold them anyway."""


@dataclass(frozen=True, kw_only=True)
class CodebookBlock(TileGrid):
    """One of `KINDS`: scales `d` (float16) and `sc` (uint8)."""

    kind: str

    rotates = False
    free = "d"

    @property
    def layout(self) -> Kind:
        """Sizes and tables."""
        return KINDS[self.kind]

    @property
    def name(self) -> str:
        return self.kind

    @property
    def bits(self) -> float:
        return self.tile_bits() / self.layout.size

    @property
    def rms(self) -> float:
        return float(_book(self.kind, torch.float64, torch.device("cpu")).square().mean().sqrt())

    def check(self, d_out: int, d_in: int) -> None:
        if d_in % COLUMNS:
            raise refuse_width(self.name, COLUMNS, d_in, "iq4_nl or q4_0" if d_in % 32 == 0 else "int3-channel")

    def tile(self, d_out: int, d_in: int) -> tuple[int, int]:
        return 1, self.layout.size

    def tile_bits(self) -> int:
        kind = self.layout
        return kind.entries * (len(_book(self.kind, torch.float32, torch.device("cpu"))) - 1).bit_length() + kind.size - kind.even

    def stored_bits(self, shape: tuple[int, int], dtype: torch.dtype) -> int:
        self.check(*shape)
        return shape[0] * (shape[1] // COLUMNS) * self.layout.bytes * 8

    def decode_tiles(self, codes: Int16[Tensor, "tiles symbols"]) -> Float[Tensor, "tiles size"]:
        magnitudes = _book(self.kind, torch.float32, codes.device)[codes[:, :-1].long()].flatten(1)
        negative = codes[:, -1:] >> torch.arange(self.layout.size, dtype=torch.int16, device=codes.device) & 1
        return torch.where(negative == 1, -magnitudes, magnitudes)

    def encode_tiles(
        self, values: Float[Tensor, "tiles size"], weights: Float[Tensor, "tiles size"] | None = None
    ) -> Int16[Tensor, "tiles symbols"]:
        """The nearest codewords; exact up to rounding errors in the type of the values."""
        if weights is None:
            weights = torch.ones_like(values)
        size = CHUNK.get(values.device.type, CHUNK["cuda"])
        parts = zip(values.detach().split(size), weights.to(values.dtype).split(size), strict=True)
        return torch.cat([self._nearest(x, w) for x, w in parts])

    def _nearest(self, x: Float[Tensor, "tiles size"], w: Float[Tensor, "tiles size"]) -> Int16[Tensor, "tiles symbols"]:
        entries = self.layout.entries
        book, moments_of = _book(self.kind, x.dtype, x.device), _moments_of(self.kind, x.dtype, x.device)
        negative, linear = x < 0, w * x.abs()
        moments = torch.cat([each.unflatten(1, (entries, -1)) for each in (w, linear)], dim=2)  # (tiles, entries, 2 columns)
        costs = moments @ moments_of
        cost, at = costs.min(2)
        if self.layout.even:
            odd = torch.nonzero(negative.sum(1) % 2).flatten()
            along = linear[odd].unflatten(1, (entries, -1))
            flips = cheapest_flip(along.flatten(0, 1), book).unflatten(0, (-1, entries))
            mended, mended_at = costs[odd].add_(flips, alpha=4).min(2)
            one = (mended - cost[odd]).argmin(1, keepdim=True)
            number = mended_at.gather(1, one)
            place = (along.gather(1, one[:, :, None].expand(-1, 1, along.shape[2]))[:, 0] * book[number[:, 0]]).argmin(1)
            at[odd, one[:, 0]] = number[:, 0]
            negative[odd, one[:, 0] * along.shape[2] + place] ^= True
        return torch.cat([at.to(torch.int16), _bits(negative)], dim=1)

    def fit_scales(self, W: Float[Tensor, "d_out d_in"], weights: Float[Tensor, " d_in"], dtype: torch.dtype) -> dict[str, Tensor]:
        self.check(*W.shape)
        kind, groups = self.layout, (-1, COLUMNS // self.layout.group, self.layout.group)
        w = column_weights(weights, W).unflatten(0, groups)
        top = _book(self.kind, torch.float32, W.device).max().item()

        def nearest(units: Tensor) -> Tensor:
            codes = self.encode_tiles(units.reshape(-1, kind.size), w.expand_as(units).reshape(-1, kind.size))
            return self.decode_tiles(codes).to(units.dtype).view(units.shape)

        def fit(rows: Tensor) -> dict[str, Tensor]:
            x = rows.unflatten(1, groups)
            size = group_size(x.flatten(2), _LEAST_SIZE)
            x = x / size[..., None, None]
            real = search_scale(x, w, nearest, ends=(-top, top), fractions=_FRACTIONS, signs=(1.0,), polish=1)
            norm = (w * nearest(x / nonzero(real).unsqueeze(-1)).square()).sum(-1)

            def half(d: Tensor) -> Tensor:
                return _half(d * size).to(d.dtype) / size

            base = real.amax(-1) / self._steps(torch.tensor(MOST), real.dtype)
            candidates = torch.stack([half(fraction * base) for fraction in torch.linspace(0.85, 1.2, 22).tolist()])
            steps = candidates.unsqueeze(-1) * self._steps(self._integers(real / candidates.unsqueeze(-1)), real.dtype)
            costs = (norm * (steps - real).square()).sum(-1)
            error, d, sc = torch.full_like(size, torch.inf), candidates[0], self._integers(real)

            def judge(tried: Tensor, centre: Tensor) -> None:
                """The exact error, with the best of three `sc` around `centre` in each group."""
                nonlocal error, d, sc
                least, chosen = torch.full_like(real, torch.inf), centre
                for offset in (0, -1, 1):
                    near = (centre + offset).clamp(0, MOST)
                    step = (tried.unsqueeze(-1) * self._steps(near, real.dtype)).unsqueeze(-1)
                    own = (w * (x - step * nearest(x / step)).square()).sum(-1)
                    chosen = torch.where(own < least, near, chosen)
                    least = torch.minimum(own, least)
                better = least.sum(-1) < error
                error, d = torch.where(better, least.sum(-1), error), torch.where(better, tried, d)
                sc = torch.where(better.unsqueeze(-1), chosen, sc)

            likely = candidates.gather(0, costs.argmin(0, keepdim=True))[0]
            judge(likely, self._integers(real / likely.unsqueeze(-1)))
            step = self._steps(sc, real.dtype).unsqueeze(-1)
            q = step * nearest(x / (d[..., None, None] * step))
            judge(half((w * x * q).sum((-1, -2)) / (w * q.square()).sum((-1, -2))), sc)
            return {"d": _half(d * size), "sc": sc.flatten(1).to(torch.uint8)}

        return by_rows(W, fit)

    def steps(self, scales: Scales, shape: tuple[int, int], dtype: torch.dtype) -> Float[Tensor, "down across"]:
        d, steps = scales["d"].to(dtype), self._steps(scales["sc"], dtype)
        return spread(spread(d, (shape[0], steps.shape[1])) * steps, (shape[0], shape[1] // self.layout.size))

    def dequantize(self, codes: Tensor, scales: Scales, shape: tuple[int, int], dtype: torch.dtype) -> Float[Tensor, "d_out d_in"]:
        return self.parts(codes, scales, shape, dtype)["d"] * spread(scales["d"].to(dtype), shape)

    def parts(self, codes: Tensor, scales: Scales, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Float[Tensor, "d_out d_in"]]:
        values = self.from_tiles(self.decode_tiles(codes.flatten(0, 1)).to(dtype), shape)
        return {"d": spread(self._steps(scales["sc"], dtype), shape) * values}

    def stored(self, name: str, values: Float[Tensor, "rows columns"], like: Tensor) -> Tensor:
        return torch.where(values > 0, _half(values), like)

    def _steps(self, sc: Tensor, dtype: torch.dtype) -> Tensor:
        """What `sc` stand for, in units of `d`."""
        return (2 * sc.to(dtype) + 1) * self.layout.unit

    def _integers(self, steps: Tensor) -> Int[Tensor, "*groups"]:
        """The nearest `sc` of steps in units of `d`."""
        return ((steps / self.layout.unit - 1) / 2).round().clamp(0, MOST).to(torch.int32)


def parse(name: str) -> CodebookBlock | None:
    """The grid of a block type's name, such as `iq3_xxs`, else None."""
    return CodebookBlock(kind=name) if name in KINDS else None


@cache
def _book(kind: str, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "numbers columns"]:
    """All entries of a codebook."""
    with torch.inference_mode(False):
        tables = KINDS[kind].tables
        tables.init_grid()  # type: ignore[no-untyped-call]
        assert tables.grid is not None
        return torch.from_numpy(tables.grid.reshape(tables.grid_shape)).to(device, dtype)


@cache
def _moments_of(kind: str, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "twice_columns numbers"]:
    """`[p^2, -2 p]`, transposed: times `[w, w |x|]` it is the cost of each entry, up to a constant."""
    p = _book(kind, dtype, device)
    with torch.inference_mode(False):
        return torch.cat([p * p, -2 * p], dim=1).T.contiguous()


def _bits(negative: Bool[Tensor, "tiles size"]) -> Int16[Tensor, "tiles 1"]:
    places = torch.arange(negative.shape[1], dtype=torch.int16, device=negative.device)
    return (negative.to(torch.int16) << places).sum(1, keepdim=True, dtype=torch.int16)


def _half(values: Tensor) -> Tensor:
    """float16, positive and finite."""
    return values.clamp(2.0**-24, 65504).to(torch.float16)
