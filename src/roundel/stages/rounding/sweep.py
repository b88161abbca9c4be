"""The rounding sweep: one group of decoder layers after the other, each on the inputs that the rounded ones before it give.

    for each group of layers
        x of the original's path  -> what its linears read there, and what is added to the stream
        for linears that read the same tensor, in the order in which they run
            xq of the quantized path, through what is rounded already -> moments -> targets     (`rounding.prefix`)
            round them to their targets under their curvature, and put them into the layer
        xq of the next group

Order, which linears read the same tensor and which are added to the stream come from running the group (`sweeps.watch`). Experts, which see
some of the tokens only, are rounded to their own weights.

Cost: for all sequences of the prefix one forward pass of the original, one of the rounded layers, partial ones up to each set of linears
(about 1.4 more), and the moments. Memory: one group's weights and their curvature; inputs of its linears on the original's path, as the
store decides.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from roundel import processes
from roundel.artifacts.work import readable
from roundel.linalg.fast import fast, fast_products
from roundel.rounding.prefix import Moments, Strengths
from roundel.rounding.round import dequantized
from roundel.stages.rounding.natural import NaturalSteps, places
from roundel.store import staged_file, storage
from roundel.sweeps import HiddenStates, HiddenStore, Layers
from roundel.sweeps.gradients import batches
from roundel.sweeps.watch import Readers, Seen, observe, reading_order
from roundel.types import Factors, RoundedWeight, TokenBatch

__all__ = ["Prefix", "RoundTogether", "Steps", "Targets", "rounding_sweep", "steps_taken"]

Targets = Callable[[Sequence[str]], Mapping[str, Tensor]]
"""What linears are to be rounded to, by name, where that is not their own weight; asked once, for all."""

RoundTogether = Callable[[int, list[str], Targets, Moments | None], dict[str, RoundedWeight]]
"""Rounds linears of a group, by name, to targets, meeting inputs of these moments."""


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Of `natural.NaturalSteps`."""

    places: int
    """How many."""
    steps: int
    """At each."""
    factors: Callable[[int], Mapping[str, Factors]]
    """Of the linears of a group."""
    original: Callable[[str], Tensor]
    """A linear's own weight, which it has again when the sweep is over."""
    seed: int
    moved: Path
    """A directory for moved weights."""
    resident: bool
    """Whether the model is in memory."""
    kept: bool
    """Whether they are to outlive the process."""


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """What targets are made from."""

    tokens: TokenBatch
    """Calibration sequences that go along both paths."""
    strengths: Strengths
    outside: Callable[[], Mapping[str, Tensor]] = dict
    """Makes other parameters as they are rounded, by name: the embedding, which may be large and is needed once."""
    inside: Callable[[int], Mapping[str, Tensor]] = lambda _index: {}
    """Makes parameters of a group that are not rounded, but other ones on the quantized path, by name."""
    steps: Steps | None = None
    """What the natural-gradient steps need besides; None: there are none."""
    quickly: bool = False
    """Whether linears on both paths may round the factors of their products to bfloat16 (`linalg.fast`)."""


def rounding_sweep(
    layers: Layers,
    linears: Mapping[str, nn.Linear],
    round_together: RoundTogether,
    prefix: Prefix | None,
    *,
    batch_size: int,
    store: HiddenStore,
    advance: Callable[[int], None] = lambda _n: None,
    finished: Callable[[int], bool] = lambda _index: False,
    judged: Callable[[int, dict[str, RoundedWeight]], object] = lambda _index, _rounded: None,
) -> Iterator[tuple[int, dict[str, RoundedWeight]]]:
    """Rounds group after group; the model has its own weights again when a group is handed over.

    Args:
        layers: The original.
        linears: To be rounded, by name.
        round_together: Rounds some of them, which read the same tensor.
        prefix: What targets are made from; None: linears are rounded to their own weights.
        batch_size: Sequences in a pass.
        store: Where hidden states go.
        advance: Called with the number of linears that are done.
        finished: Whether an earlier process has rounded a group.
        judged: Told what each group becomes, while its weights are loaded.
    """
    left = [index for index in range(len(layers)) if layers.inside(index, linears) and not finished(index)]
    advance(sum(len(layers.inside(index, linears)) for index in range(len(layers)) if index not in left))
    paths = None if prefix is None or not left else _Paths(layers, linears, prefix, batch_size=batch_size, store=store)
    try:
        first = len(layers) if not left else left[0] if paths is None else paths.start(left[0])
        for index in range(first, left[-1] + 1 if left else first):
            own = {name: linears[name] for name in layers.inside(index, linears)}
            if paths is not None:
                paths.prepare(index)
            with layers.loaded(index):
                if paths is None:
                    rounded = round_together(index, list(own), _none, None) if index in left else {}
                    judged(index, rounded)
                    advance(len(rounded))
                else:
                    rounded = paths.through(index, own, round_together, judged, advance)
            if rounded:
                yield index, rounded
            if paths is not None:
                paths.go_on(index)
    finally:
        if paths is not None:
            paths.close()
    outside = layers.outside(linears)
    if outside and not finished(len(layers)):
        yield len(layers), round_together(len(layers), outside, _none, None)
    advance(len(outside))


