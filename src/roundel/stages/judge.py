"""How many groups of layers are taken with new codes: up to where the KL of the whole model is least, on text that nothing else has seen.

Everything up to a group has its new codes, everything after it is as it was given, and text goes through both. Not group by group on its
own: tools that tune one layer on what those before it give (AutoRound) make layers that make up for each other, and the first new one among
them loses more than it gains, until those after it are new as well.

Cost: of `JUDGED` sequences a forward pass through what follows, for each group: half of the square of the depth, some 16 passes of 16
sequences for 32 layers. Memory: two groups, and hidden states as the store decides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from roundel.artifacts.source import Source
from roundel.evaluate import Comparison
from roundel.rounding.round import dequantized
from roundel.sweeps import HiddenStates, HiddenStore
from roundel.sweeps.gradients import batches
from roundel.types import RoundedWeight, TokenBatch

__all__ = ["JUDGED", "Judge", "values_of_group"]

JUDGED = 16
"""Sequences."""


def values_of_group(source: Source, index: int, own: Mapping[str, RoundedWeight]) -> dict[str, Tensor]:
    """Parameters of a group; of linears that could not be rounded, what they were quantized to, and so everything else."""
    names = source.layers.inside(index, source.linears)
    rounded = {f"{name}.weight": dequantized(own[name] if name in own else source.given[name]) for name in names}
    return source.fixed_in(index) | rounded


class Judge:
    """Of one model that is made better group by group."""

    def __init__(
        self, source: Source, outside: Callable[[], Mapping[str, Tensor]], tokens: TokenBatch, *, batch_size: int, store: HiddenStore
    ) -> None:
        """Takes text through the original.

        Args:
            source: The original, with what it was quantized to.
            outside: Makes other parameters as they are in the quantized model, by name.
            tokens: The text.
            batch_size: Sequences in a pass.
            store: For hidden states.
        """
        self._source, self._layers, self._outside, self._tokens = source, source.layers, outside, tokens
        self._batch_size, self._store, self._made = batch_size, store, 0
        self._at = 0
        self._reference = self._embedded({})
        with torch.no_grad():
            for index in range(len(self._layers)):
                with self._layers.loaded(index):
                    self._reference = self._run(index, self._reference, {})
        self._hidden = self._embedded(outside())
        self.start = self._through_all()
        """The KL with nothing new."""

    def ends(self, found: Callable[[], Mapping[str, Tensor]]) -> tuple[float, float]:
        """The KL before and after other values for what is outside of the layers; they stay if it falls. Before any group is judged."""
        old, before = (self._outside, self._hidden), self.start
        self._outside, self._hidden = found, self._embedded(found())
        after = self._through_all()
        if after < before:
            self._store.drop(old[1])
        else:
            self._store.drop(self._hidden)
            self._outside, self._hidden = old
        self.start = min(before, after)
        return before, after

    @torch.no_grad()
    def _through_all(self) -> float:
        with self._layers.loaded(0):
            return self._through(0, self._source.given)

    @torch.no_grad()
    def __call__(self, index: int, decided: Mapping[str, RoundedWeight], found: Mapping[str, RoundedWeight]) -> float:
        """The KL with what a group, which is loaded, becomes; `decided`: all linears of the groups before it."""
        while self._at < index:
            with self._layers.loaded(self._at):
                self._hidden = self._run(self._at, self._hidden, self._weights(self._at, decided))
            self._at += 1
        return self._through(index, found)

    def _through(self, index: int, own: Mapping[str, RoundedWeight]) -> float:
        """The KL with these weights in a group that is loaded."""
        state = self._run(index, self._hidden, self._weights(index, own), keep=True)
        for later in range(index + 1, len(self._layers)):
            with self._layers.loaded(later):
                state = self._run(later, state, self._weights(later, self._source.given))
        found, outer, slices = Comparison(), self._outside(), self._layers.slices(self._tokens.ids.shape[1])
        for row in range(len(self._tokens)):
            h, hq = (states.read([row]).to(self._layers.device) for states in (self._reference, state))
            found.add_states(self._layers, self._tokens.ids[row], hq, h, outer, slices)
        self._store.drop(state)
        return found.result().kl_mean

    def _weights(self, index: int, own: Mapping[str, RoundedWeight]) -> dict[str, Tensor]:
        return values_of_group(self._source, index, own)

    def _embedded(self, values: Mapping[str, Tensor]) -> HiddenStates:
        state = None
        with self._layers.replaced(values):
            for rows in batches(range(len(self._tokens)), self._batch_size):
                hidden = self._layers.embed(self._ids(rows))
                state = state or self._new((len(self._tokens), *hidden.shape[1:]), hidden.dtype)
                state.write(rows, hidden)
        assert state is not None
        return state

    def _run(self, index: int, before: HiddenStates, values: Mapping[str, Tensor], *, keep: bool = False) -> HiddenStates:
        """The states after a group with other weights; those before it are dropped unless they are to be kept."""
        after = self._new(before.shape, before.dtype)
        with self._layers.replaced(values):
            for rows in batches(range(len(self._tokens)), self._batch_size):
                after.write(rows, self._layers.run(index, self._ids(rows), before.read(rows).to(self._layers.device)))
        if not keep:
            self._store.drop(before)
        return after

    def _new(self, shape: tuple[int, ...], dtype: torch.dtype) -> HiddenStates:
        self._made += 1
        return self._store.new(f"judged-{self._made:06d}", shape, dtype)

    def _ids(self, rows: Any) -> Tensor:
        return self._tokens.ids[list(rows)].to(self._layers.device)
