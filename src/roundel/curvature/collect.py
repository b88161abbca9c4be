"""Sums of estimators over calibration data, and the KL that gradients which the factors have not seen predict for an error.

Both are visitors of the backward sweep (`sweeps.gradient_visits`): the sums of the linears of one group of decoder layers are in memory at
a time, whatever the number of passes that an estimator makes, and all of them see the same gradients.

Each sequence's contribution is formed by itself, with products of the same shape, and added in order. The forward and
backward pass is shared by a batch; whether this machine's kernels give a batch the same bits as its sequences one by
one is *checked* (`sweeps.safe_batch_size`), and if they do not, sequences go one by one. So the batch size changes speed and
memory, never a result.

Sums are those of runs of sequences, added up in their order, which several processes can share (`roundel.processes`).

Cost: one forward pass for all, one forward and backward pass to the inputs (no weight gradients) for each of the estimators' passes, and
their sums, of which a second set is added up.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from roundel import processes
from roundel.curvature.sketches import Estimator, Sketch
from roundel.linalg.fast import fast_products
from roundel.sweeps import HiddenStore, Layers, Visit, gradient_visits
from roundel.sweeps.gradients import batches
from roundel.types import Factors, KroneckerFactors, LayerGrad, TokenBatch

__all__ = [
    "Measured",
    "Prediction",
    "collect",
    "collect_together",
    "collect_visit",
    "factors_of",
    "inner_products",
    "inner_products_of",
    "passes",
    "pilot_first",
    "predicted_kl",
    "prediction_of",
    "runs_of",
]

Advance = Callable[[int], None]

IN_MEMORY = 1 << 40


def _ignore(_sequences: int) -> None:
    pass


@dataclass
class Measured:
    """What one estimator has collected, of all linears or of those of one visit."""

    sketches: dict[str, Sketch] = field(default_factory=dict)
    """The sums of each linear in the last pass."""
    previous: dict[str, KroneckerFactors] = field(default_factory=dict)
    """The factors of the pass before, where there was one."""
    passes: int = 0
    """How often it has seen each sequence that is not left out."""
    seconds: float = 0.0
    """As if it had run alone."""
    state_bytes: int = 0
    """Of sums and of what goes from pass to pass, at their largest, of the linears of one visit or the sum over visits."""

    def join(self, visit: Measured, parts: Sequence[Sequence[int]]) -> None:
        """Adds what has been collected in one more visit; `parts`: the sequences of each pass."""
        seen = len({row for rows in parts for row in rows})
        self.sketches |= visit.sketches
        self.passes = max(self.passes, sum(len(rows) for rows in parts[: visit.passes]) // seen)
        self.seconds += visit.seconds
        self.state_bytes += visit.state_bytes


def factors_of(sketches: Mapping[str, Sketch]) -> dict[str, Factors]:
    """Factors from the sums so far."""
    return {name: sketch.factors() for name, sketch in sketches.items()}


def collect(
    layers: Layers,
    linears: Mapping[str, nn.Linear],
    tokens: TokenBatch,
    estimator: Estimator,
    *,
    seed: int,
    batch_size: int,
    labels: str = "sampled",
    store: HiddenStore | None = None,
    advance: Advance = _ignore,
) -> dict[str, Sketch]:
    """Sums of every linear over all sequences, in as many passes as the estimator needs, all in memory.

    Args:
        layers: A causal language model.
        linears: The modules to measure, by name.
        tokens: Calibration sequences.
        estimator: Which curvature.
        seed: Seeds the labels, together with each sequence's id; the same in every pass.
        batch_size: Sequences per forward pass (see `sweeps.safe_batch_size`).
        labels: What is sent back from the logits (see `sweeps.labels`).
        store: Where hidden states go; in memory by default.
        advance: Called with the number of sequences done by one group of layers.
    """
    parts = passes(estimator, len(tokens))
    found: dict[str, Sketch] = {}
    store = store or HiddenStore(memory=IN_MEMORY)
    for visit in gradient_visits(layers, linears, tokens, seed=seed, labels=labels, batch_size=batch_size, store=store, advance=advance):
        own = collect_visit(visit, linears, {"": estimator}, {"": parts}, batch_size=batch_size, device=layers.device)[""]
        found |= own.sketches
    return {name: found[name] for name in linears}


def collect_visit(
    visit: Visit,
    linears: Mapping[str, nn.Linear],
    estimators: Mapping[str, Estimator],
    parts: Mapping[str, Sequence[Sequence[int]]],
    *,
    batch_size: int,
    device: torch.device,
    names: Sequence[str] | None = None,
    fast: bool = False,
) -> dict[str, Measured]:
    """Sums of the linears of one visit, for each estimator, by label, one estimator after the other.

    Of several processes each takes its runs of the sequences (`processes.runs`), and all have the sums of all.

    Args:
        visit: The group of layers.
        linears: All modules by name.
        estimators: By label; all see the same gradients.
        parts: The sequences of each pass, for each label.
        batch_size: Sequences together; batches do not cross the end of a run.
        device: Where the sums are.
        names: Those linears only.
        fast: Whether products of the sums may round their factors to bfloat16, where the CPU has units for it (`linalg.fast`): an error
            of 2^-9 that is independent from entry to entry and far below the sampling error of any number of sequences.
    """
    wanted = {name: linears[name] for name in (visit.names if names is None else names)}
    return {
        label: _collected(visit, wanted, estimator, parts[label], batch_size=batch_size, device=device, fast=fast)
        for label, estimator in estimators.items()
    }


def _collected(
    visit: Visit,
    linears: Mapping[str, nn.Linear],
    estimator: Estimator,
    parts: Sequence[Sequence[int]],
    *,
    batch_size: int,
    device: torch.device,
    fast: bool,
) -> Measured:
    measured, began = Measured(), _now(device)
    for index in range(estimator.passes):
        measured.sketches = {
            name: estimator.sketch(linear.out_features, linear.in_features, device, index=index, previous=measured.previous.get(name))
            for name, linear in linears.items()
        }
        _one_pass(visit, measured.sketches, processes.runs(parts[index], estimator.together), batch_size, device, fast)
        measured.passes += 1
        measured.state_bytes = max(measured.state_bytes, _bytes(measured.sketches, measured.previous))
        if index + 1 == estimator.passes or all(estimator.converged(sketch) for sketch in measured.sketches.values()):
            break
        kept = factors_of(measured.sketches)
        measured.previous = {name: own for name, own in kept.items() if isinstance(own, KroneckerFactors)}
    for sketch in measured.sketches.values():
        sketch.index = estimator.passes - 1  # the passes that are left would change nothing
    measured.seconds = _now(device) - began
    return measured


def _one_pass(
    visit: Visit, sketches: Mapping[str, Sketch], runs: Sequence[Sequence[int]], batch_size: int, device: torch.device, fast: bool
) -> None:
    """Feeds all sketches with all sequences."""

    def consume(name: str, grad: LayerGrad) -> None:
        if name in sketches:
            with fast_products(device) if fast else nullcontext():
                sketches[name].update(grad)

    def feed(number: int) -> None:
        for rows in batches(runs[number], batch_size):
            visit.replay(rows, consume)

    for sketch in sketches.values():
        sketch.prepare()
    _add_runs(sketches, len(runs), feed)


def _add_runs(sketches: Mapping[str, Sketch], count: int, feed: Callable[[int], None]) -> None:
    """Adds to the sums what sketches are fed with in each of so many runs."""
    sums = [total for sketch in sketches.values() for total in sketch.sums.values()]

    def counts() -> Tensor:
        return torch.tensor([[sketch.tokens, sketch.rows] for sketch in sketches.values()], dtype=torch.int64).view(-1, 2)

    def part(number: int) -> list[Tensor]:
        for total in sums:
            total.zero_()
        for sketch in sketches.values():
            sketch.tokens = sketch.rows = 0
        feed(number)
        for sketch in sketches.values():
            sketch.finish()
        return [*sums, counts()]

    *totals, seen = processes.summed([*(total.clone() for total in sums), counts()], count, part)
    for own, total in zip(sums, totals, strict=True):
        own.copy_(total)
    for sketch, (tokens, rows) in zip(sketches.values(), seen.tolist(), strict=True):
        sketch.tokens, sketch.rows = tokens, rows


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


def collect_together(
    layers: Layers,
    linears: Mapping[str, nn.Linear],
    tokens: TokenBatch,
    estimators: Mapping[str, Estimator],
    *,
    seed: int,
    batch_size: int,
    labels: str = "sampled",
    store: HiddenStore | None = None,
    advance: Advance = _ignore,
) -> dict[str, Measured]:
    """What `collect` gives for each estimator, by label, over one stream of gradients.

    An estimator that leaves sequences out to choose by (`Estimator.held_out`) does not see the last ones.
    """
    ends = {label: len(tokens) - estimator.held_out(len(tokens)) for label, estimator in estimators.items()}
    parts = {label: passes(estimator, ends[label]) for label, estimator in estimators.items()}
    found = {label: Measured() for label in estimators}
    store = store or HiddenStore(memory=IN_MEMORY)
    for visit in gradient_visits(layers, linears, tokens, seed=seed, labels=labels, batch_size=batch_size, store=store, advance=advance):
        for label, own in collect_visit(visit, linears, estimators, parts, batch_size=batch_size, device=layers.device).items():
            found[label].join(own, parts[label])
    for measured in found.values():
        measured.sketches = {name: measured.sketches[name] for name in linears}
    return found


def runs_of(count: int, estimators: Iterable[Estimator]) -> list[Sequence[int]]:
    """All runs of so many sequences that estimators go through, within which batches are made."""
    found: list[Sequence[int]] = []
    for estimator in estimators:
        end = count - estimator.held_out(count)
        for rows in [*passes(estimator, end), range(end, count)]:
            found += [run for run in processes.runs(rows, estimator.together) if len(run)]
    return found


def passes(estimator: Estimator, count: int) -> list[Sequence[int]]:
    """Which of so many sequences each pass sees: all of them, or the estimator's pilot in pass 0 and the others in each later one."""
    pilot = estimator.pilot(count)
    if not pilot:
        return [range(count)] * estimator.passes
    return [range(pilot), *[range(pilot, count)] * (estimator.passes - 1)]


