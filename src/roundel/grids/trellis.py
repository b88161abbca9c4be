"""Trellis codes: tiles of 256 weights as one walk through a shift register, the nearest of `2^(256 bits)` such tiles.

A tile is a circle of `256 / V` symbols of `k = bits V` bits. After each symbol a register of `state_bits` holds the last so many bits,
and its
state stands for `V` weights (`linalg.codebooks`): a weight is one of `2^state_bits` values although only `bits` of them are new. All
values can be read at once, from the bits alone. The best symbols are found by dynamic programming (`linalg.viterbi`, `kernels.viterbi`).
Random codes of such a structure come near the rate-distortion bound: on Gaussian weights `trellis2` has a mean squared error of
0.07 of the variance, where the best scalar grid of 2 bits has 0.118 and the bound is 0.0625 (Tseng et al. 2024, arXiv 2406.11235).

Cost of rounding a tile: `(256 + 2 REACH) / V` steps of `2^state_bits` states. With one value to a state and 16 state bits, steps visit the
16 x 16 tile in the order of EXL3's format, so `mul1`, `mcg` and `3inst` codes can be written as EXL3 as they are; which order it is
makes no difference to the error. Other tiles use the same order of positions.

Not done: other sizes of tile; tables fitted to a model.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from roundel.errors import SchemeError
from roundel.grids.base import TileGrid
from roundel.kernels import viterbi as kernels
from roundel.linalg import viterbi
from roundel.linalg.codebooks import CODES, code_table

__all__ = ["ORDER", "Trellis", "parse"]

SIZE = 256

DEFAULT_CODE = "mul1"
DEFAULT_STATE_BITS = 16
DRAFT_STATE_BITS = 10

REACH = 128
"""Weights on each side of the seam that decide where the circle is closed: all of them. With half as many a quarter of the time is saved,
and the squared error of 2 bits is 0.65 % larger."""

BATCH = 512
"""Tiles coded at once: on a device whose memory holds it all, about 6 MB each with 16 state bits."""

LIMIT = 32.0
"""Values beyond this many units are coded as if they were there: their squares would swallow the others'."""

_step = torch.arange(SIZE)
_column = 2 * (_step // 8 % 4) + _step % 2 + 8 * (_step // 2 % 2)
ORDER = 16 * (_step // 32 + 8 * (_step // 4 % 2)) + _column
"""Of each step the entry of the tile, `16 row + column`: EXL3's, whose tiles lie the other way, inputs along rows."""


@dataclass(frozen=True, kw_only=True)
class Trellis(TileGrid):
    """`width` bits a weight; `candidates` seams are tried, each for the time of one more pass."""

    width: int
    code: str = DEFAULT_CODE
    state_bits: int = DEFAULT_STATE_BITS
    candidates: int = 1

    def __post_init__(self) -> None:
        if self.code not in CODES:
            raise SchemeError(f"trellis code {self.code!r}: expected one of {', '.join(CODES)}")
        if not 1 <= self.width <= 8:
            raise SchemeError(f"{self.name}: trellises have 1 to 8 bits a weight")
        if self.shift > 8:
            most = 8 // self.values
            raise SchemeError(
                f"{self.name}: a symbol of {self.values} weights would have {self.shift} bits, and 8 is most; try 1 to {most} bits"
            )
        if not self.shift <= self.state_bits <= 16:
            raise SchemeError(f"{self.name}: {self.state_bits} state bits; expected {self.shift}, the bits of a symbol, to 16")
        if not 1 <= self.candidates <= 2 ** (self.state_bits - self.shift):
            raise SchemeError(
                f"{self.name}: {self.candidates} seams; expected 1 to {2 ** (self.state_bits - self.shift)}, as many as there are"
            )

    @property
    def values(self) -> int:
        """Weights of one symbol."""
        return CODES[self.code]

    @property
    def shift(self) -> int:
        """Bits of one symbol."""
        return self.width * self.values

    @property
    def table(self) -> Float[Tensor, "states values"]:
        """What each state stands for."""
        return code_table(self.code, self.state_bits)

    @property
    def name(self) -> str:
        code = "" if self.code == DEFAULT_CODE else f"-{self.code}"
        states = "" if self.state_bits == DEFAULT_STATE_BITS else f"-s{self.state_bits}"
        return f"trellis{self.width}{code}{states}" + ("" if self.candidates == 1 else f"-c{self.candidates}")

    @property
    def bits(self) -> float:
        return float(self.width)

    @property
    def rms(self) -> float:
        return self.table.square().mean().sqrt().item()

    def tile(self, d_out: int, d_in: int) -> tuple[int, int]:
        """Of all shapes of 256 entries that with the least padding, and of those the nearest to 16 x 16, rather wide than high."""

        def order(rows: int) -> tuple[int, int, int]:
            columns = SIZE // rows
            return -(-d_out // rows) * -(-d_in // columns), abs(rows.bit_length() - 5), rows

        rows = min((2**power for power in range(9)), key=order)
        return rows, SIZE // rows

    def tile_bits(self) -> int:
        return SIZE * self.width

    def encode_tiles(
        self, values: Float[Tensor, "tiles size"], weights: Float[Tensor, "tiles size"] | None = None
    ) -> Integer[Tensor, "tiles symbols"]:
        targets = self._walk(values.float().clamp(-LIMIT, LIMIT))
        if weights is not None:
            weights = self._walk((weights / weights.amax(1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)).float())
        coder = kernels.circular_path if values.device.type == "cpu" else viterbi.circular_path
        if values.is_cuda and find_spec("triton"):
            from roundel.kernels.triton_viterbi import circular_path as coder
        table = self.table.to(values.device)
        found = []
        for start in range(0, len(targets), BATCH):
            part = slice(start, start + BATCH)
            states, _ = coder(
                targets[part],
                table,
                self.shift,
                None if weights is None else weights[part],
                candidates=self.candidates,
                reach=REACH // self.values,
            )
            found.append((states & (1 << self.shift) - 1).to(torch.uint8))
        return torch.cat(found)

    def decode_tiles(self, codes: Integer[Tensor, "tiles symbols"]) -> Float[Tensor, "tiles size"]:
        states = viterbi.states_of(codes, self.shift, self.state_bits)
        decoded = self.table.to(codes.device)[states].flatten(1)
        return torch.empty_like(decoded).index_copy_(1, ORDER.to(codes.device), decoded)

    def draft(self) -> Trellis:
        return replace(self, state_bits=min(self.state_bits, DRAFT_STATE_BITS), candidates=1)

    def _walk(self, tiles: Tensor) -> Tensor:
        """The entries of tiles in the order of the register, `(tiles, steps, values)`."""
        walked: Tensor = tiles[:, ORDER.to(tiles.device)].unflatten(1, (-1, self.values))
        return walked


def parse(name: str) -> Trellis | None:
    """The grid of a name like `trellis2`, `trellis3-hyb` or `trellis2-mcg-s12-c4` (12 state bits, 4 seams tried), else None."""
    found = re.fullmatch(rf"trellis(\d+)(?:-({'|'.join(CODES)}))?(?:-s(\d+))?(?:-c(\d+))?", name)
    if not found:
        return None
    code, state_bits, candidates = found[2] or DEFAULT_CODE, int(found[3] or DEFAULT_STATE_BITS), int(found[4] or 1)
    return Trellis(width=int(found[1]), code=code, state_bits=state_bits, candidates=candidates)
