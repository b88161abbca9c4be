"""Rounding that knows the errors made before: `--error-aware`.

Problem: each linear is rounded to the original's weight as if all others were exact. Inside a weight, feedback moves what is not rounded
yet so that it makes up for what is; here the same is done over the model. When the linears of a decoder layer have been rounded, all later
ones, still real numbers, go downhill in the KL of the model as it is then, and are rounded to where they end:

    G = d KL(original || model) / dW,    N = H_out^-1 G H_in^-1 / scale,    W -= c N,    c = <G, N> / <N, F N>

on one batch of calibration text after the other, with damped factors. `F` is the exact Fisher of all these weights together, of which one
product is a difference of logits. So no length of a step has to be chosen: it shrinks with the number of linears, whose natural gradients
overlap, and its part that is taken falls to 0. Then the KL is measured on text that the steps have not seen; if it has not fallen, the
targets stay as they were. Only the targets are new: grids, codes and formats are what they would be, and it works for all of them.

Cost: for each decoder layer but the last `STEPS` batches of about `TOKENS` tokens, each with a forward pass of the original, two of the
quantized model and a backward pass down to the first linear that is not rounded. Memory: a second model, gradients of what is left of it,
and in main memory a float32 target and two inverse factors for each linear.

References: Martens and Grosse 2015 (K-FAC, arXiv 1503.05671), section 6.4 for the length; tuning of what is not quantized yet after each
block: QuIP# (arXiv 2402.04396), there with Adam. Not done: moving what is never rounded (embeddings, norms), and linears rounded already.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from roundel.evaluate import compare_models
from roundel.rounding.round import dequantized
from roundel.types import Factors, RoundedWeight, TokenBatch

__all__ = ["Targets"]

STEPS = 16
"""After each decoder layer."""

TOKENS = 4096
"""Of one step."""

DAMPING = 0.3
"""Of the factors that a gradient is divided by, relative to their mean diagonal: batches are small."""

NUDGE = 1e-2
"""Size of the change that differences of logits are taken over, relative to the weights."""


class Targets:
    """What the linears are to be rounded to, given those that are rounded: `values`, in float32."""

    def __init__(
        self,
        model: nn.Module,
        factors: Mapping[str, Factors],
        tokens: TokenBatch,
        unseen: TokenBatch,
        *,
        seed: int,
        batch_size: int,
    ) -> None:
        """Starts with the weights themselves.

        Args:
            model: The original.
            factors: Of each linear that will be rounded, in the order of the rounding.
            tokens: Calibration text for the steps, taken in an order drawn by `seed`, again and again.
            unseen: Text to judge their result by.
            seed: Of the order.
            batch_size: Sequences per pass over `unseen`.
        """
        self._original, self._twin = model, copy.deepcopy(model).requires_grad_(False)
        self._unseen, self._batch_size = unseen, batch_size
        self._device = next(model.parameters()).device
        self._text = _endless(tokens, max(1, TOKENS // tokens.ids.shape[1]), seed)
        self._inverses = {name: _inverses(own) for name, own in factors.items()}
        self.values = {name: self._weight(name).detach().to("cpu", torch.float32, copy=True) for name in factors}

    def follow(self, rounded: Mapping[str, RoundedWeight]) -> dict[str, Any]:
        """Takes these linears as rounded and moves the targets of all that are left.

        Returns:
            For the report: `held_out_kl` of the model before and after, in nats per token, and whether the new targets are `taken`.
            Nothing if no linear is left.
        """
        for name, weight in rounded.items():
            self._weight(name).copy_(dequantized(weight))
            del self.values[name], self._inverses[name]
        if not self.values:
            return {}
        before, old = self._held_out_kl(), dict(self.values)
        for step in range(STEPS):
            self._step(next(self._text).to(self._device), 1 - step / STEPS)
        after = self._held_out_kl()
        if not after < before:
            self.values = old
            for name, value in old.items():
                self._weight(name).copy_(value)
        return {"held_out_kl": [before, after], "taken": after < before}

    def _weight(self, name: str) -> Tensor:
        weight = self._twin.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        return weight

    def _held_out_kl(self) -> float:
        return compare_models(self._twin, self._original, self._unseen, batch_size=self._batch_size).kl_mean

    def _step(self, ids: Tensor, part: float) -> None:
        """One step of `part` of the best length for this batch."""
        logits, gradients = self._gradients(ids)
        steps = {name: self._natural(name, gradients.pop(name)) for name in list(gradients)}
        slope = sum(found for _, found in steps.values())
        size = sum(float(N.square().sum()) for N, _ in steps.values()) ** 0.5
        if not slope > 0 or not size > 0:
            return
        nudge = NUDGE * sum(float(value.square().sum()) for value in self.values.values()) ** 0.5 / size
        for name, (N, _) in steps.items():
            self._weight(name).copy_(self.values[name] - nudge * N)
        with torch.no_grad():
            change = (logits - self._logits(self._twin, ids)) / nudge
            p = logits.softmax(-1)
            curvature = float(((p * change.square()).sum(-1) - (p * change).sum(-1).square()).mean())
        length = part * slope / curvature if curvature > 0 else 0.0
        for name, (N, _) in steps.items():
            self.values[name] = self.values[name] - length * N
            self._weight(name).copy_(self.values[name])

    def _gradients(self, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits, and the gradient of the KL per token for each linear that is left; zeros for one that no token has reached."""
        weights = [self._weight(name) for name in self.values]
        for weight in weights:
            weight.requires_grad_(True)
        with torch.no_grad():
            p = self._logits(self._original, ids).log_softmax(-1)
        logits = self._logits(self._twin, ids)
        loss = (p.exp() * (p - logits.log_softmax(-1))).sum(-1).mean()
        found = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
        for weight in weights:
            weight.requires_grad_(False)
        return logits.detach(), dict(zip(self.values, found, strict=True))

    def _natural(self, name: str, G: Tensor) -> tuple[Tensor, float]:
        """`N` in main memory, and `<G, N>`."""
        G = G.float()
        N = torch.cat([out.to(G.device) @ G[rows] @ into.to(G.device) for rows, out, into in self._inverses[name]])
        return N.cpu(), float((G * N).sum(dtype=torch.float64))

    def _logits(self, model: nn.Module, ids: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
        return logits.float()


def _endless(tokens: TokenBatch, rows: int, seed: int) -> Iterator[Tensor]:
    """Batches of `rows` sequences, again and again in new orders."""
    random = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while True:
        while len(order) < rows:
            order += torch.randperm(len(tokens), generator=random).tolist()
        yield tokens.ids[order[:rows]]
        order = order[rows:]


def _inverses(factors: Factors) -> Sequence[tuple[slice, Tensor, Tensor]]:
    """Of each group of rows the damped factors' inverses, the first divided by the scale."""
    found = []
    for rows, group in factors.row_groups():
        out, into = (
            torch.linalg.inv(H.double() + DAMPING * torch.eye(len(H), dtype=torch.float64, device=H.device)).float().cpu()
            for H in (group.H_out, group.H_in)
        )
        found.append((rows, out / group.scale, into))
    return found
