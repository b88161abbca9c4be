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

__all__ = ["LABEL_KINDS", "backward", "label_gradient"]

LABEL_KINDS = ("sampled", "probe", "data")

LABELS = 1
"""Keeps the labels' random numbers apart from those that sampled the text (`calibration`), which have the same seed and id."""


def label_gradient(
    logits: Float[Tensor, "sequences tokens vocabulary"], batch: TokenBatch, seed: int, labels: str = "sampled"
) -> Float[Tensor, "sequences tokens vocabulary"]:
    """The gradient `u` to send back from the logits; independent of how sequences are batched.

    Raises:
        ValueError: `labels` is none of `LABEL_KINDS`.
    """
    if labels not in LABEL_KINDS:
        raise ValueError(f"labels {labels!r}: expected one of {', '.join(LABEL_KINDS)}")
    gradient = torch.empty_like(logits)
    for row, sequence_id in enumerate(batch.sequence_ids):
        probabilities = logits[row].float().softmax(-1)
        if labels == "data":
            gradient[row] = _minus_onehot(probabilities, batch.ids[row].roll(-1)[:, None].to(logits.device))
            gradient[row, -1] = 0
            continue
        generator = np.random.default_rng((seed, sequence_id, LABELS))
        draw = _probe if labels == "probe" else _sampled
        gradient[row] = draw(probabilities, generator)
    return gradient


def _minus_onehot(probabilities: Tensor, labels: Tensor) -> Tensor:
    return probabilities.scatter_add_(1, labels, torch.full_like(labels, -1, dtype=probabilities.dtype))


def _sampled(probabilities: Tensor, generator: np.random.Generator) -> Tensor:
    uniform = torch.from_numpy(generator.random((probabilities.shape[0], 1))).to(probabilities.device)
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    labels = torch.searchsorted(cumulative, uniform * cumulative[:, -1:]).clamp_(max=probabilities.shape[1] - 1)
    return _minus_onehot(probabilities, labels)


def _probe(probabilities: Tensor, generator: np.random.Generator) -> Tensor:
    tokens, vocabulary = probabilities.shape
    width = -(-vocabulary // 8)
    packed = np.frombuffer(generator.bytes(tokens * width), dtype=np.uint8).reshape(tokens, width)
    heads = torch.from_numpy(np.unpackbits(packed, axis=1, count=vocabulary).view(np.bool_)).to(probabilities.device)
    root = probabilities.sqrt()
    signed = torch.where(heads, root, -root)
    return signed - probabilities * signed.sum(-1, keepdim=True)


def backward(model: nn.Module, batch: TokenBatch, seed: int, labels: str = "sampled", *, device: torch.device) -> None:
    """One forward pass, and one backward pass from `label_gradient`; what it yields goes to whatever taps the model."""
    logits = model(input_ids=batch.ids.to(device), use_cache=False).logits
    with torch.no_grad():
        gradient = label_gradient(logits.detach(), batch, seed, labels)
    logits.backward(gradient)