def _none(_names: Sequence[str]) -> Mapping[str, Tensor]:
    return {}


class _Paths:
    """Hidden states of the same sequences through the original and through what is rounded."""

    def __init__(self, layers: Layers, linears: Mapping[str, nn.Linear], prefix: Prefix, *, batch_size: int, store: HiddenStore) -> None:
        self._layers, self._prefix, self._batch_size, self._store = layers, prefix, batch_size, store
        self._run: Callable[..., Tensor] = fast(layers.run) if prefix.quickly else layers.run
        self._observe: Callable[..., tuple[dict[str, Seen], Tensor]] = fast(observe) if prefix.quickly else observe
        count = len(prefix.tokens)
        self._runs = processes.runs(range(count))
        self._rows = processes.own_rows(range(count))
        first = layers.embed(self._ids([0]))
        self._shape, self._dtype = (count, *first.shape[1:]), first.dtype
        self._x: HiddenStates
        self._xq: HiddenStates
        self._after: tuple[HiddenStates, HiddenStates]
        self._states: list[HiddenStates] = []
        """To be dropped when a group is finished."""
        self._linears, self._places = linears, list[int]()
        self._natural: NaturalSteps | None = None

    def _begin_steps(self, steps: Steps) -> None:
        """Before anything has moved: the original's states after the last layer."""
        layers, reference = self._layers, self._new("reference")
        state = self._new("reference-start")
        for rows in batches(self._rows, self._batch_size):
            state.write(rows, layers.embed(self._ids(rows)))
        for index in range(len(layers)):
            after = reference if index + 1 == len(layers) else self._new(f"reference-{index + 1:03d}")
            with layers.loaded(index):
                for rows in batches(self._rows, self._batch_size):
                    after.write(rows, layers.run(index, self._ids(rows), state.read(rows).to(layers.device)))
            self._store.drop(state)
            state = after
        self._everywhere(reference)
        self._natural = NaturalSteps(
            layers=layers,
            linears=self._linears,
            factors=steps.factors,
            tokens=self._prefix.tokens,
            reference=reference,
            steps=steps.steps,
            seed=steps.seed,
            batch_size=self._batch_size,
            directory=None if steps.resident else steps.moved / processes.named("scratch"),
        )
        self._places = places(len(layers), steps.places)

    def prepare(self, index: int) -> None:
        """At some places what is left is moved, and its path begins at the quantized one."""
        steps = self._prefix.steps
        if steps is None or self._natural is None or index not in self._places:
            return
        known = None
        if processes.from_first(lambda: _has_moved(steps.moved, index)):
            known = _load_moved(steps.moved, index, self._layers, self._linears)
        if known is None:
            self._everywhere(self._xq)
            known = self._moved(index)
            if processes.first():
                _save_moved(steps, index, self._layers, self._linears, known)
            processes.wait()
        if known["taken"]:
            self._states.append(self._x)
            self._x = self._new(f"moved-{index:03d}")
            for rows in batches(self._rows, self._batch_size):
                self._x.write(rows, self._xq.read(rows))

    def _moved(self, index: int) -> dict[str, Any]:
        """The steps, in all processes the same, and where the first has come to."""
        assert self._natural is not None
        found = self._natural.move(index, self._xq)
        known: dict[str, Any] = processes.from_first(lambda: found)
        if processes.world() > 1:  # another processor may have come to other weights
            for group in range(index, len(self._layers)):
                names = self._layers.inside(group, self._linears)
                with self._layers.loaded(group):
                    for name in names:
                        processes.sent(self._linears[name].weight.data, 0)
                    self._layers.keep(group, names)
        return known

    def _everywhere(self, states: HiddenStates) -> None:
        """Gives every process the sequences of all."""
        world = processes.world()
        if world == 1:
            return
        for number, run in enumerate(self._runs):
            for rows in batches(run, self._batch_size):
                mine = number % world == processes.rank()
                values = states.read(rows) if mine else torch.empty((len(rows), *states.shape[1:]), dtype=states.dtype)
                processes.sent(values, number % world)
                if not mine:
                    states.write(rows, values)

    def start(self, first: int) -> int:
        """Begins at the group that is to be rounded first, if an earlier process has left the states before it, else with the embedding."""
        steps = self._prefix.steps
        if steps is not None:
            self._begin_steps(steps)
        moved = processes.from_first(lambda: [place for place in self._places if steps is not None and _has_moved(steps.moved, place)])
        for index in reversed(range(first + 1)):
            if not all(place in moved for place in self._places if place < index):
                continue
            states = [self._store.find(f"{path}-{index:03d}", self._shape, self._dtype) for path in ("original", "rounded")]
            if states[0] is not None and states[1] is not None:
                self._x, self._xq = states[0], states[1]
                for place in self._places:
                    if steps is not None and place < index:
                        _load_moved(steps.moved, place, self._layers, self._linears)
                return index
        self._x, self._xq = self._new("original-000"), self._new("rounded-000")
        for rows in batches(self._rows, self._batch_size):
            self._x.write(rows, self._layers.embed(self._ids(rows)))
        with self._layers.replaced(self._prefix.outside()):
            for rows in batches(self._rows, self._batch_size):
                self._xq.write(rows, self._layers.embed(self._ids(rows)))
        self._x.finish()
        self._xq.finish()
        return 0

    def go_on(self, index: int) -> None:
        """The group's codes are safe: the states after it take the place of those before it."""
        for states in (self._x, self._xq, *self._states):
            self._store.drop(states)
        self._states.clear()
        self._x, self._xq = self._after

    def close(self) -> None:
        """Gives the model its own weights back."""
        if self._prefix.steps is None or self._natural is None:
            return
        for index in range(len(self._layers)):
            names = self._layers.inside(index, self._linears)
            if self._prefix.steps.resident:
                for name in names:
                    self._linears[name].weight.data.copy_(self._prefix.steps.original(name))
            else:
                self._layers.keep(index, [])

    def _new(self, name: str, width: int | None = None) -> HiddenStates:
        return self._store.new(name, (*self._shape[:2], width) if width else self._shape, self._dtype)

    def _ids(self, rows: object) -> Tensor:
        return self._prefix.tokens.ids[list(rows)].to(self._layers.device)  # type: ignore[call-overload]

    @torch.no_grad()
    def through(
        self,
        index: int,
        linears: Mapping[str, nn.Linear],
        round_together: RoundTogether,
        judged: Callable[[int, dict[str, RoundedWeight]], object],
        advance: Callable[[int], None],
    ) -> dict[str, RoundedWeight]:
        """Rounds a group and takes both paths to its end."""
        layers, device = self._layers, self._layers.device
        few = range(len(self._runs[0]))[:2]  # in one sequence what sees some of the tokens may happen to see as many as there are
        order = [
            Readers.of(known)
            for known in processes.from_first(
                lambda: (
                    [vars(readers) for readers in reading_order(layers, index, self._ids(few), self._x.read(few).to(device), linears)]
                    if linears
                    else []
                )
            )
        ]
        corrected = [readers for readers in order if readers.per_token]
        after, inputs, rests = self._original(index, linears, corrected)
        kept = {name: linear.weight.detach().clone() for name, linear in linears.items()}
        rounded: dict[str, RoundedWeight] = {}
        try:
            with layers.replaced(self._prefix.inside(index)):
                for readers in _joined(order):
                    moments = self._moments(index, linears, readers, inputs[readers.names[0]], rests) if readers.per_token else None

                    def targets(names: Sequence[str], moments: Moments | None = moments) -> Mapping[str, Tensor]:
                        if moments is not None:
                            return moments.targets(names)
                        return {name: kept[name].float() for name in names} if self._natural is not None else {}

                    found = round_together(index, list(readers.names), targets, moments)
                    for name, weight in found.items():
                        linears[name].weight.copy_(dequantized(weight))
                    rounded |= found
                    advance(len(readers.names))
                if rounded:
                    judged(index, rounded)
                afterq = self._new(f"rounded-{index + 1:03d}")
                for rows in batches(self._rows, self._batch_size):
                    afterq.write(rows, self._run(index, self._ids(rows), self._xq.read(rows).to(device)))
        finally:
            for name, original in kept.items():
                linears[name].weight.copy_(original)
        for states in (*inputs.values(), *rests.values()):
            self._store.drop(states)
        after.finish()
        afterq.finish()
        self._after = after, afterq
        return rounded

    def _original(
        self, index: int, linears: Mapping[str, nn.Linear], corrected: list[Readers]
    ) -> tuple[HiddenStates, dict[str, HiddenStates], dict[str, HiddenStates]]:
        """The state after the group on the original's path; by name what the first of each set of linears reads, and what outputs join."""
        layers = self._layers
        added = [name for readers in corrected for name in readers.added]
        watched = {name: linears[name] for readers in corrected for name in {readers.names[0], *readers.added}}
        after = self._new(f"original-{index + 1:03d}")
        firsts = [readers.names[0] for readers in corrected]
        inputs = {name: self._new(f"input-{place}", linears[name].in_features) for place, name in enumerate(firsts)}
        rests = {name: self._new(f"rest-{place}", linears[name].out_features) for place, name in enumerate(added)}
        for rows in batches(self._rows, self._batch_size):
            hidden = self._x.read(rows).to(layers.device)
            seen, output = self._observe(layers, index, self._ids(rows), hidden, watched, added=added, stop=False)
            after.write(rows, output)
            for name, states in inputs.items():
                states.write(rows, seen[name].x)
            for name, states in rests.items():
                rest = seen[name].rest
                assert rest is not None
                states.write(rows, rest)
        return after, inputs, rests

    def _moments(
        self, index: int, linears: Mapping[str, nn.Linear], readers: Readers, x: HiddenStates, rests: Mapping[str, HiddenStates]
    ) -> Moments:
        layers, first = self._layers, readers.names[0]
        watched = {name: linears[name] for name in {first, *readers.added}}
        weights = {name: linears[name].weight.detach() for name in readers.names}

        def part(number: int) -> list[Tensor]:
            moments = Moments(weights, readers.added, self._prefix.strengths)
            for rows in batches(self._runs[number], self._batch_size):
                hidden = self._xq.read(rows).to(layers.device)
                seen, _ = self._observe(layers, index, self._ids(rows), hidden, watched, added=readers.added, stop=True)
                errors = {}
                for name in readers.added:
                    rest, factor = seen[name].rest, seen[name].factor
                    assert rest is not None
                    errors[name] = ((rests[name].read(rows).to(rest) - rest) / factor).float()
                xq, before = seen[first].x, x.read(rows).to(seen[first].x)
                with fast_products(xq.device):
                    for place in range(len(rows)):  # one by one, so that no sum depends on the batch
                        own = {name: error[place] for name, error in errors.items()}
                        moments.add(before[place].float(), xq[place].float(), own)
            return moments.sums()

        total = Moments(weights, readers.added, self._prefix.strengths)
        processes.summed(total.sums(), len(self._runs), part)
        total.settle()
        return total