def pilot_first(estimator: Estimator, tokens: TokenBatch) -> TokenBatch:
    """The same sequences with the estimator's pilot, which is spread over them evenly, before the others."""
    count = estimator.pilot(len(tokens))
    chosen = [row * len(tokens) // count for row in range(count)]
    return tokens.select([*chosen, *sorted(set(range(len(tokens))) - set(chosen))])


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
    visit: Visit,
    errors: Mapping[str, Callable[[str], Tensor]],
    rows: Sequence[int],
    *,
    batch_size: int,
    sketches: Mapping[str, Sketch] | None = None,
    names: Iterable[str] | None = None,
) -> dict[str, dict[str, Float[Tensor, " sequences"]]]:
    """`<G_s, E>` of sequences, for each label of `errors` and each linear of a visit: `1/2 <G_s, E>^2` divided by the tokens predicts a KL.

    The gradients are added to `sketches`, which so far have not seen these sequences. `names`: of those linears only.

    Cost: one forward and one backward pass for all, `2 d_in d_out` flops per token and linear for `G_s`, as many per sequence for each `E`.
    Memory: the errors of the visit's linears, and one `G_s`.
    """
    wanted = list(visit.names if names is None else names)
    inner = {label: {name: torch.zeros(len(rows), dtype=torch.float64) for name in wanted} for label in errors}
    known = {(label, name): error(name) for label, error in errors.items() for name in wanted}
    runs, places = processes.runs(rows), {row: place for place, row in enumerate(rows)}
    start = 0

    def consume(name: str, grad: LayerGrad) -> None:
        if sketches and name in sketches:
            sketches[name].update(grad)
        if name not in wanted:
            return
        for sequence in grad.sequences():
            G = grad.weight_gradient(sequence)  # once for all errors
            for label in errors:
                E = known[label, name].to(G.device)
                inner[label][name][start + sequence] = (G * E).sum(dtype=torch.float64).item()

    def feed(number: int) -> None:
        nonlocal start
        for part in batches(runs[number], batch_size):
            start = places[part[0]]
            visit.replay(part, consume)

    _add_runs(sketches or {}, len(runs), feed)
    for own in inner.values():
        for values in own.values():
            processes.merged(values)
    return inner


