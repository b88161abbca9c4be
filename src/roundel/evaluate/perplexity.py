"""Perplexity by the protocol of the papers on quantization.

All documents are joined by blank lines and tokenized at once, so that a token that opens every text occurs only at the very start; the
stream is cut into windows of the stated length that do not overlap, and what is left over is dropped. Each window is seen alone:

    perplexity = exp(mean over windows of the mean over its positions of -log p(next token | window so far))

It depends on the length of a window (longer is lower), which is therefore part of the result. The quotient of two models' perplexities has
a standard error, from the paired differences of their windows. Cost: one forward pass of each model.

Reference: Frantar, Ashkboos, Hoefler and Alistarh, GPTQ (2023), section 4, with windows of 2048.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from roundel.errors import DataError, ModelError
from roundel.types import TokenBatch

__all__ = ["WIKITEXT2", "joined_windows", "window_losses"]

WIKITEXT2 = "Salesforce/wikitext:config=wikitext-2-raw-v1:split=test"
"""The SPEC of what papers call WikiText-2."""


def joined_windows(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int) -> TokenBatch:
    """The windows of `length` tokens of the documents joined by blank lines.

    Raises:
        DataError: there is not one window.
    """
    ids = tokenizer("\n\n".join(documents), verbose=False)["input_ids"]
    count = len(ids) // length
    if count < 1:
        raise DataError(
            f"the text for the perplexity has {len(ids)} tokens, not one window of {length}; give more text or a smaller --window"
        )
    return TokenBatch.of(torch.tensor(ids[: count * length], dtype=torch.int64).reshape(count, length))


@torch.no_grad()
def window_losses(model: nn.Module, tokens: TokenBatch, *, batch_size: int, advance: Callable[[int], None] = lambda _n: None) -> Tensor:
    """The mean negative log-likelihood of each window, in nats, as float64.

    Raises:
        ModelError: a logit is not finite.
    """
    device = next(model.parameters()).device
    losses = []
    for batch in tokens.split(batch_size):
        ids = batch.ids.to(device)
        logits = model(input_ids=ids, use_cache=False).logits
        for row, own in zip(logits, ids, strict=True):  # one window in float32 at a time: vocabularies are large
            losses.append(nn.functional.cross_entropy(row[:-1].float(), own[1:]).double().cpu())
        advance(len(batch))
    found = torch.stack(losses)
    if not torch.isfinite(found).all():
        raise ModelError("a model gives logits that are not finite; try --dtype float32")
    return found
