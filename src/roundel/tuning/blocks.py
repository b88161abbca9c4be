"""One decoder layer at a time, on the inputs that the quantized layers before it give: `--tune blocks`.

Problem: `end_to_end` trains a second model and holds the activations of all its layers. Here one decoder layer is trained at a time,
towards the output that the *original* layer has on the original's inputs, so that each layer also makes up for the errors before it:

    loss = 1/2 E[(y - y_hat)^T F (y - y_hat)],    F = E[g g^T] + damping,

with `g` the gradient of the Fisher's probes (`curvature.fisher`) at the layer's output: in nats per token, and blind to what the rest of
the model does not look at. The layer's best state on unseen sequences is taken, its start among them; at the end all layers are taken if
the KL of the whole model on those sequences has fallen, else none.

Cost: one forward and backward pass of the original for `F`; then for each layer two passes over all text and `steps` steps through this one
layer. Memory: one layer's parameters, moments and activations, and the inputs and outputs of one layer for all text in main memory, 8 bytes
for each token and channel. Reference: BRECQ (Li et al. 2021, arXiv 2102.05426), which weighs outputs of blocks by the Fisher's diagonal.

Not done: layers that get other inputs for each sequence than the hidden state; they are refused, and such a model can be tuned end to end.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from roundel.artifacts.source import load_dense, measured_kl
from roundel.curvature.fisher import backward
from roundel.curvature.tap import tapped
from roundel.errors import SchemeError
from roundel.tuning.end_to_end import TOKENS
from roundel.tuning.job import Job, Tuned, stored_values
from roundel.tuning.saved import kinds_of, others_of, packed, unpacked
from roundel.tuning.steps import Steps, shuffled
from roundel.tuning.trained import put, trained
from roundel.types import LayerGrad, RoundedWeight, TokenBatch

__all__ = ["layers_of", "tune_blocks"]

DAMPING = 0.1
"""Added to the Fisher's diagonal, relative to its mean."""

CHECKS = 4
"""How often a layer's loss on unseen sequences is measured."""


