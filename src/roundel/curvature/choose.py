"""Choosing between roundings of one linear by the KL that held-out gradients predict for them.

The gradients are common to all candidates, so the difference of two predictions is judged by its own, paired standard error. The first
candidate needs no evidence; any other has to be better by `SIGNIFICANT` standard errors. Cost: none beside the predictions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor

__all__ = ["choose"]

SIGNIFICANT = 2.0


def choose(predicted: Mapping[str, Float[Tensor, " sequences"]]) -> str:
    """The candidate to take.

    Args:
        predicted: For each candidate, in order of preference, the predicted KL of each held-out sequence.

    Returns:
        The first, or of those that are significantly better than it the one with the least mean.
    """
    first, *others = predicted
    best, least = first, predicted[first].mean().item()
    for name in others:
        gain = predicted[first] - predicted[name]
        error = gain.std().item() / math.sqrt(len(gain)) if len(gain) > 1 else math.inf
        if gain.mean().item() > SIGNIFICANT * error and predicted[name].mean().item() < least:
            best, least = name, predicted[name].mean().item()
    return best