def inner_products_of(
    layers: Layers,
    linears: Mapping[str, nn.Linear],
    errors: Mapping[str, Callable[[str], Tensor]],
    tokens: TokenBatch,
    *,
    seed: int,
    batch_size: int,
    labels: str = "sampled",
    store: HiddenStore | None = None,
    advance: Advance = _ignore,
) -> dict[str, dict[str, Float[Tensor, " sequences"]]]:
    """`inner_products` of all linears, by a backward sweep of its own.

    The KL's Hessian is the Fisher of the model's own labels, whatever factors were collected with: `labels="data"` counts as "sampled".
    """
    found: dict[str, dict[str, Tensor]] = {label: {} for label in errors}
    store, labels = store or HiddenStore(memory=IN_MEMORY), "sampled" if labels == "data" else labels
    everything, given = range(len(tokens)), {"seed": seed, "labels": labels, "batch_size": batch_size, "store": store, "advance": advance}
    for visit in gradient_visits(layers, linears, tokens, rows=processes.own_rows(everything), **given):  # type: ignore[arg-type]
        for label, own in inner_products(visit, errors, range(len(tokens)), batch_size=batch_size).items():
            found[label] |= own
    return {label: {name: own[name] for name in linears} for label, own in found.items()}


def predicted_kl(
    layers: Layers,
    linears: Mapping[str, nn.Linear],
    error: Callable[[str], Tensor],
    tokens: TokenBatch,
    *,
    seed: int,
    batch_size: int,
    labels: str = "sampled",
    store: HiddenStore | None = None,
    advance: Advance = _ignore,
) -> Prediction:
    """Predicts the KL of the errors `error(name) = W - W_hat` from gradients of `tokens`, which should be held out from the factors.

    Labels and cost: `inner_products_of`.
    """
    inner = inner_products_of(
        layers, linears, {"": error}, tokens, seed=seed, batch_size=batch_size, labels=labels, store=store, advance=advance
    )
    return prediction_of(inner[""], tokens.ids.shape[1])


def prediction_of(inner: Mapping[str, Float[Tensor, " sequences"]], length: int) -> Prediction:
    """The prediction of `<G_s, E>` of each linear, in sequences of so many tokens."""
    count = len(next(iter(inner.values())))
    per_sequence = {name: 0.5 * values.square() / length for name, values in inner.items()}
    separate = sum(per_sequence.values(), torch.zeros(count, dtype=torch.float64))
    together = 0.5 * sum(inner.values(), torch.zeros(count, dtype=torch.float64)).square() / length
    return Prediction(
        layers={name: values.mean().item() for name, values in per_sequence.items()},
        total=separate.mean().item(),
        total_stderr=_stderr(separate),
        joint=together.mean().item(),
        joint_stderr=_stderr(together),
    )


def _stderr(values: Tensor) -> float:
    return values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
