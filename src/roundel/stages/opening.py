"""The token that texts should start with, where the tokenizer has forgotten it.

Models such as Gemma were trained on texts that begin with a token of their own and are useless without it: it is where attention goes that
has nothing to attend to. Tokenizers that were converted from other files often do not add it, though config.json names it. That it is named
says little (Qwen's never has it), so the model is asked: if its loss on text, far from the beginning, falls when the token comes first,
texts start with it.

Cost: two forward passes over four windows, only where a token is named that the tokenizer does not add.
"""

from __future__ import annotations

import torch
from torch import Tensor

from roundel.artifacts.source import Source
from roundel.calibration import opening_of, read_documents, set_opening, windows
from roundel.stages.notes import Notes
from roundel.sweeps import Layers

__all__ = ["settle_opening"]

WINDOWS, LONGEST = 4, 256
"""Of the text that is looked at, and tokens in each."""

FROM = 16
"""The first token whose loss counts: those before it lack context with and without."""

WORTH = 0.05
"""Nats per token by which the loss must fall."""


def settle_opening(source: Source, calibration: str, notes: Notes) -> None:
    """Sets what the source's tokenizer starts texts with, if the model needs it and it does not."""
    token = _named(source)
    if token is None or calibration == "self":
        return
    text = windows(read_documents(calibration, source.tokenizer), source.tokenizer, min(LONGEST, source.length - 1), most=WINDOWS)
    if not len(text) or text.shape[1] <= FROM or int(text.max()) >= source.layers.vocabulary:
        return
    plain = loss(source.layers, text, FROM)
    opened = loss(source.layers, torch.cat([torch.full_like(text[:, :1], token), text], dim=1), FROM + 1)
    if not opened < plain - WORTH:
        return
    set_opening(source.tokenizer, token)
    notes.warn(
        f"the tokenizer starts no text with {source.tokenizer.convert_ids_to_tokens(token)}, without which the original loses "
        f"{plain:.2f} instead of {opened:.2f} nats a token: all text here starts with it"
    )


def _named(source: Source) -> int | None:
    """The beginning-of-text token that tokenizer or config.json names, where the tokenizer does not add it."""
    if opening_of(source.tokenizer) or not source.tokenizer.is_fast:
        return None
    named = source.tokenizer.bos_token_id
    if named is None:
        named = getattr(source.model.config.get_text_config(), "bos_token_id", None)
    inside = isinstance(named, int) and 0 <= named < min(len(source.tokenizer), source.layers.vocabulary)
    return named if inside else None


@torch.no_grad()
def loss(layers: Layers, ids: Tensor, first: int) -> float:
    """The mean negative log-likelihood of the tokens from `first` on, in nats."""
    total, device = 0.0, layers.device
    for row in ids.to(device):
        x = layers.embed(row[None])
        for index in range(len(layers)):
            with layers.loaded(index):
                x = layers.run(index, row[None], x)
        logits = layers.logits(row[None, first - 1 : -1], x[:, first - 1 : -1])
        total += torch.nn.functional.cross_entropy(logits[0].float(), row[first:]).item() / len(ids)
    return total
