"""Perplexity by the protocol of the papers on quantization.

All documents are joined by blank lines and tokenized at once, so that a token that opens every text occurs only at the very start; the
stream is cut into windows of the stated length that do not overlap, and what is left over is dropped. Each window is seen alone:

    perplexity = exp(mean over windows of the mean over its positions of -log p(next token | window so far))

It depends on the length of a window (longer is lower), which is therefore part of the result. The quotient of two models' perplexities has
a standard error, from the paired differences of their windows. Cost: one forward pass of each model.

C4 is not joined: as many windows as papers take, each at a random place of a random document that is longer, by the generator that they
name. The draws are part of the result, and so is the order of the documents.

Reference: Frantar, Ashkboos, Hoefler and Alistarh, GPTQ (2023), section 4, with windows of 2048.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from roundel.calibration import read_documents
from roundel.errors import DataError, ModelError
from roundel.evaluate.divergence import ModelLogits
from roundel.types import TokenBatch

__all__ = ["NAMED", "drawn_windows", "joined_windows", "perplexity_text", "window_losses"]

WIKITEXT2 = "Salesforce/wikitext:config=wikitext-2-raw-v1:split=test"
"""The SPEC of what papers call WikiText-2."""

C4 = "allenai/c4:split=train:data_files=en/c4-validation.00000-of-00008.json.gz"
"""That of C4; a single file has one split, by the name of `train`."""

C4_WINDOWS = 256

NAMED = {"wikitext2": WIKITEXT2, "c4": C4}


def perplexity_text(named: str, tokenizer: PreTrainedTokenizerBase, length: int) -> TokenBatch:
    """The windows of `wikitext2` or `c4`, of a copy of either (`c4=SPEC`), or of any other SPEC, treated as WikiText-2 is.

    Raises:
        DataError: the text cannot be read, or is not enough.
    """
    name, equals, spec = named.partition("=")
    if name not in NAMED:
        return joined_windows(read_documents(named, tokenizer), tokenizer, length)
    documents = read_documents(spec if equals else NAMED[name], tokenizer)
    return drawn_windows(documents, tokenizer, length) if name == "c4" else joined_windows(documents, tokenizer, length)


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


def drawn_windows(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int, *, count: int = C4_WINDOWS, seed: int = 0
) -> TokenBatch:
    """`count` windows of `length` tokens at random places of random documents that are longer; a place may be drawn twice.

    Raises:
        DataError: no document is longer than a window.
    """
    known = list(documents)
    tokens: dict[int, list[int]] = {}
    draw = random.Random(seed)
    found: list[list[int]] = []
    while len(found) < count:
        chosen = draw.randint(0, len(known) - 1) if known else 0
        if known and chosen not in tokens:
            tokens[chosen] = tokenizer(known[chosen], verbose=False)["input_ids"]
        if not known or (len(tokens) == len(known) and all(len(ids) <= length for ids in tokens.values())):
            raise DataError(f"of {len(known)} documents for the perplexity not one has more than {length} tokens; give a smaller --window")
        ids = tokens[chosen]
        if len(ids) > length:
            start = draw.randint(0, len(ids) - length - 1)
            found.append(ids[start : start + length])
    return TokenBatch.of(torch.tensor(found, dtype=torch.int64))


@torch.no_grad()
def window_losses(model: nn.Module, tokens: TokenBatch, *, batch_size: int, advance: Callable[[int], None] = lambda _n: None) -> Tensor:
    """The mean negative log-likelihood of each window, in nats, as float64.

    Raises:
        ModelError: a logit is not finite.
    """
    logits = ModelLogits(model)
    slices, losses = logits.layers.slices(tokens.ids.shape[1] - 1), []
    for batch in tokens.split(batch_size):
        for own, ids in zip(logits.of(batch), batch.ids.to(logits.layers.device), strict=True):
            parts = [nn.functional.cross_entropy(own(part).float(), ids[1:][part], reduction="sum").double() for part in slices]
            losses.append((torch.stack(parts).sum() / (len(ids) - 1)).cpu())
        advance(len(batch))
    found = torch.stack(losses)
    if not torch.isfinite(found).all():
        raise ModelError("a model gives logits that are not finite; try --dtype float32")
    return found