def tune_blocks(job: Job) -> Tuned:
    """Tunes decoder layer after decoder layer; linears outside of them stay as they are.

    Raises:
        SchemeError: the model's layers cannot be run by themselves.
        StorageError: `job.work` holds another job's state, or cannot be written to.
    """
    source, rounded, tokens, unseen, steps = job.source, job.rounded, job.tokens, job.unseen, job.steps
    layers = layers_of(source.model, rounded)
    length = tokens.ids.shape[1]
    passes = min(max(1, min(job.step_tokens, TOKENS) // length), len(tokens), len(unseen))
    rows = max(1, job.step_tokens // length // passes) * passes
    saved = job.saved("blocks", rows)
    state, moved, history = dict(rounded), dict(job.moved), list[dict[str, Any]]()
    if (found := saved.load()) is not None:
        tensors, notes = found
        state |= unpacked(tensors, kinds_of(rounded))
        moved |= others_of(tensors)
        history = notes["history"]
    finished = {row["layer"] for row in history}
    left = [layer for layer, names in layers.items() if names and layer not in finished]
    fishers = _fishers(source.model, left, tokens, seed=job.seed, passes=passes)
    everything = torch.cat([tokens.ids, unseen.ids])
    wanted, _ = _calls(source.model, next(iter(layers)), everything, passes)
    hidden = wanted.clone()
    if job.moved:  # the embedding, perhaps
        twin = copy.deepcopy(source.model)
        load_dense(twin, {}, job.moved)
        hidden, _ = _calls(twin, next(iter(layers)), everything, passes)
    for layer, names in layers.items():
        original = source.model.get_submodule(layer)
        _, call = _calls(source.model, layer, everything[: 2 * passes], passes)
        wanted = call.outputs(original, wanted)
        if layer in left:
            task = _Task(
                layer=layer,
                model=source.model,
                hidden=hidden,
                wanted=wanted,
                fisher=fishers[layer],
                call=call,
                train=len(tokens),
                moved=job.moved,
            )
            weights = {name: state[name] for name in names}
            small = {name: dtype for name, dtype in job.others.items() if name.startswith(f"{layer}.")}
            best, values, row = _tune_layer(task, weights, small, steps=steps, rows=rows, seed=job.seed, advance=job.advance)
            state |= best
            moved |= values
            history.append(row)
            saved.save(partial(packed, state, moved), {"history": history})
        elif names:
            job.advance(steps)
        hidden = call.outputs(_quantized(source.model, layer, {name: state[name] for name in names}, moved), hidden)
    before = measured_kl(source.model, rounded, job.moved, unseen, batch_size=job.batch_size)
    after = measured_kl(source.model, state, moved, unseen, batch_size=job.batch_size)
    if after < before:
        return Tuned(rounded=state, parameters=moved, history=history, best_step=steps, held_out_kl=(before, after))
    return Tuned(rounded=dict(rounded), parameters=dict(job.moved), history=history, best_step=0, held_out_kl=(before, before))


def layers_of(model: nn.Module, names: Mapping[str, RoundedWeight]) -> dict[str, list[str]]:
    """All layers of the list that the linears are in, in order, and which linears each has; linears outside are left out.

    Raises:
        SchemeError: the linears are in none, or in several lists.
    """
    outer = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outer = [name for name in outer if not any(name.startswith(f"{other}.") for other in outer)]
    used = [name for name in outer if any(linear.startswith(f"{name}.") for linear in names)]
    if len(used) != 1:
        raise SchemeError(f"tuning by blocks needs one list of decoder layers; this model has {len(used)}: use --tune end-to-end")
    layers = model.get_submodule(used[0])
    assert isinstance(layers, nn.ModuleList)
    paths = [f"{used[0]}.{index}" for index in range(len(layers))]
    return {path: [name for name in names if name.startswith(f"{path}.")] for path in paths}


@dataclass(frozen=True, kw_only=True)
class _Call:
    """How the model calls one layer, but for the hidden state of `passes` sequences."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    passes: int

    def __call__(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        found = layer(hidden, *self.args, **self.kwargs)
        output: Tensor = found[0] if isinstance(found, tuple) else found
        return output

    @torch.no_grad()
    def outputs(self, layer: nn.Module, hidden: Float[Tensor, "sequences tokens d"]) -> Float[Tensor, "sequences tokens d"]:
        """Of all sequences, in main memory; the last pass takes some of the one before again, so that all are of one size."""
        device = next(layer.parameters()).device
        outputs = torch.empty_like(hidden)
        for start in range(0, len(hidden), self.passes):
            part = slice(min(start, len(hidden) - self.passes), min(start, len(hidden) - self.passes) + self.passes)
            outputs[part] = self(layer, hidden[part].to(device)).cpu()
        return outputs


class _StopError(Exception):
    """Ends a forward pass."""


@torch.no_grad()
def _calls(model: nn.Module, layer: str, ids: Tensor, passes: int) -> tuple[Tensor, _Call]:
    """The hidden states before a layer, and how it is called.

    Raises:
        SchemeError: it is called in another way for other text.
    """
    seen: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = []

    def catch(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        seen.append((args[0] if args else kwargs["hidden_states"], args[1:], others))
        raise _StopError

    device = next(model.parameters()).device
    hidden = None
    handle = model.get_submodule(layer).register_forward_pre_hook(catch, with_kwargs=True)
    try:
        for start in range(0, len(ids), passes):
            first = min(start, len(ids) - passes)
            seen.clear()
            try:
                model(input_ids=ids[first : first + passes].to(device), use_cache=False)
            except _StopError:
                state, args, kwargs = seen[0]
            if hidden is None:
                hidden, call = torch.empty(len(ids), *state.shape[1:], dtype=state.dtype), _Call(args=args, kwargs=kwargs, passes=passes)
            elif not _same((args, kwargs), (call.args, call.kwargs)):
                raise SchemeError(f"{layer} gets other inputs for each text than the hidden state: use --tune end-to-end")
            hidden[first : first + passes] = state.cpu()
    finally:
        handle.remove()
    assert hidden is not None
    return hidden, call


def _same(first: Any, second: Any) -> bool:
    """Whether arguments are equal, tensors by their values."""
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and torch.equal(first, second)
    if isinstance(first, list | tuple):
        return isinstance(second, list | tuple) and len(first) == len(second) and all(map(_same, first, second))
    if isinstance(first, dict):
        return isinstance(second, dict) and first.keys() == second.keys() and all(_same(first[key], second[key]) for key in first)
    return first is second or (type(first) is type(second) and (not isinstance(first, int | float | str) or first == second))


def _fishers(model: nn.Module, layers: list[str], tokens: TokenBatch, *, seed: int, passes: int) -> dict[str, Tensor]:
    """`E[g g^T] + damping` at the outputs of layers, for each token."""
    sums: dict[str, Tensor] = {}

    def add(name: str, found: LayerGrad) -> None:
        g = found.g.flatten(0, 1).float()
        sums[name] = sums[name] + g.T @ g if name in sums else g.T @ g

    modules = {name: model.get_submodule(name) for name in layers}
    if layers:
        with tapped(model, modules, add):  # type: ignore[arg-type]  # they only need to have a tensor for input and output
            for batch in tokens.split(passes):
                backward(model, batch, seed, "probe", device=next(model.parameters()).device)
    count = tokens.ids.numel()
    return {
        name: total / count + DAMPING * total.trace() / count / len(total) * torch.eye(len(total)).to(total) for name, total in sums.items()
    }


@dataclass(frozen=True, kw_only=True)
class _Task:
    """What a layer is trained on: the first `train` sequences; the others are unseen."""

    layer: str
    model: nn.Module
    hidden: Float[Tensor, "sequences tokens d"]
    wanted: Float[Tensor, "sequences tokens d"]
    fisher: Float[Tensor, "d d"]
    call: _Call
    train: int
    moved: Mapping[str, Tensor]

    def loss(self, block: nn.Module, rows: list[int]) -> Tensor:
        error = (self.call(block, self.hidden[rows].to(self.fisher.device)) - self.wanted[rows].to(self.fisher.device)).float()
        return 0.5 * ((error @ self.fisher) * error).sum(-1).mean()

    @torch.no_grad()
    def unseen_loss(self, rounded: Mapping[str, RoundedWeight], others: Mapping[str, Tensor]) -> float:
        block, passes = _quantized(self.model, self.layer, rounded, others), self.call.passes
        first = range(self.train, len(self.hidden) - passes + 1, passes)
        return sum(self.loss(block, list(range(start, start + passes))).item() for start in first) / len(first)


def _tune_layer(
    task: _Task,
    rounded: Mapping[str, RoundedWeight],
    others: Mapping[str, torch.dtype],
    *,
    steps: int,
    rows: int,
    seed: int,
    advance: Callable[[int], None],
) -> tuple[dict[str, RoundedWeight], dict[str, Tensor], dict[str, Any]]:
    """The best weights of one layer and its other parameters, if they have moved, and the row of the history."""
    prefix, passes = f"{task.layer}.", task.call.passes
    block = copy.deepcopy(task.model.get_submodule(task.layer)).requires_grad_(False)
    linears = {name: trained(block.get_submodule(name.removeprefix(prefix)), weight) for name, weight in rounded.items()}  # type: ignore[arg-type]
    for name, linear in linears.items():
        put(block, name.removeprefix(prefix), linear)
    before = {name: value for name, value in task.moved.items() if name.startswith(prefix)}
    load_dense(block, {}, {name.removeprefix(prefix): value for name, value in before.items()})
    small = {name: block.get_parameter(name.removeprefix(prefix)).requires_grad_(True) for name in others}
    optimiser = Steps(linears.values(), list(small.values()), steps, tokens=task.train * task.hidden.shape[1])
    best, moved = dict(rounded), before
    row = {"layer": task.layer, "best_step": 0, "checks": [{"step": 0, "loss": task.unseen_loss(best, moved)}]}
    spent: list[float] = []
    while optimiser.taken < steps:
        chosen = shuffled(task.train, rows, optimiser.taken, seed)
        for start in range(0, rows, passes):
            share = task.loss(block, chosen[start : start + passes]) * (passes / rows)
            share.backward()
            spent.append(share.item() * rows / passes)
        optimiser.take()
        advance(1)
        if optimiser.taken % max(1, steps // CHECKS) == 0 or optimiser.taken == steps:
            state = {name: linear.stored() for name, linear in linears.items()}
            values = {**before, **stored_values(small, others)}
            loss = task.unseen_loss(state, values)
            if loss < min(check["loss"] for check in row["checks"]):  # type: ignore[attr-defined]
                best, moved, row["best_step"] = state, values, optimiser.taken
            row["checks"].append({"step": optimiser.taken, "loss": loss, "calibration_loss": sum(spent) / len(spent)})  # type: ignore[attr-defined]
            spent.clear()
    return best, moved, row


def _quantized(model: nn.Module, layer: str, rounded: Mapping[str, RoundedWeight], others: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a layer with dense rounded weights and its other parameters that have moved."""
    block, prefix = copy.deepcopy(model.get_submodule(layer)).requires_grad_(False), f"{layer}."
    own = {name.removeprefix(prefix): value for name, value in others.items() if name.startswith(prefix)}
    load_dense(block, {name.removeprefix(prefix): weight for name, weight in rounded.items()}, own)
    return block
