"""The text that end-to-end steps see, and the original's log-probabilities of it.

Problem: more numbers move than the calibration text has tokens, and steps that see a sequence again and again fit it instead of the
language: after 14 times the KL on their text is half of that on other text. The original can write new text, but one token at a time. Here
each step sees another version of its sequences, in which a share of the tokens is drawn anew from what the original expects at their place
after the true text; one forward pass over what comes out gives the reference at all positions, as before. Such text is a little worse than
true text: where there is half a token for each number that moves it only harms, so the share falls to zero there (`drawn_share`).

Cost: one forward pass of the original over what comes out, `2 P` flops a token beside `6 P` of the step (`P` weights); what is drawn in all
turns is asked for in one more over the text, and kept in 4 bytes for each token and turn. Where nothing is drawn and the original's
log-probabilities fit into `CACHE` bytes, they are computed once. Logits of either model exist for a piece of the tokens at a time
(`Layers.pieces`), in the backward pass too. Measured: `docs/log.md`, 14.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from roundel.linalg.fast import fast
from roundel.sweeps import Layers
from roundel.types import TokenBatch

__all__ = ["Divergence", "Reference", "Teacher", "descend", "drawn_share"]

CACHE = 1 << 30
"""Bytes of the original's log-probabilities that are kept, in float16."""

SHARE = 0.3
"""Of the tokens that are drawn anew, where there are few of them."""

ENOUGH = 0.5
"""Tokens for each number that moves from which on none are."""


def drawn_share(tokens: int, parameters: int) -> float:
    """What share of the tokens to draw anew when so many parameters move."""
    return SHARE * max(0.0, 1 - tokens / (ENOUGH * max(1, parameters)))


class Reference:
    """The original's log-probabilities of some sequences, of which only a piece exists in float32 at a time."""

    def __init__(self, layers: Layers, ids: Int[Tensor, "rows tokens"], kept: Sequence[Tensor] = ()) -> None:
        """Of `ids`; `kept`: they are there for each sequence, else hidden states are computed."""
        self.layers, self.ids, self.kept = layers, ids, kept
        self.hidden = None if kept else fast(layers.through, results=True)(ids)

    @torch.no_grad()
    def piece(self, rows: slice, part: slice) -> Float[Tensor, "rows tokens vocabulary"]:
        """Of these sequences at these positions."""
        if self.hidden is None:
            return torch.stack([own[part] for own in self.kept[rows]]).float()
        logits: Tensor = fast(self.layers.logits)(self.ids[rows, part], self.hidden[rows, part])
        return logits.float().log_softmax(-1)


class Teacher:
    """The original, beside calibration text."""

    def __init__(self, layers: Layers, tokens: TokenBatch, *, share: float, turns: int, seed: int) -> None:
        """Of `tokens`, seen `turns` times, a `share` is drawn anew each time; what is drawn depends on `seed` and the text alone."""
        self.layers, self.tokens, self.share, self.turns, self.seed = layers, tokens, share, turns, seed
        self.keeps = share == 0 and 2 * tokens.ids.numel() * layers.vocabulary <= CACHE
        self.kept: dict[int, Tensor] = {}
        """By sequence: log-probabilities of the true text, or what is drawn in place of its tokens, in turn."""

    def uniforms(self, rows: int, step: int) -> Tensor:
        """`(rows, tokens - 1)` numbers for the sequences of a step: those below `share` say which tokens are drawn anew."""
        return torch.rand(rows, self.tokens.ids.shape[1] - 1, generator=_random(self.seed, step))

    @torch.no_grad()
    def batch(self, rows: list[int], turns: list[int], uniforms: Tensor) -> Reference:
        """These rows, each for the how manieth time."""
        ids = self.tokens.ids[rows].to(self.layers.device)
        if self.share > 0:
            drawn = torch.stack([self._drawn(row)[turn] for row, turn in zip(rows, turns, strict=True)]).to(ids)
            ids[:, 1:] = torch.where(uniforms.to(ids.device) < self.share, drawn, ids[:, 1:])
        elif self.keeps:
            for row, own in zip(rows, ids, strict=True):  # one by one: the numbers must not depend on what it was first seen with
                if row not in self.kept:
                    self.kept[row] = torch.cat([piece[0].half() for _, piece in self._pieces(own[None])])
            return Reference(self.layers, ids, [self.kept[row] for row in rows])
        return Reference(self.layers, ids)

    def _pieces(self, ids: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Of one sequence: positions, and log-probabilities there."""
        reference = Reference(self.layers, ids)
        for rows, part in self.layers.pieces(*ids.shape):
            yield part, reference.piece(rows, part)

    def _drawn(self, row: int) -> Tensor:
        """`(turns, tokens - 1)`: what the original expects in place of each token but the first of a sequence, after the true text."""
        if row not in self.kept:
            ids = self.tokens.ids[row : row + 1].to(self.layers.device)
            places = torch.rand(ids.shape[1], self.turns, generator=_random(self.seed, -1 - row)).to(ids.device)
            found = []
            for part, piece in self._pieces(ids):
                below = piece[0].exp().cumsum(-1)
                found.append(torch.searchsorted(below, places[part] * below[:, -1:]).clamp(max=below.shape[1] - 1))
            self.kept[row] = torch.cat(found)[:-1].T.to("cpu", torch.int32)
        return self.kept[row]


def descend(layers: Layers, hidden: Float[Tensor, "rows tokens d"], reference: Reference, *, tokens: float) -> float:
    """The backward pass of `Divergence` from the quantized model's last hidden states; returns the loss.

    Both are of `tokens` tokens, of which these are all or some. Gradients go to whatever asks for them, the head's parameters too.
    """
    ids, loss, g = reference.ids, 0.0, torch.zeros_like(hidden)
    for rows, part in layers.pieces(*ids.shape):
        leaf = hidden[rows, part].detach().requires_grad_(True)
        logits = fast(layers.logits, gradients=True)(ids[rows, part], leaf)
        own = Divergence.apply(logits, reference.piece(rows, part)) * (leaf.shape[:-1].numel() / tokens)  # type: ignore[no-untyped-call]
        own.backward()
        assert leaf.grad is not None
        g[rows, part] = leaf.grad
        loss += own.item()
    if hidden.requires_grad:
        hidden.backward(g)
    return loss


def _random(seed: int, index: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + index) % (1 << 63))


class Divergence(torch.autograd.Function):
    """Mean over tokens of `KL(original || quantized)`; keeps one matrix of the logits' size for its gradient, `softmax - p`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, reference: Tensor) -> Tensor:
        """`logits` and the original's log-probabilities, both `(sequences, tokens, vocabulary)`."""
        found, wanted = logits.float().log_softmax(-1), reference.float()
        p, tokens = wanted.exp(), logits.shape[:-1].numel()
        loss = torch.bmm(p.flatten(0, -2).unsqueeze(1), (wanted - found).flatten(0, -2).unsqueeze(2)).sum()
        if not torch.isfinite(loss):  # tokens that the original never says
            loss = torch.where(p > 0, p * (wanted - found), 0.0).sum()
        ctx.save_for_backward(found.exp_().sub_(p).to(logits.dtype))
        ctx.tokens = tokens
        return loss / tokens

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """The gradient of the logits."""
        (slope,) = ctx.saved_tensors
        return slope * (gradients[0] / ctx.tokens), None
