"""Running an estimator over calibration data, and predicting the KL of an error from gradients that the factors have not seen.

Each sequence's contribution is formed by itself, with products of the same shape, and added in order. The forward and
backward pass is shared by a batch; whether this machine's kernels give a batch the same bits as its sequences one by
one is *checked* on the first batch, and if they do not, sequences go one by one. So the batch size changes speed and
memory, never a result.

Cost: one forward pass and one backward pass to the inputs (no weight gradients) for each of the estimator's passes, plus its sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from roundel.curvature.fisher import backward
from roundel.curvature.sketches import Estimator, Sketch
from roundel.curvature.tap import tapped
from roundel.types import Factors, KroneckerFactors, LayerGrad, TokenBatch

__all__ = ["Collection", "Prediction", "collect", "inner_products", "passes", "pilot_first", "predicted_kl", "safe_batch_size"]

Advance = Callable[[int], None]


def _ignore(_sequences: int) -> None:
    pass


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@dataclass
class Collection:
    """A collection under way: the sums of pass `index` over the first `done` sequences, and the factors of the pass before."""

    index: int = 0
    done: int = 0
    sketches: dict[str, Sketch] = field(default_factory=dict)
    previous: dict[str, KroneckerFactors] = field(default_factory=dict)

    def factors(self) -> dict[str, Factors]:
        """Factors from the sums so far."""
        return {name: sketch.factors() for name, sketch in self.sketches.items()}


def collect(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    tokens: TokenBatch,
    estimator: Estimator,
    *,
    seed: int,
    batch_size: int,
    labels: str = "sampled",
    parts: Sequence[TokenBatch] | None = None,
    advance: Advance = _ignore,
    start: Collection | None = None,
    each_batch: Callable[[Collection], None] = lambda _state: None,
    each_pass: Callable[[Collection], None] = lambda _state: None,
) -> Collection:
    """Sums of every linear over all sequences, in as many passes as the estimator needs.

    Args:
        model: A causal language model in evaluation mode.
        linears: The modules to measure, by name.
        tokens: Calibration sequences.
        estimator: Which curvature.
        seed: Seeds the labels, together with each sequence's id; the same in every pass.
        batch_size: Sequences per forward pass (see `safe_batch_size`).
        labels: What is sent back from the logits (see `fisher`).
        parts: The sequences of each pass, where they are not `passes(estimator, tokens)`.
        advance: Called with the number of sequences done after each batch.
        start: Where an interrupted collection stopped; it is continued in place.
        each_batch: Called with the state after each batch, to save it.
        each_pass: Called with the state when a pass has seen all of `tokens`, before its factors are used: to add other processes' sums.
    """
    device = _device(model)
    state = start or Collection()
    parts = passes(estimator, tokens) if parts is None else parts
    if start is not None:
        advance(sum(map(len, parts[: start.index])) + start.done)
    while True:
        for name, linear in linears.items():
            if name not in state.sketches:
                state.sketches[name] = estimator.sketch(
                    linear.out_features, linear.in_features, device, index=state.index, previous=state.previous.get(name)
                )
        with tapped(model, linears, lambda name, grad: state.sketches[name].update(grad)):
            for batch in parts[state.index][state.done :].split(batch_size):
                backward(model, batch, seed, labels, device=device)
                state.done += len(batch)
                each_batch(state)
                advance(len(batch))
        for sketch in state.sketches.values():
            sketch.finish()
        each_pass(state)
        left = estimator.passes - 1 - state.index
        if left and all(estimator.converged(sketch) for sketch in state.sketches.values()):
            # the passes that are left would change nothing: they count as done
            advance(sum(map(len, parts[state.index + 1 :])))
            state.index += left
        if state.index + 1 == estimator.passes:
            return state
        state.previous = {name: kept for name, kept in state.factors().items() if isinstance(kept, KroneckerFactors)}
        state.sketches = {}
        state.index, state.done = state.index + 1, 0


def passes(estimator: Estimator, tokens: TokenBatch) -> list[TokenBatch]:
    """The sequences of each pass: all of them, or the estimator's pilot in pass 0 and the others in each later one."""
    pilot = estimator.pilot(len(tokens))
    if not pilot:
        return [tokens] * estimator.passes
    return [tokens[:pilot], *[tokens[pilot:]] * (estimator.passes - 1)]


