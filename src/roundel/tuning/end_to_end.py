"""All codes and scales of a model together, downhill in the KL of the whole model: `--tune end-to-end`.

Problem: rounding minimises a quadratic model of the KL, one linear at a time. Here everything moves at once, in the KL itself, from where
rounding has ended (`trained` says what moves, `steps` how):

    loss = KL(original || quantized) per token, on calibration text

Every so often the KL is measured on sequences that the steps have not seen; the best state, in the form in which it is stored, is the
result, and the start is among them: the held-out KL never rises.

Cost of a step: a forward pass of the original, unless its log-probabilities of all text fit into `CACHE` bytes, and a forward and backward
pass of the quantized model, of `TOKENS` tokens; a step of more is accumulated. Memory: a second model, 16 bytes for each trained weight,
and the activations of one pass: with `RECOMPUTED` bytes of weights or more only those between decoder layers, what is inside is computed
again.
Reference: SignRound (Cheng et al. 2023, arXiv 2309.05516) for latent codes; the start, the loss and the steps are ours.

Deliberately not here: several devices.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from roundel.evaluate import compare_models
from roundel.rounding.round import dequantized
from roundel.source import Source
from roundel.tuning.saved import Saved, kinds_of, packed, unpacked
from roundel.tuning.steps import Steps, shuffled
from roundel.tuning.trained import Trained, trained
from roundel.types import RoundedWeight, TokenBatch

__all__ = ["TOKENS", "Tuned", "load_dense", "put", "stored_values", "tune_end_to_end"]

TOKENS = 4096
"""Of one pass."""

CHECKS = 8
"""How often the held-out KL is measured, and the state is saved."""

CACHE = 1 << 30
"""Bytes of the original's log-probabilities that are kept, in float16."""

RECOMPUTED = 1 << 30
"""Bytes of weights from which on activations inside decoder layers are not kept."""


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """Tuned weights, and how the KL went."""

    rounded: dict[str, RoundedWeight]
    parameters: dict[str, Tensor] = field(default_factory=dict)
    """Other parameters of the model that have moved, by name, in their own type."""
    history: list[dict[str, Any]]
    best_step: int
    """0: the start."""
    held_out_kl: tuple[float, float]
    """Before and after, nats per token."""


