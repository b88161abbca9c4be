"""One decoder layer at a time, on the inputs that the quantized layers before it give: `--tune blocks`.

Problem: `end_to_end` trains a second model and holds the activations of all its layers. Here one decoder layer is trained at a time,
towards the output that the *original* layer has on the original's inputs, so that each layer also makes up for the errors before it:

    loss = 1/2 E[(y - y_hat)^T F (y - y_hat)],    F = E[g g^T] + damping,

with `g` the gradient of the Fisher's probes (`sweeps.labels`) at the layer's output: in nats per token, and blind to what the rest of
the model does not look at. The layer's best state on unseen sequences is taken, its start among them; at the end all layers are taken if
the KL of the whole model on those sequences has fallen, else none.

Cost: one forward and backward pass of the original for `F`; then for each layer two passes over all text and `steps` steps through this one
layer. Memory: one layer's parameters, moments and activations, and the inputs and outputs of one layer for all text in main memory, 8 bytes
for each token and channel. Reference: BRECQ (Li et al. 2021, arXiv 2102.05426), which weighs outputs of blocks by the Fisher's diagonal.

Not done: layers that hand on more than the hidden state; they are refused, and such a model can be tuned end to end.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from roundel.artifacts.source import load_dense, measured_kl
from roundel.curvature.collect import IN_MEMORY
from roundel.errors import ModelError, SchemeError
from roundel.sweeps import HiddenStore, Layers, gradient_visits
from roundel.tuning.end_to_end import TOKENS
from roundel.tuning.job import Job, Tuned, stored_values
from roundel.tuning.saved import kinds_of, others_of, packed, unpacked
from roundel.tuning.steps import Steps, shuffled
from roundel.tuning.trained import trained
from roundel.types import RoundedWeight, TokenBatch

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
    layers = layers_of(source.model)
    length = tokens.ids.shape[1]
    passes = min(max(1, min(job.step_tokens, TOKENS) // length), len(tokens), len(unseen))
    rows = max(1, job.step_tokens // length // passes) * passes
    saved = job.saved("blocks", rows)
    state, moved, history = dict(rounded), dict(job.moved), list[dict[str, Any]]()
    if (found := saved.load()) is not None:
        tensors, notes = found
        with saved.read():
            state |= unpacked(tensors, kinds_of(rounded))
            moved |= others_of(tensors, source.model)
            history = notes["history"]
    finished = {row["layer"] for row in history}
    linears = [[name for name in rounded if name.startswith(f"{layer}.")] for layer in layers.names]
    left = [layer for layer, names in zip(layers.names, linears, strict=True) if names and layer not in finished]
    fishers = _fishers(layers, left, tokens, seed=job.seed, passes=passes)
    text = _Text(layers=layers, ids=torch.cat([tokens.ids, unseen.ids]), train=len(tokens), passes=passes)
    wanted = text.outputs(lambda ids, _rows: layers.embed(ids))
    hidden = wanted
    if job.moved:  # the embedding, perhaps
        twin = copy.deepcopy(source.model)
        load_dense(twin, {}, job.moved)
        other = Layers(twin)
        hidden = text.outputs(lambda ids, _rows: other.embed(ids))
    for index, (layer, names) in enumerate(zip(layers.names, linears, strict=True)):
        wanted = text.after(index, wanted)
        if layer in left:
            task = _Task(layer=layer, index=index, text=text, hidden=hidden, wanted=wanted, fisher=fishers[layer], moved=job.moved)
            weights = {name: state[name] for name in names}
            small = {name: dtype for name, dtype in job.others.items() if name.startswith(f"{layer}.")}
            best, values, row = _tune_layer(task, weights, small, steps=steps, rows=rows, seed=job.seed, advance=job.advance)
            state |= best
            moved |= values
            history.append(row)
            saved.save(partial(packed, state, moved), {"history": history})
        elif names:
            job.advance(steps)
        hidden = text.after(index, hidden, _quantized(source.model, layer, {name: state[name] for name in names}, moved))
    before = measured_kl(source.model, rounded, job.moved, unseen, batch_size=job.batch_size)
    after = measured_kl(source.model, state, moved, unseen, batch_size=job.batch_size)
    if after < before:
        return Tuned(rounded=state, parameters=moved, history=history, best_step=steps, held_out_kl=(before, after))
    return Tuned(rounded=dict(rounded), parameters=dict(job.moved), history=history, best_step=0, held_out_kl=(before, before))


def layers_of(model: nn.Module) -> Layers:
    """The decoder layers.

    Raises:
        SchemeError: they cannot be run one by one.
    """
    try:
        layers = Layers(model)
    except ModelError as error:
        raise SchemeError(f"tuning by blocks needs one list of decoder layers: {error}; use --tune end-to-end") from error
    if len(layers) < len(layers.names):
        raise SchemeError("tuning by blocks needs layers that hand on the hidden state and nothing else: use --tune end-to-end")
    return layers


@dataclass(frozen=True, kw_only=True)
class _Text:
    """All sequences, of which the first `train` are to be learned from and the others unseen; `passes` go through a layer together."""

    layers: Layers
    ids: Int[Tensor, "sequences tokens"]
    train: int
    passes: int

    def run(self, index: int, hidden: Float[Tensor, "rows tokens d"], rows: Sequence[int], block: nn.Module | None = None) -> Tensor:
        """The output of a layer, or of what stands in its place, for some sequences."""
        device = self.layers.device
        return self.layers.run(index, self.ids[list(rows)].to(device), hidden.to(device), instead=block)

    @torch.no_grad()
    def outputs(self, run: Callable[[Tensor, list[int]], Tensor]) -> Float[Tensor, "sequences tokens d"]:
        """Of all sequences, in main memory; the last pass takes some of the one before again, so that all are of one size."""
        found, last = list[Tensor](), len(self.ids) - self.passes
        for start in range(0, len(self.ids), self.passes):
            rows = list(range(min(start, last), min(start, last) + self.passes))
            found.append(run(self.ids[rows].to(self.layers.device), rows)[start - rows[0] :].cpu())
        return torch.cat(found)

    def after(self, index: int, hidden: Float[Tensor, "sequences tokens d"], block: nn.Module | None = None) -> Tensor:
        """`hidden` after a layer, or what stands in its place."""
        return self.outputs(lambda _ids, rows: self.run(index, hidden[rows], rows, block))


def _fishers(layers: Layers, names: list[str], tokens: TokenBatch, *, seed: int, passes: int) -> dict[str, Tensor]:
    """`E[g g^T] + damping` at the outputs of layers, for each token."""
    sums: dict[str, Tensor] = {}
    modules: dict[str, Any] = {name: layers.model.get_submodule(name) for name in names}
    for batch in tokens.split(passes) if names else []:
        store = HiddenStore(memory=IN_MEMORY)  # of few sequences
        for visit in gradient_visits(layers, modules, batch, seed=seed, labels="probe", batch_size=passes, store=store):
            assert visit.g is not None
            g = visit.g.read(range(len(batch))).to(layers.device).flatten(0, 1).float()
            (name,) = visit.names
            sums[name] = sums[name] + g.T @ g if name in sums else g.T @ g
    count = tokens.ids.numel()
    return {
        name: total / count + DAMPING * total.trace() / count / len(total) * torch.eye(len(total)).to(total) for name, total in sums.items()
    }


@dataclass(frozen=True, kw_only=True)
class _Task:
    """What a layer is trained on."""

    layer: str
    index: int
    text: _Text
    hidden: Float[Tensor, "sequences tokens d"]
    wanted: Float[Tensor, "sequences tokens d"]
    fisher: Float[Tensor, "d d"]
    moved: Mapping[str, Tensor]

    def loss(self, block: nn.Module, rows: list[int]) -> Tensor:
        output = self.text.run(self.index, self.hidden[rows], rows, block)
        error = (output - self.wanted[rows].to(self.fisher.device)).float()
        return 0.5 * ((error @ self.fisher) * error).sum(-1).mean()

    @torch.no_grad()
    def unseen_loss(self, rounded: Mapping[str, RoundedWeight], others: Mapping[str, Tensor]) -> float:
        block, passes = _quantized(self.text.layers.model, self.layer, rounded, others), self.text.passes
        first = range(self.text.train, len(self.hidden) - passes + 1, passes)
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
    prefix, passes, train = f"{task.layer}.", task.text.passes, task.text.train
    block = copy.deepcopy(task.text.layers.model.get_submodule(task.layer)).requires_grad_(False)
    linears = {name: trained(block.get_submodule(name.removeprefix(prefix)), weight) for name, weight in rounded.items()}  # type: ignore[arg-type]
    for name, linear in linears.items():
        block.set_submodule(name.removeprefix(prefix), linear)
    before = {name: value for name, value in task.moved.items() if name.startswith(prefix)}
    load_dense(block, {}, {name.removeprefix(prefix): value for name, value in before.items()})
    small = {name: block.get_parameter(name.removeprefix(prefix)).requires_grad_(True) for name in others}
    optimiser = Steps(linears.values(), list(small.values()), steps, tokens=train * task.hidden.shape[1])
    best, moved = dict(rounded), before
    row = {"layer": task.layer, "best_step": 0, "checks": [{"step": 0, "loss": task.unseen_loss(best, moved)}]}
    spent: list[float] = []
    while optimiser.taken < steps:
        chosen = shuffled(train, rows, optimiser.taken, seed)
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
