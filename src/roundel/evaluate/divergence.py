"""KL(original || quantized) per token, with its standard error.

At each position of each held-out sequence, both models see the same tokens and `KL = sum_v p_v (log p_v - log q_v)` in nats, from float32
log-softmaxes of the full vocabulary. The standard error is over *sequences*, because tokens of one sequence are not
independent, and so is the interval: the middle 95 % of the means of sequences drawn with repetition, as many as there are (Efron 1979).
With few or skewed sequences it is not symmetric, and wider than the error suggests. Perplexities are of the next token, `exp` of the mean
negative log-likelihood.

Cost: one forward pass of each model, and a few passes over `(tokens, vocabulary)`, of which only slices exist at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from roundel import processes
from roundel.errors import ModelError
from roundel.sweeps import Layers
from roundel.types import TokenBatch

__all__ = ["Comparison", "Divergence", "Logits", "ModelLogits", "Part", "Span", "compare_models"]

SPANS = 16
"""Parts of a sequence that the KL is told of."""

DRAWS = 2000
"""Of the bootstrap: the ends of the interval are then known to some hundredths of its width."""


Part = Callable[[slice], Tensor]
"""Logits of some tokens of a sequence, `(slice, vocabulary)`."""


class Logits(Protocol):
    """What can stand for a model: its logits from somewhere else."""

    def of(self, batch: TokenBatch) -> list[Part]:
        """For each sequence of a batch what gives the logits of its tokens, slice after slice."""


class ModelLogits:
    """Logits of a model in memory: the decoder layers for a whole batch, then the head for each slice."""

    def __init__(self, model: nn.Module) -> None:
        self.layers = Layers(model)

    def of(self, batch: TokenBatch) -> list[Part]:
        """See `Logits`."""
        ids = batch.ids.to(self.layers.device)
        hidden = self.layers.through(ids)

        def part_of(row: int) -> Part:
            return lambda part: self.layers.logits(ids[row : row + 1, part], hidden[row : row + 1, part])[0]

        return [part_of(row) for row in range(len(batch))]


@dataclass(frozen=True, kw_only=True)
class Span:
    """Positions `first` to `last` of all sequences, counted from 0."""

    first: int
    last: int
    kl: float
    stderr: float
    """Over sequences."""


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """What was measured, in nats per token."""

    kl_mean: float
    kl_stderr: float
    kl_interval: tuple[float, float]
    """95 %, by bootstrap over sequences; two NaN for a single sequence."""
    kl_median: float
    kl_p99: float
    kl_p999: float
    """The 99th and the 99.9th percentile of the tokens' KL."""
    top1_agreement: float
    perplexity_model: float
    perplexity_reference: float
    tokens: int
    sequences: int
    spans: tuple[Span, ...] = ()
    """How the KL goes along a sequence."""
    sequence_kl: tuple[float, ...] = ()
    """Of each sequence, for paired comparisons; not in the report."""

    def as_json(self) -> dict[str, Any]:
        """The nested form that reports have; errors of a single sequence are null."""
        single = math.isnan(self.kl_stderr)
        return {
            "kl": {
                "mean": self.kl_mean,
                "stderr": None if single else self.kl_stderr,
                "interval95": None if single else list(self.kl_interval),
                "median": self.kl_median,
                "p99": self.kl_p99,
                "p999": self.kl_p999,
                "by_position": [
                    {"first": each.first, "last": each.last, "mean": each.kl, "stderr": None if single else each.stderr}
                    for each in self.spans
                ],
            },
            "top1_agreement": self.top1_agreement,
            "perplexity": {"model": self.perplexity_model, "reference": self.perplexity_reference},
            "tokens": self.tokens,
            "sequences": self.sequences,
        }


