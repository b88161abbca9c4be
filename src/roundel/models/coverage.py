"""How much of a model a quantization reaches: the share of the weights of its decoder layers' matrices, and why the rest stays.

Embedding and output head are no part of it, nor are norms, biases, towers for images or sounds, and what multiplies channel by channel
(convolutions, `A_log`): what is counted is what a user means by "quantized to 4 bits".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

__all__ = ["Coverage", "coverage_of"]

LITTLE = 0.9
"""The share below which a user is warned."""


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """Weights of the matrices in decoder layers."""

    weights: int
    quantized: int
    left: Mapping[str, int]
    """Of those that stay in their precision, by reason, most first."""

    @property
    def share(self) -> float:
        """Of them that is quantized."""
        return self.quantized / max(1, self.weights)

    @property
    def warning(self) -> str | None:
        """What to tell the user, if it is little."""
        if self.share >= LITTLE or not self.left:
            return None
        reason, weights = next(iter(self.left.items()))
        rest = f"; most of the rest, {100 * weights / self.weights:.0f} %: {reason}"
        return f"only {100 * self.share:.0f} % of the weights of the decoder layers' matrices are quantized{rest}"

    def as_json(self) -> dict[str, Any]:
        """For the report."""
        return {"decoder_weights": self.weights, "quantized": self.quantized, "share": self.share, "left": dict(self.left)}


def coverage_of(model: nn.Module, layers: Sequence[str], quantized: Collection[str], skipped: Mapping[str, str]) -> Coverage:
    """Of a model with these decoder layers, linears that are quantized, and reasons of others, all by name."""
    prefixes = tuple(f"{layer}." for layer in layers)
    done, left = 0, Counter[str]()
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or not name.startswith(prefixes) or name.endswith("bias"):  # experts have a bias each
            continue
        owner, _, own = name.rpartition(".")
        if own == "A_log" or isinstance(model.get_submodule(owner), _ConvNd) or max(parameter.shape) == parameter.numel():
            continue
        if owner in quantized and own == "weight":
            done += parameter.numel()
        else:
            left[skipped.get(owner) or f"{type(model.get_submodule(owner)).__name__} is no linear"] += parameter.numel()
    return Coverage(weights=done + left.total(), quantized=done, left=dict(left.most_common()))
