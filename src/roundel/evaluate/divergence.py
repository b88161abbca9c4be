"""KL(original || quantized) per token, with its standard error.

At each position of each held-out sequence, both models see the same tokens and `KL = sum_v p_v (log p_v - log q_v)` in nats, from float32
log-softmaxes of the full vocabulary. The standard error is over *sequences*, because tokens of one sequence are not
independent. Perplexities are of the next token, `exp` of the mean negative log-likelihood.

Cost: one forward pass of each model, and a few passes over `(tokens, vocabulary)` in chunks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from roundel.errors import ModelError
from roundel.types import TokenBatch

__all__ = ["Divergence", "compare_models"]

CHUNK = 1 << 24
"""Logits of each model turned into float32 log-probabilities at a time."""


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """What was measured, in nats per token."""

    kl_mean: float
    kl_stderr: float
    kl_median: float
    kl_p99: float
    top1_agreement: float
    perplexity_model: float
    perplexity_reference: float
    tokens: int
    sequences: int
    sequence_kl: tuple[float, ...] = ()
    """Of each sequence, for paired comparisons; not in the report."""

    def as_json(self) -> dict[str, Any]:
        """The nested form that reports have; a standard error of a single sequence is null."""
        return {
            "kl": {
                "mean": self.kl_mean,
                "stderr": None if math.isnan(self.kl_stderr) else self.kl_stderr,
                "median": self.kl_median,
                "p99": self.kl_p99,
            },
            "top1_agreement": self.top1_agreement,
            "perplexity": {"model": self.perplexity_model, "reference": self.perplexity_reference},
            "tokens": self.tokens,
            "sequences": self.sequences,
        }


@torch.no_grad()
def compare_models(
    model: nn.Module,
    reference: nn.Module,
    tokens: TokenBatch,
    *,
    batch_size: int,
    advance: Callable[[int], None] = lambda _n: None,
) -> Divergence:
    """Measures `KL(reference || model)` on `tokens`.

    Raises:
        ModelError: the models' vocabularies differ, or a logit is not finite.
    """
    kl, agreement, nll = [], [], []
    for batch in tokens.split(batch_size):
        ours = _logits(model, batch)
        theirs = _logits(reference, batch)
        if ours.shape != theirs.shape:
            raise ModelError(f"the models have vocabularies of {ours.shape[-1]} and {theirs.shape[-1]} tokens and cannot be compared")
        for row in range(len(batch)):
            parts = [_compare(*pair) for pair in _chunks(ours[row], theirs[row], batch.ids[row].to(ours.device))]
            kl.append(torch.cat([p[0] for p in parts]))
            agreement.append(torch.cat([p[1] for p in parts]))
            nll.append(torch.cat([p[2] for p in parts], dim=1)[:, :-1])
        advance(len(batch))
    divergence = torch.stack(kl).double()
    if not torch.isfinite(divergence).all():
        raise ModelError("a model gives logits that are not finite; try --dtype float32")
    sequence_means = divergence.mean(1)
    flat = divergence.flatten()
    perplexities = torch.stack(nll).double().mean((0, 2)).exp()
    count = len(sequence_means)
    return Divergence(
        kl_mean=flat.mean().item(),
        kl_stderr=sequence_means.std().item() / math.sqrt(count) if count > 1 else math.nan,
        kl_median=flat.median().item(),
        kl_p99=flat.kthvalue(max(1, math.ceil(0.99 * len(flat)))).values.item(),
        top1_agreement=torch.cat(agreement).double().mean().item(),
        perplexity_model=perplexities[0].item(),
        perplexity_reference=perplexities[1].item(),
        tokens=len(flat),
        sequences=count,
        sequence_kl=tuple(sequence_means.tolist()),
    )


def _logits(model: nn.Module, batch: TokenBatch) -> Tensor:
    device = next(model.parameters()).device
    return model(input_ids=batch.ids.to(device), use_cache=False).logits  # type: ignore[no-any-return]


def _chunks(ours: Tensor, theirs: Tensor, ids: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    size = max(1, CHUNK // ours.shape[-1])
    following = torch.cat([ids[1:], ids[-1:]])  # the last position has no next token; its likelihood is dropped by the caller
    return list(zip(ours.split(size), theirs.split(size), following.split(size), strict=True))


def _compare(ours: Tensor, theirs: Tensor, following: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """KL, top-1 agreement and both negative log-likelihoods at each position."""
    log_q, log_p = ours.float().log_softmax(-1), theirs.float().log_softmax(-1)
    p = log_p.exp()
    kl = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)
    same = ours.argmax(-1) == theirs.argmax(-1)
    nll = torch.stack([-log.gather(-1, following[:, None])[:, 0] for log in (log_q, log_p)])
    return kl.cpu(), same.cpu(), nll.cpu()
