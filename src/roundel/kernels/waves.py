"""Which tiles of a weight a sweep changes together: of different rows and columns, and only as many as do not spoil each other's gain.

Changes of two tiles meet in `tr(change_k^T H_out,kl change_l H_in,lk)`, which is small unless all channels share a direction: then hundreds
of tiles that each make up for the same error overshoot, and the loss rises. What came of a wave says how many to take next, as a trust
region does. Most of SmolLM2's linears are swept with all tiles of a diagonal at once, some with a few; the loss is that of one tile after
the other (`docs/log.md`, 22).
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["Waves"]

LEAST, MOST = 0.5, 0.9
"""Parts of the gain that was hoped for below which a wave comes again in halves, and from which on the next has twice as many tiles."""


class Waves:
    """The tiles of `down x across` in diagonals that go around, each in as many waves as needed.

    waves = Waves(down, across)
    while wave := waves.next():
        ...  # change the tiles
        if not waves.took(gain, hoped):
            ...  # undo it: the wave comes again, in parts
    """

    def __init__(self, down: int, across: int) -> None:
        short, long = min(down, across), max(down, across)
        pairs = [(first, (first + turn) % long) for turn in range(long) for first in range(short)]
        self.order: list[tuple[int, int]] = pairs if down <= across else [(second, first) for first, second in pairs]
        """All tiles, `(row, column)`, a diagonal after the other."""
        self.diagonal = self.together = short
        self.start = self.end = 0

    def next(self) -> Sequence[tuple[int, int]]:
        """The next wave, `order[start:end]`; empty at the end."""
        rest = self.diagonal - self.start % self.diagonal
        self.end = min(self.start + min(self.together, rest), len(self.order))
        return self.order[self.start : self.end]

    def took(self, gain: float, hoped: float) -> bool:
        """Hears by how much a wave lowered the loss, and by how much each of its tiles alone would have, summed; whether it is taken."""
        size = self.end - self.start
        taken = size == 1 or gain >= LEAST * hoped
        if taken:
            self.start = self.end
        else:
            self.together = size // 2
        if taken and gain >= MOST * hoped:
            self.together = min(self.diagonal, max(self.together, 2 * size))
        return taken
