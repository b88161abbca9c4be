"""The text that end-to-end steps see, and the original's log-probabilities of it.

Problem: more numbers move than the calibration text has tokens, and steps that see a sequence again and again fit it instead of the
language: with 400 steps the KL on their text is half of that on other text. The original can write new text, but one token at a time. Here
each step sees another version of its sequences, in which a share of the tokens is drawn anew from what the original expects at their place
after the true text; one forward pass over what comes out gives the reference at all positions, as before. Such text is a little worse than
true text: where there is half a token for each number that moves it only harms, so the share falls to zero there (`drawn_share`).

Cost: one forward pass of the original more for each step, `2 P` flops a token beside `8 P` of the step (`P` weights), and the probabilities
of the drawn tokens. Where the original's log-probabilities of the true text fit into `CACHE` bytes, they are computed once. Measured:
`docs/log.md`, 14.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from roundel.types import TokenBatch

__all__ = ["Divergence", "Teacher", "drawn_share"]

CACHE = 1 << 30
"""Bytes of the original's log-probabilities that are kept, in float16."""

SHARE = 0.3
"""Of the tokens that are drawn anew, where there are few of them."""

ENOUGH = 0.5
"""Tokens for each number that moves from which on none are."""


def drawn_share(tokens: int, parameters: int) -> float:
    """What share of the tokens to draw anew when so many parameters move."""
    return SHARE * max(0.0, 1 - tokens / (ENOUGH * max(1, parameters)))


class Teacher:
    """The original, beside calibration text."""

    def __init__(self, model: nn.Module, tokens: TokenBatch, *, share: float, seed: int) -> None:
        """Of `tokens`, a `share` is drawn anew; what is drawn at a step depends on `seed`, the step and the text alone."""
        self.model, self.tokens, self.share, self.seed = model, tokens, share, seed
        self.device = next(model.parameters()).device
        vocabulary = model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
        self.keeps = 2 * tokens.ids.numel() * vocabulary <= CACHE
        self.kept: dict[int, Tensor] = {}

    def uniforms(self, rows: int, step: int) -> Tensor:
        """`(rows, tokens - 1, 2)` numbers for the sequences of a step: which tokens are drawn, and what."""
        random = torch.Generator().manual_seed((self.seed * 1_000_003 + step) % (1 << 63))
        return torch.rand(rows, self.tokens.ids.shape[1] - 1, 2, generator=random)

    @torch.no_grad()
    def batch(self, rows: list[int], uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """These rows with tokens drawn by their `uniforms`: ids, and log-probabilities `(rows, tokens, vocabulary)`."""
        ids = self.tokens.ids[rows].to(self.device)
        expected = self._of_the_text(rows, ids)
        anew = uniforms[..., 0].to(self.device) < self.share
        if not anew.any():
            return ids, expected
        below = expected[:, :-1][anew].float().exp().cumsum(-1)
        del expected
        drawn = torch.searchsorted(below, uniforms[..., 1].to(self.device)[anew].unsqueeze(1) * below[:, -1:]).squeeze(1)
        ids[:, 1:][anew] = drawn.clamp(max=below.shape[1] - 1)
        return ids, self._run(ids)

    def _of_the_text(self, rows: list[int], ids: Tensor) -> Tensor:
        if not self.keeps:
            return self._run(ids).half()
        for row, own in zip(rows, ids, strict=True):  # one by one: the numbers must not depend on what it was first seen with
            if row not in self.kept:
                self.kept[row] = self._run(own[None])[0].half()
        return torch.stack([self.kept[row] for row in rows])

    def _run(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits.float().log_softmax(-1)


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
