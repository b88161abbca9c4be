"""Choosing between roundings of one linear by the KL that held-out gradients predict for them.

The gradients are common to all candidates, so the difference of two predictions is judged by its own, paired standard error, with Student's
distribution for its ratio: held-out sequences are few. The first candidate needs no evidence; any other has to be better with an error
probability of `LEVEL`, for there are many linears and candidates. Cost: none beside the predictions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from jaxtyping import Float
from scipy.special import stdtr as student  # not scipy.stats, which takes long to import
from torch import Tensor

__all__ = ["choose"]

LEVEL = 0.02


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
        if len(gain) < 2 or not gain.mean().item() > 0:
            continue
        error = gain.std().item() / math.sqrt(len(gain))
        significant = error == 0 or student(len(gain) - 1, -gain.mean().item() / error) < LEVEL
        if significant and predicted[name].mean().item() < least:
            best, least = name, predicted[name].mean().item()
    return best
