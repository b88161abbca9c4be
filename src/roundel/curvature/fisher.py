"""Labels from the model itself: the gradient whose second moment is the Fisher of the model's own distribution.

At every position a label is drawn from that position's own logits (no shift, not fed back into the context), and the
gradient of the *summed* negative log-likelihood is `softmax(z) - onehot(label)`. With such labels `E[G_s G_s^T]` is
the Hessian of the KL divergence (algorithms: YAQA, arXiv 2505.22988, section 3.1); with labels from the data it is
not. Each sequence draws from a generator of its own.

Cost: one softmax and one running sum over the vocabulary for each token, in float32.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from roundel.types import TokenBatch

__all__ = ["backward", "label_gradient"]

LABELS = 1
"""Keeps the labels' random numbers apart from those that sampled the text (`calibration`), which have the same seed and id."""


def label_gradient(
    logits: Float[Tensor, "sequences tokens vocabulary"], batch: TokenBatch, seed: int
) -> Float[Tensor, "sequences tokens vocabulary"]:
    """`softmax(z) - onehot(label)`, labels sampled from the model; independent of how sequences are batched."""
    gradient = torch.empty_like(logits)
    for row, sequence_id in enumerate(batch.sequence_ids):
        probabilities = logits[row].float().softmax(-1)
        generator = np.random.default_rng((seed, sequence_id, LABELS))
        uniform = torch.from_numpy(generator.random((logits.shape[1], 1))).to(logits.device)
        cumulative = probabilities.cumsum(-1, dtype=torch.float64)
        labels = torch.searchsorted(cumulative, uniform * cumulative[:, -1:]).clamp_(max=logits.shape[2] - 1)
        probabilities.scatter_add_(1, labels, torch.full_like(labels, -1, dtype=probabilities.dtype))
        gradient[row] = probabilities
    return gradient


def backward(model: nn.Module, batch: TokenBatch, seed: int, *, device: torch.device) -> None:
    """One forward and backward pass with sampled labels; what it yields goes to whatever taps the model."""
    logits = model(input_ids=batch.ids.to(device), use_cache=False).logits
    with torch.no_grad():
        gradient = label_gradient(logits.detach(), batch, seed)
    logits.backward(gradient)
