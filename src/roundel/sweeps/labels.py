"""Gradients at the logits whose second moment is the Fisher of the model's own distribution, and where each token's randomness comes from.

With `p = softmax(z)` at a position, the KL divergence's Hessian in the logits is `diag(p) - p p^T`. Any random `u` with that
second moment, drawn for each position by itself and sent back through the model, gives weight gradients with
`E[vec(G) vec(G)^T] = F`, the Fisher (YAQA, arXiv 2505.22988, section 3.1). `labels` names the draw:

    sampled   u = p - onehot(y), y from p: the gradient of the negative log-likelihood of a label that the model draws
              at this position (no shift, not fed back into the context)
    probe     u = sqrt(p) * xi - p (sqrt(p) . xi), xi independent signs (Rademacher): exactly the same second moment. No
              linear form of it has a kurtosis above 3, where that of `sampled` reaches 1 / p for an improbable label;
              between two labels of p = 1/2 it is 2 to 1 the other way round
    data      u = p - onehot(next token of the text); 0 at the last position, which has none. Its second moment is the
              *empirical* Fisher, which is not the KL's Hessian; for comparison

Each sequence draws from a generator of its own. Cost per token, in float32: one softmax over the vocabulary, and a running
sum (`sampled`) or as many random bits and two more sweeps (`probe`). Not done: several draws for each forward pass.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from roundel.types import TokenBatch

__all__ = ["LABEL_KINDS", "Labels"]

LABEL_KINDS = ("sampled", "probe", "data")

BLOCK = 128
"""Words whose probabilities are added up before a label is looked for among them."""

LABELS = 1
"""Keeps the labels' random numbers apart from those that sampled the text (`calibration`), which have the same seed and id."""


class Labels:
    """What is drawn for one sequence, slice after slice of its tokens: the same, however it is cut and batched with others.

    Raises:
        ValueError: `labels` is none of `LABEL_KINDS`.
    """

    def __init__(self, tokens: TokenBatch, row: int, seed: int, labels: str = "sampled") -> None:
        if labels not in LABEL_KINDS:
            raise ValueError(f"labels {labels!r}: expected one of {', '.join(LABEL_KINDS)}")
        self._ids, self._labels = tokens.ids[row], labels
        self._generator = np.random.default_rng((seed, tokens.sequence_ids[row], LABELS))

    def gradient(self, logits: Float[Tensor, "slice vocabulary"], part: slice) -> Float[Tensor, "slice vocabulary"]:
        """The gradient `u` to send back from the logits of these tokens, which follow those asked for before."""
        probabilities = logits.float().softmax(-1)
        if self._labels == "data":
            following = torch.cat([self._ids[1:], self._ids[:1]])[part, None].to(logits.device)
            found = _minus_onehot(probabilities, following)
            if part.stop == len(self._ids):
                found[-1] = 0
        elif self._labels == "probe":
            found = _probe(probabilities, self._generator)
        else:
            found = _sampled(probabilities, self._generator)
        return found.to(logits.dtype)


def _minus_onehot(probabilities: Tensor, labels: Tensor) -> Tensor:
    return probabilities.scatter_add_(1, labels, torch.full_like(labels, -1, dtype=probabilities.dtype))


def _sampled(probabilities: Tensor, generator: np.random.Generator) -> Tensor:
    """By inverting the distribution function, first of blocks of words, then in the block: two passes over the vocabulary."""
    uniform = torch.from_numpy(generator.random((probabilities.shape[0], 1))).to(probabilities.device)
    short = -probabilities.shape[1] % BLOCK
    blocks = (nn.functional.pad(probabilities, (0, short)) if short else probabilities).unflatten(1, (-1, BLOCK))
    cumulative = blocks.sum(-1).cumsum(-1, dtype=torch.float64)
    wanted = uniform * cumulative[:, -1:]
    block = torch.searchsorted(cumulative, wanted).clamp_(max=cumulative.shape[1] - 1)
    before = torch.where(block > 0, cumulative.gather(1, (block - 1).clamp(min=0)), 0.0)
    inside = blocks.gather(1, block[:, :, None].expand(-1, 1, BLOCK))[:, 0].cumsum(-1, dtype=torch.float64)
    word = torch.searchsorted(inside, wanted - before).clamp_(max=BLOCK - 1)
    return _minus_onehot(probabilities, (block * BLOCK + word).clamp_(max=probabilities.shape[1] - 1))


def _probe(probabilities: Tensor, generator: np.random.Generator) -> Tensor:
    tokens, vocabulary = probabilities.shape
    width = 4 * -(-vocabulary // 32)  # whole words of the generator for each token: slices continue each other
    packed = np.frombuffer(generator.bytes(tokens * width), dtype=np.uint8).reshape(tokens, width)
    heads = torch.from_numpy(np.unpackbits(packed, axis=1, count=vocabulary).view(np.bool_)).to(probabilities.device)
    root = probabilities.sqrt()
    signed = torch.where(heads, root, -root)
    return signed - probabilities * signed.sum(-1, keepdim=True)
