"""Tuning codes and scales under the KL of the whole model: `--tune end-to-end`.

Problem: rounding minimises a quadratic model of the KL, one linear at a time. Here all codes and scales move together, downhill in the KL
itself, from where rounding has ended:

    V = q + clip(W / s - q, -.49, .49),    W_hat = a s (round(clamp(V)) - z),    loss = KL(original || quantized) on calibration text

so that rounding `V` gives `q`, and codes near a boundary flip first. Gradients pass `round` as if it were not there. `V` takes steps of one
size, `-step sign(dV)`, that falls to 0, and needs no state of an optimiser; the factors `a` of the scales are Adam's. Every so often the KL
is measured on sequences that the steps have not seen; the best codes and scales, in the form in which they are stored, are the result, and
the start is among them: the held-out KL never rises.

Cost of a step: a forward pass of the original, a forward and backward pass of the quantized model, and some ten elementwise operations for
each weight. Memory: a second model, and `V` and its gradient, 8 bytes a weight.

Deliberately not here yet: grids of levels, blocks or tiles; one decoder block at a time; resuming. Reference: SignRound (Cheng et al. 2023,
arXiv 2309.05516) for steps by sign; the start and the loss are ours.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from roundel.evaluate import compare_models
from roundel.grids import Uniform, parse_scheme
from roundel.grids.asymmetric import Asymmetric
from roundel.grids.base import spread
from roundel.rounding.round import dequantized
from roundel.source import Source
from roundel.types import RoundedWeight, TokenBatch

__all__ = ["Tuned", "tune_end_to_end"]

STEP = 2e-3
"""First step of the latent codes, in units of the distance of two codes; and Adam's of the scales' factors."""

TOKENS = 4096
"""Of one step."""

CHECKS = 8
"""How often the held-out KL is measured."""

INSIDE = 0.49
"""Farthest that a latent code starts from its code."""


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """Tuned weights, and how the KL went."""

    rounded: dict[str, RoundedWeight]
    history: list[dict[str, float]]
    """`step`, `held_out_kl` and, after the start, `calibration_kl`, the mean over the steps since the last check; nats per token."""
    best_step: int


class _Latent(nn.Module):
    """A linear whose weight is what latent codes and factors of scales stand for."""

    def __init__(self, linear: nn.Linear, weight: RoundedWeight) -> None:
        super().__init__()
        grid = parse_scheme(weight.scheme)
        assert isinstance(grid, Uniform | Asymmetric)
        device = linear.weight.device
        self.bias, self.weight, self.grid = linear.bias, weight, grid
        self.low, self.high = grid.code_range
        self.scale = weight.scales["scale"].to(device, torch.float32)
        zero = weight.scales.get("zero_point")
        self.zero = None if zero is None else spread(zero.to(device, torch.float32), weight.shape)
        W = linear.weight.detach().float()
        W = W if weight.rotation is None else weight.rotation.rotate_weight(W)  # type: ignore[attr-defined]
        codes = weight.codes.to(device, torch.float32)
        units = W / spread(self.scale, weight.shape) + (0.0 if self.zero is None else self.zero)
        self.latent = nn.Parameter(codes + (units - codes).clamp(-INSIDE, INSIDE))
        self.factor = nn.Parameter(torch.ones_like(self.scale))

    def forward(self, x: Tensor) -> Tensor:
        inside = self.latent.clamp(self.low - INSIDE, self.high + INSIDE)
        codes = inside + (inside.round() - inside).detach()
        W_hat = (codes if self.zero is None else codes - self.zero) * spread(self.scale * self.factor, self.weight.shape)
        if self.weight.rotation is not None:
            W_hat = self.weight.rotation.restore_weight(W_hat)
        return nn.functional.linear(x, W_hat.to(x.dtype), self.bias)

    @torch.no_grad()
    def stored(self) -> RoundedWeight:
        """Codes and scales as they would be written."""
        codes = self.latent.round().clamp(self.low, self.high).to(torch.int8).cpu()
        old = self.weight.scales["scale"]
        scale = self.grid.stored("scale", (self.scale * self.factor).cpu(), old)
        return replace(self.weight, codes=codes, scales={**self.weight.scales, "scale": scale})


def tune_end_to_end(
    source: Source,
    rounded: Mapping[str, RoundedWeight],
    tokens: TokenBatch,
    unseen: TokenBatch,
    *,
    steps: int,
    seed: int,
    batch_size: int,
    advance: Callable[[int], None] = lambda _n: None,
) -> Tuned:
    """Tunes all codes and scales together.

    Args:
        source: The original.
        rounded: Where to start, by module.
        tokens: Calibration text; a step takes about `TOKENS` of it, in an order drawn by `seed`, again and again.
        unseen: Text to choose the best state by.
        steps: How many.
        seed: Of the order.
        batch_size: Sequences per pass of the held-out measurement.
        advance: Called with 1 after each step.
    """
    twin = copy.deepcopy(source.model)
    latents: dict[str, _Latent] = {}
    for parameter in twin.parameters():
        parameter.requires_grad_(False)
    for name, weight in rounded.items():
        parent, _, own = name.rpartition(".")
        latents[name] = _Latent(source.linears[name], weight)
        setattr(twin.get_submodule(parent), own, latents[name])
    measured = copy.deepcopy(source.model)

    def held_out(state: Mapping[str, RoundedWeight]) -> float:
        for name, weight in state.items():
            measured.get_submodule(name).weight.data.copy_(dequantized(weight))  # type: ignore[operator]
        return compare_models(measured, source.model, unseen, batch_size=batch_size).kl_mean

    best, best_step = dict(rounded), 0
    best_kl = held_out(best)
    history: list[dict[str, float]] = [{"step": 0, "held_out_kl": best_kl}]
    adam = torch.optim.Adam([latent.factor for latent in latents.values()], lr=STEP)
    rows = max(1, TOKENS // tokens.ids.shape[1])
    random = torch.Generator().manual_seed(seed)
    order: list[int] = []
    spent: list[float] = []
    device = next(twin.parameters()).device
    for step in range(1, steps + 1):
        left = 1 - (step - 1) / steps
        if len(order) < rows:
            order += torch.randperm(len(tokens), generator=random).tolist()
        ids, order = tokens.ids[order[:rows]].to(device), order[rows:]
        loss = _kl(twin, source.model, ids)
        loss.backward()
        spent.append(loss.item())
        with torch.no_grad():
            for latent in latents.values():
                gradient = latent.latent.grad
                assert gradient is not None
                latent.latent.sub_(STEP * left * gradient.sign())
                latent.latent.grad = None
        for group in adam.param_groups:
            group["lr"] = STEP * left
        adam.step()
        adam.zero_grad()
        advance(1)
        if step % max(1, steps // CHECKS) == 0 or step == steps:
            state = {name: latent.stored() for name, latent in latents.items()}
            kl = held_out(state)
            history.append({"step": step, "held_out_kl": kl, "calibration_kl": sum(spent) / len(spent)})
            spent.clear()
            if kl < best_kl:
                best, best_step, best_kl = state, step, kl
    return Tuned(rounded=best, history=history, best_step=best_step)


def _kl(model: nn.Module, original: nn.Module, ids: Tensor) -> Tensor:
    """`KL(original || model)`, nats per token."""
    with torch.no_grad():
        reference = original(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
    found = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
    loss: Tensor = (reference.exp() * (reference - found)).sum(-1).mean()
    return loss
