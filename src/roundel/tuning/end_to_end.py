"""All codes and scales of a model, and what is not quantized, together downhill in the KL of the whole model: `--tune end-to-end`.

Problem: rounding minimises a quadratic model of the KL, one linear at a time. Here everything moves at once, in the KL itself, from where
rounding has ended (`trained` says what moves, `steps` how):

    loss = KL(original || quantized) per token, on calibration text and on what the original would have said in its place (`teacher`)

Norms and the embedding, which is also the output head of many models, stay in 16 bits, so what they can make up for costs no bits.
Every so often the KL is measured on sequences that the steps have not seen; the best state, in the form in which it is stored, is the
result, and the start is among them: the held-out KL never rises.

Cost of a step: a forward pass of the original at most (`teacher`), and a forward and backward pass of the quantized model, both in fast
products (`products`), of up to `TOKENS` tokens; a step of more is accumulated. Memory: two more models, one to train and one to measure,
23 bytes for each trained weight, and the activations of one pass: with `RECOMPUTED` bytes of weights or more only those between decoder
layers, what is inside is computed again.
Reference: SignRound (Cheng et al. 2023, arXiv 2309.05516) for latent codes; the start, the loss and the steps are ours.

Of several processes each has some rows of the trained linears and of their moments (`sharded`), and takes some of each step's sequences;
the original, what is measured and what is not quantized are whole in each.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from roundel import processes
from roundel.artifacts.source import device_of, load_dense
from roundel.evaluate import compare_models
from roundel.linalg.fast import fast
from roundel.sweeps import Layers
from roundel.tuning.job import Job, Tuned, stored_values
from roundel.tuning.saved import kinds_of, others_of, packed, unpacked
from roundel.tuning.sharded import shard
from roundel.tuning.sharded import turns as own_turns
from roundel.tuning.steps import Steps, places, shuffled
from roundel.tuning.teacher import Teacher, descend, drawn_share
from roundel.tuning.trained import Trained, trained
from roundel.types import RoundedWeight

__all__ = ["TOKENS", "tune_end_to_end"]

TOKENS = 4096
"""Of one pass."""

CHECKS = 8
"""How often the held-out KL is measured, and the state is saved."""

FALL = 8 / 7
"""In how many times the steps their sizes fall to zero: the last eighth would be too small to change anything."""

RECOMPUTED = 1 << 30
"""Bytes of weights from which on activations inside decoder layers are not kept."""


def tune_end_to_end(job: Job) -> Tuned:
    """Tunes all codes and scales together.

    Raises:
        StorageError: `job.work` holds another job's state, or cannot be written to.
    """
    source, rounded, tokens, others, steps = job.source, job.rounded, job.tokens, job.others, job.steps
    twin = copy.deepcopy(source.model)
    for parameter in twin.parameters():
        parameter.requires_grad_(False)
    linears: dict[str, Trained] = {}
    for name, weight in rounded.items():
        linears[name] = trained(twin.get_submodule(name), weight)  # type: ignore[arg-type]
        twin.set_submodule(name, linears[name])
    load_dense(twin, {}, job.moved)
    shard(linears.values(), device_of(source.model))
    small = {name: twin.get_parameter(name).requires_grad_(True) for name in others}
    if sum(parameter.nbytes for parameter in source.model.parameters()) >= RECOMPUTED:
        _recompute(twin)
    measured = copy.deepcopy(source.model)

    def held_out(state: Mapping[str, RoundedWeight], values: Mapping[str, Tensor]) -> float:
        load_dense(measured, state, {**job.moved, **values})
        return compare_models(measured, source.model, job.unseen, batch_size=job.batch_size).kl_mean

    rows = max(1, job.step_tokens // tokens.ids.shape[1])
    passes = max(1, TOKENS // tokens.ids.shape[1])
    moving = [parameter for linear in linears.values() for parameter in (*linear.codes, *linear.scales)]
    share = drawn_share(tokens.ids.numel(), sum(parameter.numel() for parameter in moving))
    optimiser = Steps(linears.values(), list(small.values()), round(FALL * steps), tokens=tokens.ids.numel(), new_text=share > 0)
    saved = job.saved("end-to-end", rows, drawn=share)
    if (found := saved.load()) is not None:
        tensors, notes = found
        with saved.read():
            history, best_step = notes["history"], notes["best_step"]
            optimiser.restore(tensors, history[-1]["step"])
            best, moved = unpacked(tensors, kinds_of(rounded)), others_of(tensors, source.model)
        job.advance(optimiser.taken)
    else:
        best, moved, best_step = dict(rounded), stored_values(small, others), 0
        history = [{"step": 0, "held_out_kl": held_out(best, moved)}]
    layers = Layers(twin)
    teacher = Teacher(source.layers, tokens, share=share, turns=1 + steps * rows // len(tokens), seed=job.seed)
    forward = fast(layers.through, gradients=True, results=True)
    spent: list[float] = []
    while optimiser.taken < steps:
        chosen = shuffled(len(tokens), rows, optimiser.taken, job.seed)
        turns = [turn for turn, _ in places(len(tokens), rows, optimiser.taken)]
        uniforms = teacher.uniforms(rows, optimiser.taken)
        loss = torch.zeros(1, dtype=torch.float64)
        for part in own_turns(rows, passes):
            empty = part.start >= part.stop  # others still have text, and need all to take part
            some = slice(0, 1) if empty else part
            reference = teacher.batch(chosen[some], turns[some], uniforms[some])
            loss += descend(layers, forward(reference.ids), reference, tokens=math.inf if empty else rows * tokens.ids.shape[1])
        spent.append(float(processes.merged(loss)))
        optimiser.take()
        job.advance(1)
        if optimiser.taken % max(1, steps // CHECKS) == 0 or optimiser.taken == steps:
            state = {name: linear.stored() for name, linear in linears.items()}
            values = stored_values(small, others)
            kl = held_out(state, values)
            history.append({"step": optimiser.taken, "held_out_kl": kl, "calibration_kl": sum(spent) / len(spent)})
            spent.clear()
            if kl < min(row["held_out_kl"] for row in history[:-1]):
                best, moved, best_step = state, values, optimiser.taken
            saved.save(partial(_state, optimiser, best, moved), {"history": history, "best_step": best_step})
    changed = {**job.moved, **(moved if best_step > 0 else {})}
    before, after = history[0]["held_out_kl"], min(row["held_out_kl"] for row in history)
    return Tuned(rounded=best, parameters=changed, history=history, best_step=best_step, held_out_kl=(before, after))


def _state(optimiser: Steps, best: Mapping[str, RoundedWeight], moved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is needed to go on."""
    return {**optimiser.tensors(), **packed(best, moved)}


def _recompute(model: nn.Module) -> None:
    """Lets each decoder layer forget what is inside and compute it again in the backward pass."""
    for layers in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
        for layer in layers:
            layer.forward = partial(checkpoint, fast(layer.forward, gradients=True, results=True), use_reentrant=False)