def _joined(order: Sequence[Readers]) -> Iterator[Readers]:
    """Sets of linears that are rounded at the same time: those without targets, such as experts, as many as there are processes."""
    silent: list[str] = []
    for readers in order:
        if readers.per_token:
            yield from _apart(silent)
            silent.clear()
            yield readers
        else:
            silent += readers.names
    yield from _apart(silent)


def _apart(names: Sequence[str]) -> Iterator[Readers]:
    for start in range(0, len(names), processes.world()):
        yield Readers(names=tuple(names[start : start + processes.world()]), added=(), per_token=False)


def _moved_file(directory: Path, index: int) -> Path:
    return directory / f"moved-{index:04d}.safetensors"


def _has_moved(directory: Path, index: int) -> bool:
    return _moved_file(directory, index).is_file()


def steps_taken(directory: Path) -> list[dict[str, Any]]:
    """What is known of each place, for the report."""
    found = []
    for path in sorted(directory.glob("moved-????.safetensors")):
        with readable(path), safe_open(path, framework="pt") as stored:
            found.append(dict(json.loads(stored.metadata()["roundel"])))
    return found


def _save_moved(steps: Steps, first: int, layers: Layers, linears: Mapping[str, nn.Linear], known: dict[str, Any]) -> None:
    """The weights of all groups from one on, if they were moved, one file for each and then one that says so."""
    directory = steps.moved
    with storage(directory):
        directory.mkdir(parents=True, exist_ok=True)
    for index in range(first, len(layers)) if known["taken"] and steps.kept else []:
        with layers.loaded(index), staged_file(directory / f"moved-{first:04d}-{index:04d}.safetensors") as temporary:
            weights = {name: linears[name].weight.detach().cpu().contiguous() for name in layers.inside(index, linears)}
            save_file(weights, temporary)
    with staged_file(_moved_file(directory, first)) as temporary:
        save_file({}, temporary, metadata={"roundel": json.dumps(known)})


def _load_moved(directory: Path, first: int, layers: Layers, linears: Mapping[str, nn.Linear]) -> dict[str, Any] | None:
    """Moves the weights as an earlier process has; None where it has not."""
    if not _has_moved(directory, first):
        return None
    with readable(_moved_file(directory, first)), safe_open(_moved_file(directory, first), framework="pt") as stored:
        known: dict[str, Any] = dict(json.loads(stored.metadata()["roundel"]))
        taken = bool(known["taken"])
    for index in range(first, len(layers)) if taken else []:
        path = directory / f"moved-{first:04d}-{index:04d}.safetensors"
        with layers.loaded(index):
            with readable(path):
                for name, weight in load_file(path).items():
                    linears[name].weight.data.copy_(weight)
            layers.keep(index, layers.inside(index, linears))
    return known
