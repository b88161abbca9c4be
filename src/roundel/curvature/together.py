"""Several estimators over one gradient stream: each pass is one forward and backward pass for all that still need it.

Every estimator sees the same sequences, labels and gradients as it would alone, in the same order, and gets the same sums. An estimator
that leaves sequences out to choose by (`Estimator.held_out`) does not see the last ones, and one with a pilot (`Estimator.pilot`) sees the
first ones only in its first pass. What nobody needs in a pass does not go through the model.

Cost: as many passes as the longest estimator needs, and the sums of all. `seconds` of each is what it would have taken alone: its own
sums plus its share of each pass, by sequences; a Gram matrix of inputs that two estimators need is formed for each. Memory: the sums of
all.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from roundel.curvature.fisher import backward
from roundel.curvature.sketches import Estimator, Sketch
from roundel.curvature.tap import tapped
from roundel.types import KroneckerFactors, LayerGrad, LayerInput, TokenBatch

__all__ = ["Measured", "collect_together", "segments"]


@dataclass
class Measured:
    """What one estimator has collected."""

    sketches: dict[str, Sketch] = field(default_factory=dict)
    """The sums of each linear in the last pass."""
    passes: int = 0
    """How often it has seen each sequence that is not left out."""
    seconds: float = 0.0
    """As if it had run alone."""
    state_bytes: int = 0
    """Of sums and of what goes from pass to pass, all linears together, at their largest."""


def segments(tokens: TokenBatch, estimators: Iterable[Estimator]) -> list[TokenBatch]:
    """`tokens`, cut where an estimator's pilot ends or where it stops; batches are made within each part."""
    cuts = {0, len(tokens)}
    for estimator in estimators:
        end = len(tokens) - estimator.held_out(len(tokens))
        cuts |= {end, estimator.pilot(end)}
    return [tokens[start:stop] for start, stop in itertools.pairwise(sorted(cuts))]


def collect_together(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    tokens: TokenBatch,
    estimators: Mapping[str, Estimator],
    *,
    seed: int,
    batch_size: int,
    labels: str = "sampled",
    advance: Callable[[int], None] = lambda _sequences: None,
) -> dict[str, Measured]:
    """What `collect` gives for each estimator, by label.

    Args:
        model: As for `collect`.
        linears: As for `collect`.
        tokens: All sequences; those to choose by come last.
        estimators: By label.
        seed: As for `collect`.
        batch_size: As for `collect`; batches do not cross the point where an estimator stops, so it must be safe for each of `segments`.
        labels: As for `collect`.
        advance: Called with the number of sequences done; in all `len(tokens)` times the largest number of passes, or less if all converge.
    """
    device = next(model.parameters()).device
    ends = {label: len(tokens) - estimator.held_out(len(tokens)) for label, estimator in estimators.items()}
    batches = [batch for part in segments(tokens, estimators.values()) for batch in part.split(batch_size)]
    found = {label: Measured() for label in estimators}
    previous: dict[str, dict[str, KroneckerFactors]] = {label: {} for label in estimators}
    active, seen = dict(estimators), dict.fromkeys(estimators, 0)
    index = 0
    while active:
        for label, estimator in active.items():
            found[label].sketches = {
                name: estimator.sketch(linear.out_features, linear.in_features, device, index=index, previous=previous[label].get(name))
                for name, linear in linears.items()
            }
        parts = {label: (found[label].sketches, _rows(estimator, ends[label], index)) for label, estimator in active.items()}
        own = _one_pass(model, linears, batches, parts, seed, labels, advance)
        for label, estimator in list(active.items()):
            measured = found[label]
            for sketch in measured.sketches.values():
                sketch.finish()
            seen[label] += len(parts[label][1])
            measured.passes = seen[label] // ends[label]
            measured.seconds += own[label]
            measured.state_bytes = max(measured.state_bytes, _bytes(measured.sketches, previous[label]))
            last = index + 1 == estimator.passes or all(estimator.converged(sketch) for sketch in measured.sketches.values())
            if last:
                del active[label], previous[label]
            else:
                factors = {name: sketch.factors() for name, sketch in measured.sketches.items()}
                previous[label] = {name: kept for name, kept in factors.items() if isinstance(kept, KroneckerFactors)}
        index += 1
    return found


def _rows(estimator: Estimator, end: int, index: int) -> range:
    """Which of the first `end` sequences an estimator sees in a pass."""
    pilot = estimator.pilot(end)
    return range(pilot or end) if index == 0 else range(pilot, end)


def _one_pass(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    batches: list[TokenBatch],
    parts: Mapping[str, tuple[dict[str, Sketch], range]],
    seed: int,
    labels: str,
    advance: Callable[[int], None],
) -> dict[str, float]:
    """Feeds all sketches; returns the seconds that each label would have taken alone."""
    device = next(model.parameters()).device
    own = dict.fromkeys(parts, 0.0)
    inputs: WeakKeyDictionary[LayerInput, dict[str, LayerInput]] = WeakKeyDictionary()
    done = ran = 0

    def consume(name: str, grad: LayerGrad) -> None:
        copies = inputs.setdefault(grad.input, {})
        for label, (sketches, rows) in parts.items():
            if done in rows:
                began = _now(device)
                # an input of its own: else the first to ask would pay for the Gram matrices of all
                input = copies.setdefault(label, LayerInput(grad.input.x))
                sketches[name].update(LayerGrad(input=input, g=grad.g))
                own[label] += _now(device) - began

    began = _now(device)
    with tapped(model, linears, consume):
        for batch in batches:
            if any(done in rows for _, rows in parts.values()):
                backward(model, batch, seed, labels, device=device)
                ran += len(batch)
            done += len(batch)
            advance(len(batch))
    shared = _now(device) - began - sum(own.values())
    return {label: own[label] + shared * len(rows) / ran for label, (_, rows) in parts.items()}


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _bytes(sketches: Mapping[str, Sketch], previous: Mapping[str, KroneckerFactors]) -> int:
    tensors: list[Tensor] = [total for sketch in sketches.values() for total in sketch.sums.values()]
    for factors in previous.values():
        tensors += [factors.H_out, factors.H_in, *factors.carry.values()]
    distinct = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(distinct.values())