class Comparison:
    """What is measured of two models, sequence after sequence."""

    def __init__(self) -> None:
        self._kl: list[Tensor] = []
        self._agreement: list[Tensor] = []
        self._nll: list[Tensor] = []

    @torch.no_grad()
    def add(self, ids: Tensor, ours: Part, theirs: Part, slices: Sequence[slice]) -> None:
        """Measures one sequence of tokens.

        Raises:
            ModelError: the models' vocabularies differ.
        """
        following = torch.cat([ids[1:], ids[-1:]])  # the last position has no next token; its likelihood is dropped
        found = []
        for part in slices:
            own = ours(part)
            other = theirs(part).to(own.device)
            if own.shape != other.shape:
                raise ModelError(f"the models have vocabularies of {own.shape[-1]} and {other.shape[-1]} tokens and cannot be compared")
            found.append(_compare(own, other, following[part].to(own.device)))
        self._kl.append(torch.cat([each[0] for each in found]))
        self._agreement.append(torch.cat([each[1] for each in found]))
        self._nll.append(torch.cat([each[2] for each in found], dim=1)[:, :-1])

    def add_states(
        self, layers: Layers, ids: Tensor, ours: Tensor, theirs: Tensor, outer: Mapping[str, Tensor], slices: Sequence[slice]
    ) -> None:
        """Measures one sequence by hidden states after the last layer, `(1, tokens, d)`; `outer`: our parameters outside of the layers."""
        own = ids[None].to(layers.device)

        def of_original(part: slice) -> Tensor:
            return layers.logits(own[:, part], theirs[:, part])[0]

        def of_ours(part: slice) -> Tensor:
            with layers.replaced(outer):
                return layers.logits(own[:, part], ours[:, part])[0]

        self.add(ids, of_ours, of_original, slices)

    def of_all(self, rows: Sequence[int]) -> Comparison:
        """With the sequences of all processes in their order; `rows`: which of them these are."""
        own = {f"{row} {kind}": values for kind, each in self._kinds().items() for row, values in zip(rows, each, strict=True)}
        found, _ = processes.exchanged(own)
        whole = Comparison()
        for row in sorted({int(name.split()[0]) for name in found}):
            for kind, values in whole._kinds().items():
                values.append(found[f"{row} {kind}"])
        return whole

    def _kinds(self) -> dict[str, list[Tensor]]:
        return {"kl": self._kl, "agreement": self._agreement, "nll": self._nll}

    def result(self) -> Divergence:
        """Of all sequences so far.

        Raises:
            ModelError: a logit was not finite, or the text is so unlikely that no number holds its perplexity.
        """
        divergence = torch.stack(self._kl).double()
        if not torch.isfinite(divergence).all():
            raise ModelError("a model gives logits that are not finite; try --dtype float32")
        sequence_means, flat = divergence.mean(1), divergence.flatten()
        perplexities = torch.stack(self._nll).double().mean((0, 2)).exp()
        if not torch.isfinite(perplexities).all():
            raise ModelError("the text has a perplexity beyond 1e308 by one of the models: its weights are damaged")
        return Divergence(
            kl_mean=flat.mean().item(),
            kl_stderr=_stderr(sequence_means),
            kl_interval=_interval(sequence_means),
            kl_median=flat.median().item(),
            kl_p99=_percentile(flat, 0.99),
            kl_p999=_percentile(flat, 0.999),
            top1_agreement=torch.cat(self._agreement).double().mean().item(),
            perplexity_model=perplexities[0].item(),
            perplexity_reference=perplexities[1].item(),
            tokens=len(flat),
            sequences=len(sequence_means),
            spans=_spans(divergence),
            sequence_kl=tuple(sequence_means.tolist()),
        )


@torch.no_grad()
def compare_models(
    model: nn.Module | Logits,
    reference: nn.Module | Logits,
    tokens: TokenBatch,
    *,
    batch_size: int,
    advance: Callable[[int], None] = lambda _n: None,
) -> Divergence:
    """Measures `KL(reference || model)` on `tokens`, both models in memory; several processes share the sequences.

    Raises:
        ModelError: the models' vocabularies differ, a logit is not finite, or a model has no decoder layers.
    """
    ours, theirs = (ModelLogits(each) if isinstance(each, nn.Module) else each for each in (model, reference))
    slices = next(each.layers for each in (ours, theirs) if hasattr(each, "layers")).slices(tokens.ids.shape[1])
    found, rows = Comparison(), processes.own_rows(range(len(tokens)))
    for batch in tokens.select(rows).split(batch_size):
        for ids, own, other in zip(batch.ids, ours.of(batch), theirs.of(batch), strict=True):
            found.add(ids, own, other, slices)
        advance(len(batch) * processes.world())
    return found.of_all(rows).result()


def _percentile(values: Tensor, part: float) -> float:
    """The smallest value that at least this part of all does not exceed."""
    return values.kthvalue(max(1, math.ceil(part * len(values)))).values.item()


def _stderr(values: Tensor) -> float:
    """Of the mean; NaN for a single value."""
    return values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan


def _interval(values: Tensor) -> tuple[float, float]:
    """Of the mean, 95 %, by bootstrap with fixed draws."""
    if len(values) < 2:
        return math.nan, math.nan
    draws = torch.randint(len(values), (DRAWS, len(values)), generator=torch.Generator().manual_seed(0))
    low, high = values[draws].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return low, high


def _spans(divergence: Tensor) -> tuple[Span, ...]:
    """Of the KL at each position, `(sequences, tokens)`: about `SPANS` parts of equal length."""
    found, length = [], -(-divergence.shape[1] // SPANS)
    for number, part in enumerate(divergence.split(length, dim=1)):
        means = part.mean(1)
        first = number * length
        found.append(Span(first=first, last=first + part.shape[1] - 1, kl=means.mean().item(), stderr=_stderr(means)))
    return tuple(found)


def _compare(ours: Tensor, theirs: Tensor, following: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """KL, top-1 agreement and both negative log-likelihoods at each position."""
    log_q, log_p = ours.float().log_softmax(-1), theirs.float().log_softmax(-1)
    p = log_p.exp()
    kl = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)
    same = ours.argmax(-1) == theirs.argmax(-1)
    nll = torch.stack([-log.gather(-1, following[:, None])[:, 0] for log in (log_q, log_p)])
    return kl.cpu(), same.cpu(), nll.cpu()