def pilot_first(estimator: Estimator, tokens: TokenBatch) -> TokenBatch:
    """The same sequences with the estimator's pilot, which is spread over them evenly, before the others."""
    count = estimator.pilot(len(tokens))
    chosen = [row * len(tokens) // count for row in range(count)]
    return tokens.select([*chosen, *sorted(set(range(len(tokens))) - set(chosen))])


def safe_batch_size(
    model: nn.Module, linears: Mapping[str, nn.Linear], tokens: TokenBatch, *, seed: int, batch_size: int, labels: str = "sampled"
) -> int:
    """`batch_size`, if the first batch gives every linear the same bits as its sequences one by one; else 1.

    The last, smaller batch of the data is checked too.
    """
    batch_size = min(batch_size, len(tokens))
    if batch_size == 1:
        return 1
    sizes = {batch_size, len(tokens) % batch_size} - {0, 1}

    def digests(size: int, of: TokenBatch) -> dict[tuple[str, int], tuple[int, int]]:
        found: dict[tuple[str, int], tuple[int, int]] = {}
        offset = 0

        def consume(name: str, grad: LayerGrad) -> None:
            for sequence in grad.sequences():
                found[name, offset + sequence] = (_bits(grad.input.x[sequence]), _bits(grad.g[sequence]))

        with tapped(model, linears, consume):
            for batch in of.split(size):
                backward(model, batch, seed, labels, device=_device(model))
                offset += len(batch)
        return found

    single = digests(1, tokens[:batch_size])
    for size in sizes:
        together = digests(size, tokens[:size])
        if any(single[key] != bits for key, bits in together.items()):
            return 1
    return batch_size


def _bits(values: Tensor) -> int:
    """A checksum of the exact bits."""
    words = values.contiguous().view(torch.int32 if values.element_size() == 4 else torch.int16).flatten().long()
    weights = torch.arange(words.numel(), device=words.device) % 65521 + 1
    return int((words * weights).sum())


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """KL of given errors, to second order, in nats per token: `1/2 E_s <G_s, E>^2` over sequences, divided by their tokens."""

    layers: dict[str, float]
    """Each linear's own."""
    total: float
    """The sum over linears, as if their errors did not interact."""
    total_stderr: float
    joint: float
    """With all interactions, `1/2 E_s (sum_l <G_s,l, E_l>)^2`: unbiased, but noisier."""
    joint_stderr: float


def inner_products(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    errors: Mapping[str, Callable[[str], Tensor]],
    tokens: TokenBatch,
    *,
    seed: int,
    batch_size: int,
    labels: str = "sampled",
    advance: Advance = _ignore,
    sketches: Mapping[str, Sketch] | None = None,
) -> dict[str, dict[str, Float[Tensor, " sequences"]]]:
    """`<G_s, E>` of every sequence, for each label of `errors` and each linear: `1/2 <G_s, E>^2` divided by the tokens predicts a KL.

    The gradients are added to `sketches`, which so far have not seen these sequences.

    The KL's Hessian is the Fisher of the model's own labels, whatever the factors were collected with: `labels="data"` counts as "sampled".
    Cost: one forward and one backward pass for all, `2 d_in d_out` flops per token and linear for `G_s`, as many per sequence for each `E`.
    Memory: the errors of one linear at a time, and one `G_s`.
    """
    inner = {label: {name: torch.zeros(len(tokens), dtype=torch.float64) for name in linears} for label in errors}
    start = 0

    def consume(name: str, grad: LayerGrad) -> None:
        if sketches and name in sketches:
            sketches[name].update(grad)
        E = {label: error(name).to(grad.g.device) for label, error in errors.items()}
        for sequence in grad.sequences():
            G = grad.weight_gradient(sequence)  # once for all errors
            for label in errors:
                inner[label][name][start + sequence] = (G * E[label]).sum(dtype=torch.float64).item()

    with tapped(model, linears, consume):
        for batch in tokens.split(batch_size):
            backward(model, batch, seed, "sampled" if labels == "data" else labels, device=_device(model))
            start += len(batch)
            advance(len(batch))
    return inner


def predicted_kl(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    error: Callable[[str], Tensor],
    tokens: TokenBatch,
    *,
    seed: int,
    batch_size: int,
    labels: str = "sampled",
    advance: Advance = _ignore,
) -> Prediction:
    """Predicts the KL of the errors `error(name) = W - W_hat` from gradients of `tokens`, which should be held out from the factors.

    Labels and cost: `inner_products`.
    """
    errors = {"": error}
    inner = inner_products(model, linears, errors, tokens, seed=seed, batch_size=batch_size, labels=labels, advance=advance)[""]
    length = tokens.ids.shape[1]
    per_sequence = {name: 0.5 * values.square() / length for name, values in inner.items()}
    separate = sum(per_sequence.values(), torch.zeros(len(tokens), dtype=torch.float64))
    together = 0.5 * sum(inner.values(), torch.zeros(len(tokens), dtype=torch.float64)).square() / length
    return Prediction(
        layers={name: values.mean().item() for name, values in per_sequence.items()},
        total=separate.mean().item(),
        total_stderr=_stderr(separate),
        joint=together.mean().item(),
        joint_stderr=_stderr(together),
    )


def _stderr(values: Tensor) -> float:
    return values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