def tune_end_to_end(
    source: Source,
    rounded: Mapping[str, RoundedWeight],
    tokens: TokenBatch,
    unseen: TokenBatch,
    *,
    steps: int,
    step_tokens: int,
    others: Mapping[str, torch.dtype],
    seed: int,
    batch_size: int,
    work: Path | None = None,
    advance: Callable[[int], None] = lambda _n: None,
) -> Tuned:
    """Tunes all codes and scales together.

    Args:
        source: The original.
        rounded: Where to start, by module.
        tokens: Calibration text; a step takes about `step_tokens` of it, in an order drawn by `seed`, again and again.
        unseen: Text to choose the best state by.
        steps: How many.
        step_tokens: Tokens of one step.
        others: Further parameters, such as norms, that move too, and the types in which they are stored.
        seed: Of the order.
        batch_size: Sequences per pass of the held-out measurement.
        work: Directory where the state is kept; what is there of the same job is gone on with.
        advance: Called with 1 after each step.

    Raises:
        StorageError: `work` holds another job's state, or cannot be written to.
    """
    twin = copy.deepcopy(source.model)
    for parameter in twin.parameters():
        parameter.requires_grad_(False)
    linears: dict[str, Trained] = {}
    for name, weight in rounded.items():
        linears[name] = trained(twin.get_submodule(name), weight)  # type: ignore[arg-type]
        put(twin, name, linears[name])
    small = {name: twin.get_parameter(name).requires_grad_(True) for name in others}
    if sum(parameter.nbytes for parameter in source.model.parameters()) >= RECOMPUTED:
        _recompute(twin)
    measured = copy.deepcopy(source.model)

    def held_out(state: Mapping[str, RoundedWeight], values: Mapping[str, Tensor]) -> float:
        load_dense(measured, state, values)
        return compare_models(measured, source.model, unseen, batch_size=batch_size).kl_mean

    rows = max(1, step_tokens // tokens.ids.shape[1])
    passes = max(1, TOKENS // tokens.ids.shape[1])
    optimiser = Steps(linears.values(), list(small.values()), steps, tokens=tokens.ids.numel())
    settings = {"tune": "end-to-end", "steps": steps, "rows": rows, "others": list(others), "seed": seed, "dtype": str(source.model.dtype)}
    saved = Saved.of(work, rounded, (tokens, unseen), settings)
    if (found := saved.load()) is not None:
        tensors, notes = found
        history, best_step = notes["history"], notes["best_step"]
        optimiser.restore(tensors, history[-1]["step"])
        best, moved = unpacked(tensors, kinds_of(rounded)), {name: tensors[f"best.{name}"] for name in small}
        advance(optimiser.taken)
    else:
        best, moved, best_step = dict(rounded), stored_values(small, others), 0
        history = [{"step": 0, "held_out_kl": held_out(best, moved)}]
    teacher = _Teacher(source.model, tokens)
    spent: list[float] = []
    while optimiser.taken < steps:
        chosen = shuffled(len(tokens), rows, optimiser.taken, seed)
        loss = 0.0
        for part in (chosen[start : start + passes] for start in range(0, rows, passes)):
            logits = twin(input_ids=teacher.ids(part), use_cache=False).logits
            share = _Divergence.apply(logits, teacher.log_probabilities(part)) * (len(part) / rows)  # type: ignore[no-untyped-call]
            share.backward()
            loss += share.item()
        spent.append(loss)
        optimiser.take()
        advance(1)
        if optimiser.taken % max(1, steps // CHECKS) == 0 or optimiser.taken == steps:
            state = {name: linear.stored() for name, linear in linears.items()}
            values = stored_values(small, others)
            kl = held_out(state, values)
            history.append({"step": optimiser.taken, "held_out_kl": kl, "calibration_kl": sum(spent) / len(spent)})
            spent.clear()
            if kl < min(row["held_out_kl"] for row in history[:-1]):
                best, moved, best_step = state, values, optimiser.taken
            held = {f"best.{name}": value for name, value in moved.items()}
            saved.save({**optimiser.tensors(), **packed(best), **held}, {"history": history, "best_step": best_step})
    changed = {name: value for name, value in moved.items() if best_step > 0}
    before, after = history[0]["held_out_kl"], min(row["held_out_kl"] for row in history)
    return Tuned(rounded=best, parameters=changed, history=history, best_step=best_step, held_out_kl=(before, after))


@torch.no_grad()
def load_dense(model: nn.Module, rounded: Mapping[str, RoundedWeight], others: Mapping[str, Tensor]) -> None:
    """Puts rounded weights, and other parameters, into a model of dense linears."""
    for name, weight in rounded.items():
        model.get_parameter(f"{name}.weight").copy_(dequantized(weight))
    for name, value in others.items():
        model.get_parameter(name).copy_(value)


def stored_values(parameters: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """As they would be written."""
    return {name: parameter.detach().to("cpu", dtypes[name], copy=True) for name, parameter in parameters.items()}


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """In the place of the module of that name."""
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)


def _recompute(model: nn.Module) -> None:
    """Lets each decoder layer forget what is inside and compute it again in the backward pass."""
    for layers in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
        for layer in layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


class _Teacher:
    """The original's log-probabilities of calibration text, in float16; computed once where all of them fit."""

    def __init__(self, model: nn.Module, tokens: TokenBatch) -> None:
        self.model, self.tokens = model, tokens
        self.device = next(model.parameters()).device
        vocabulary = model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
        self.keeps = 2 * tokens.ids.numel() * vocabulary <= CACHE
        self.kept: dict[int, Tensor] = {}

    def ids(self, rows: list[int]) -> Tensor:
        return self.tokens.ids[rows].to(self.device)

    @torch.no_grad()
    def log_probabilities(self, rows: list[int]) -> Tensor:
        missing = [row for row in rows if row not in self.kept]
        fresh: dict[int, Tensor] = {}
        for row in missing:  # one by one, so that the numbers do not depend on which rows are in a pass
            logits = self.model(input_ids=self.ids([row]), use_cache=False).logits[0]
            fresh[row] = logits.float().log_softmax(-1).half()
        if self.keeps:
            self.kept |= fresh
        known = self.kept if self.keeps else fresh
        return torch.stack([known[row] for row in rows])


class _Divergence(torch.autograd.Function):
    """Mean over tokens of `KL(original || quantized)`; keeps one matrix of the logits' size for its gradient, `softmax - p`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, reference: Tensor) -> Tensor:
        """`logits` and the original's log-probabilities, both `(sequences, tokens, vocabulary)`."""
        found, wanted = logits.float().log_softmax(-1), reference.float()
        p = wanted.exp()
        loss = torch.where(p > 0, p * (wanted - found), 0.0).sum() / logits.shape[:-1].numel()
        ctx.save_for_backward(found.exp_().sub_(p).div_(logits.shape[:-1].numel()).to(logits.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """The gradient of the logits."""
        (slope,) = ctx.saved_tensors
        return slope * gradients[0], None
