"""The same beginnings continued by several models, greedily: what a KL looks like as text.

At each step the most probable next token is taken, without a cache of keys and values, so that any model that can be run layer by layer
(`sweeps.Layers`) will do, also one whose weights are replaced for the time. A text ends after `tokens` of them or with the token that ends
texts. The first token that differs from the original's often changes all that follow, so `equal_tokens`, how many come before it, says
little of a single text. Deterministic on one machine.

Cost: `tokens` forward passes over each beginning and what has been written after it, together where they have one length; by default some
2000 tokens for each model. Not done: sampling, chat templates (a beginning is taken as it is).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from roundel.errors import DataError
from roundel.sweeps import Layers
from roundel.types import TokenBatch

__all__ = ["PROMPT", "PROMPTS", "beginnings", "continued", "equal_tokens", "of_prompts", "told"]

PROMPTS, PROMPT = 3, 16
"""Beginnings of so many sequences, and tokens of each."""

Ids = Sequence[int]


def beginnings(tokens: TokenBatch) -> list[list[int]]:
    """Of the first sequences: `PROMPT` tokens, at most half of a sequence."""
    found: list[list[int]] = tokens.ids[:PROMPTS, : min(PROMPT, tokens.ids.shape[1] // 2)].tolist()
    return found


def of_prompts(prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase, longest: int) -> list[list[int]]:
    """The tokens of texts, of which a model with `longest` positions can continue each.

    Raises:
        DataError: one has none, or too many.
    """
    found: list[list[int]] = [tokenizer(text, verbose=False)["input_ids"] for text in prompts]
    for text, ids in zip(prompts, found, strict=True):
        if not 0 < len(ids) < longest:
            raise DataError(
                f"--prompt {text[:40]!r} has {len(ids)} tokens: expected at least 1, and fewer than the model's {longest} positions"
            )
    return found


@torch.no_grad()
def continued(layers: Layers, prompts: Sequence[Ids], tokens: int, *, end: int | None, longest: int) -> list[list[int]]:
    """What follows each beginning.

    Args:
        layers: Of a model that is in memory as a whole.
        prompts: The beginnings.
        tokens: At most so many follow.
        end: The token after which nothing does.
        longest: The model's positions.
    """
    found: dict[int, list[int]] = {}
    for length in dict.fromkeys(map(len, prompts)):
        rows = [row for row, prompt in enumerate(prompts) if len(prompt) == length]
        ids = torch.tensor([prompts[row] for row in rows], device=layers.device)
        for _ in range(min(tokens, longest - length)):
            hidden = layers.through(ids)
            following = layers.logits(ids[:, -1:], hidden[:, -1:])[:, -1].argmax(-1)
            ids = torch.cat([ids, following[:, None]], dim=1)
        for row, own in zip(rows, ids[:, length:].tolist(), strict=True):
            found[row] = own[: own.index(end) + 1] if end in own else own
    return [found[row] for row in range(len(prompts))]


def told(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Ids], original: Sequence[Ids], others: Mapping[str, Sequence[Ids]]
) -> list[dict[str, Any]]:
    """For the report: the text of each beginning, and what the original and the others, by name, have written after it."""
    return [
        {
            "prompt": _decoded(tokenizer, prompt),
            "original": {"text": _after(tokenizer, prompt, original[row]), "tokens": len(original[row])},
            "continued": {
                name: {
                    "text": _after(tokenizer, prompt, found[row]),
                    "tokens": len(found[row]),
                    "equal_tokens": equal_tokens(found[row], original[row]),
                }
                for name, found in others.items()
            },
        }
        for row, prompt in enumerate(prompts)
    ]


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: Ids) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))


def _after(tokenizer: PreTrainedTokenizerBase, prompt: Ids, ids: Ids) -> str:
    """The text of `ids` as it stands behind the beginning, with its space; by itself where the two share a letter."""
    before, whole = _decoded(tokenizer, prompt), _decoded(tokenizer, [*prompt, *ids])
    return whole.removeprefix(before) if whole.startswith(before) else _decoded(tokenizer, ids)


def equal_tokens(ids: Ids, original: Ids) -> int:
    """How many tokens come before the first that differs."""
    return next(
        (place for place, (own, other) in enumerate(zip(ids, original, strict=False)) if own != other), min(len(ids), len(original))
    )
