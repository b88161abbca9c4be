"""The backward sweep: gradients of every linear, one group of decoder layers after the other, the last first.

    forward    x[l+1] = layers_l(x[l]) of all sequences, all kept                      (`HiddenStates`)
    head       logits, labels, g[L] = d NLL / d x[L], in slices of tokens              (`sweeps.labels` says what is sent back)
    backward   a `Visit` of group l: whoever is there may replay it on any of its sequences, as often as it wants, and is given
               x and g of each linear; g[l] = d NLL / d x[l] comes out of the first replay of a sequence
    ends       where they are wanted, a last visit with g[0] and x[L], for the embedding and the output head (`curvature.ends`)

Estimators that go over their text several times do so within one visit, so that sums of one group are in memory at a time, and the weights
of each are read twice in all. Linears outside of the decoder layers (an output head that is asked for) have a visit of their own, the first
one, which replays what comes after the last layer.

Cost: a forward pass, and a forward and backward pass to the inputs for each replay. Memory: one batch through one group; hidden states of
all sequences at all boundaries, and two of gradients, as the store decides.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from roundel.errors import ModelError, is_out_of_memory
from roundel.linalg.fast import fast
from roundel.sweeps.hidden import HiddenStates, HiddenStore
from roundel.sweeps.labels import Labels
from roundel.sweeps.layers import Layers
from roundel.sweeps.tap import tapped
from roundel.types import LayerGrad, TokenBatch

__all__ = [
    "ENDS",
    "Visit",
    "batches",
    "forward",
    "gradient_visits",
    "head_gradients",
    "safe_batch_size",
    "steps",
    "visits_without_gradients",
]

Consumer = Callable[[str, LayerGrad], None]

ENDS = -1
"""The index of the visit of embedding and output head, whose `g` is the gradient before the first group."""


@dataclass(kw_only=True)
class Visit:
    """A group of layers whose gradients can be had."""

    index: int
    """Of the group; that of what comes after all layers is their number."""
    names: list[str]
    """Of the linears in it."""
    _run: Callable[[Sequence[int], Consumer | None], None]
    g: HiddenStates | None = None
    """The gradient at the group's output, of all sequences; None after all layers."""
    last: HiddenStates | None = None
    """In the visit of the ends, the state after the last group."""
    propagated: set[int] = field(default_factory=set)
    """Sequences whose gradient at the group's input is known."""

    def replay(self, rows: Sequence[int], consume: Consumer) -> None:
        """Calls `consume` once for each linear with what it saw of these sequences, one batch."""
        self._run(rows, consume)
        self.propagated |= set(rows)


def gradient_visits(
    layers: Layers,
    linears: Mapping[str, nn.Linear],
    tokens: TokenBatch,
    *,
    seed: int,
    labels: str | Sequence[str],
    batch_size: int,
    store: HiddenStore,
    advance: Callable[[int], None] = lambda _n: None,
    finished: Callable[[int], bool] = lambda _index: False,
    quickly: bool = False,
    rows: Sequence[int] | None = None,
    ends: bool = False,
) -> Iterator[Visit]:
    """Visits of all groups that have any of these linears, the last first.

    Args:
        layers: The model.
        linears: Whose gradients are wanted.
        tokens: All sequences.
        seed: Of the labels, together with each sequence's id.
        labels: What is sent back from the logits (see `sweeps.labels`), for all sequences or each.
        batch_size: Sequences together in passes that nobody looks at.
        store: Where hidden states go; one that is kept is gone on with.
        advance: Called with the number of sequences done by one group, forward, in the head or backward: in all `steps` times theirs.
        finished: Whether a group needs no visit, because an earlier process had it; once visited it must be.
        quickly: Whether linears may round the factors of their products to bfloat16 (`linalg.fast`).
        rows: The sequences that this process takes, of several; all by default.
        ends: Whether a visit with the index `ENDS` comes last.
    """
    rows = range(len(tokens)) if rows is None else rows
    wanted = [index for index in range(len(layers)) if layers.inside(index, linears)]
    outside = layers.outside(linears)
    kinds = [labels] * len(tokens) if isinstance(labels, str) else list(labels)
    if all(finished(index) for index in [*wanted, *([len(layers)] if outside else []), *([ENDS] if ends else [])]):
        advance(steps(layers, linears) * len(rows))
        return
    first = 0 if ends else wanted[0] if wanted else len(layers)
    states = forward(layers, tokens, batch_size=batch_size, store=store, advance=advance, quickly=quickly, rows=rows)
    if outside and not finished(len(layers)):
        yield Visit(index=len(layers), names=outside, _run=_head_replay(layers, linears, tokens, states[-1], seed, kinds))
    if not wanted and not ends:
        return
    above, g = _last_gradient(layers, tokens, states[-1], first if ends else first + 1, store)
    if g is None:
        g = head_gradients(layers, tokens, states[-1], seed=seed, labels=kinds, store=store, advance=advance, quickly=quickly, rows=rows)
    else:
        advance((1 + len(layers) - above) * len(rows))
    for index in reversed(range(first, above)):
        names = layers.inside(index, linears)
        before = store.new(f"gradient-{index:03d}", g.shape, g.dtype) if index > first or ends else None
        own = {name: linears[name] for name in names}
        with layers.loaded(index):
            visit = Visit(index=index, names=names, _run=_replay(layers, index, own, tokens, states[index], g, before, quickly), g=g)
            if names and not finished(index):
                yield visit
            if before is not None:
                for part in batches([row for row in rows if row not in visit.propagated], batch_size):
                    visit._run(part, None)
                before.finish()
        advance(len(rows))
        store.drop(g)
        if before is not None:
            g = before
    if ends and not finished(ENDS):
        yield Visit(index=ENDS, names=[], _run=_not_run, g=g, last=states[-1])
        store.drop(g)
    for state in states:
        store.drop(state)


def visits_without_gradients(
    layers: Layers, linears: Mapping[str, nn.Linear], *, finished: Callable[[int], bool] = lambda _index: False
) -> Iterator[Visit]:
    """The same visits where all sums are there already: no text goes through the model, and none can be replayed."""
    inside = {len(layers): layers.outside(linears)} | {index: layers.inside(index, linears) for index in reversed(range(len(layers)))}
    for index, names in inside.items():
        if names and not finished(index):
            yield Visit(index=index, names=names, _run=_not_run)


def _not_run(_rows: Sequence[int], _consume: Consumer | None) -> None:
    raise AssertionError("a visit without gradients has none to give")


def steps(layers: Layers, linears: Mapping[str, nn.Linear]) -> int:
    """How often each sequence passes a group or the head in `gradient_visits`."""
    first = next((index for index in range(len(layers)) if layers.inside(index, linears)), len(layers))
    return len(layers) + (1 + len(layers) - first if first < len(layers) else 0)


def _last_gradient(
    layers: Layers, tokens: TokenBatch, hidden: HiddenStates, lowest: int, store: HiddenStore
) -> tuple[int, HiddenStates | None]:
    """The lowest group boundary whose gradient an earlier process has left, and that; the end without any."""
    for index in range(lowest, len(layers) + 1):
        if (found := store.find(f"gradient-{index:03d}", hidden.shape, hidden.dtype)) is not None:
            return index, found
    return len(layers), None


def batches(rows: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Consecutive runs of at most `size`."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


@torch.no_grad()
def forward(
    layers: Layers,
    tokens: TokenBatch,
    *,
    batch_size: int,
    store: HiddenStore,
    advance: Callable[[int], None] = lambda _n: None,
    quickly: bool = False,
    rows: Sequence[int] | None = None,
) -> list[HiddenStates]:
    """The hidden states before each group, and after the last; those that the store has already are taken."""
    one = layers.embed(_ids(layers, tokens, [0]))
    shape, own = (len(tokens), *one.shape[1:]), range(len(tokens)) if rows is None else rows
    states: list[HiddenStates] = []
    for index in range(-1, len(layers)):
        name = f"hidden-{index + 1:03d}"
        if len(states) == index + 1 and (found := store.find(name, shape, one.dtype)) is not None:
            states.append(found)
            advance(len(own) if index >= 0 else 0)
            continue
        states.append(store.new(name, shape, one.dtype))
        with layers.loaded(index) if index >= 0 else nullcontext():
            for part in batches(own, batch_size):
                ids = _ids(layers, tokens, part)
                after = _run(layers, quickly)(index, ids, states[-2].read(part).to(layers.device)) if index >= 0 else layers.embed(ids)
                states[-1].write(part, after)
                advance(len(part) if index >= 0 else 0)
        states[-1].finish()
    return states


def head_gradients(
    layers: Layers,
    tokens: TokenBatch,
    hidden: HiddenStates,
    *,
    seed: int,
    labels: Sequence[str],
    store: HiddenStore,
    advance: Callable[[int], None] = lambda _n: None,
    quickly: bool = False,
    rows: Sequence[int] | None = None,
) -> HiddenStates:
    """The gradient of the summed negative log-likelihood of drawn labels at the hidden state after the last group."""
    g = store.new(f"gradient-{len(layers):03d}", hidden.shape, hidden.dtype)
    for row in range(len(tokens)) if rows is None else rows:
        ids, drawn = _ids(layers, tokens, [row]), Labels(tokens, row, seed, labels[row])
        h = hidden.read([row]).to(layers.device)
        found = torch.empty_like(h)
        for part in layers.slices(ids.shape[1]):
            with torch.enable_grad():
                leaf = h[:, part].clone().requires_grad_(True)
                logits = (fast(layers.logits) if quickly else layers.logits)(ids[:, part], leaf)
                (found[:, part],) = torch.autograd.grad(logits, leaf, drawn.gradient(logits[0].detach(), part)[None])
        g.write([row], found)
        advance(1)
    g.finish()
    return g


def _run(layers: Layers, quickly: bool) -> Callable[[int, Tensor, Tensor], Tensor]:
    return fast(layers.run) if quickly else layers.run


def _ids(layers: Layers, tokens: TokenBatch, rows: Sequence[int]) -> Tensor:
    return tokens.ids[list(rows)].to(layers.device)


def _replay(
    layers: Layers,
    index: int,
    linears: Mapping[str, nn.Linear],
    tokens: TokenBatch,
    hidden: HiddenStates,
    g: HiddenStates,
    before: HiddenStates | None,
    quickly: bool,
) -> Callable[[Sequence[int], Consumer | None], None]:
    def run(rows: Sequence[int], consume: Consumer | None) -> None:
        with tapped(layers.model, linears if consume else {}, consume or (lambda _name, _grad: None)):
            x = hidden.read(rows).to(layers.device).requires_grad_(True)
            _run(layers, quickly)(index, _ids(layers, tokens, rows), x).backward(g.read(rows).to(layers.device))
        if before is not None:
            assert x.grad is not None
            before.write(rows, x.grad)

    return run


def _head_replay(
    layers: Layers, linears: Mapping[str, nn.Linear], tokens: TokenBatch, hidden: HiddenStates, seed: int, labels: Sequence[str]
) -> Callable[[Sequence[int], Consumer | None], None]:
    outside = {name: linears[name] for name in layers.outside(linears)}

    def run(rows: Sequence[int], consume: Consumer | None) -> None:
        with tapped(layers.model, outside, consume or (lambda _name, _grad: None)):
            ids = _ids(layers, tokens, rows)
            logits = layers.logits(ids, hidden.read(rows).to(layers.device).requires_grad_(True))
            whole = slice(0, ids.shape[1])
            drawn = [Labels(tokens, row, seed, labels[row]).gradient(own, whole) for row, own in zip(rows, logits.detach(), strict=True)]
            logits.backward(torch.stack(drawn))

    return run


def safe_batch_size(
    layers: Layers,
    linears: Mapping[str, nn.Linear],
    tokens: TokenBatch,
    *,
    batch_size: int,
    parts: Sequence[int] = (),
    quickly: bool = False,
) -> int:
    """`batch_size`, if a batch gives every linear, of one group of each kind, the same bits as its sequences one by one; else 1.

    Where memory is not enough for such a batch it is the same of half as many.

    Args:
        layers: The model.
        linears: Whose gradients are wanted.
        tokens: Some sequences, as many as make a batch.
        batch_size: As wanted.
        parts: How many sequences are gone through in batches, each time: the last, smaller batches of them are checked too. By default all.
        quickly: As for `gradient_visits`.
    """
    batch_size = min(batch_size, max(parts, default=len(tokens)), len(tokens))
    kinds: dict[tuple[str, ...], int] = {}
    """The first of all groups that have the same linears."""
    for index in range(len(layers)):
        if names := layers.inside(index, linears):
            kinds.setdefault(tuple(re.sub(r"\d+", "", name) for name in names), index)
    while batch_size > 1 and kinds:
        try:
            return min(_safe_in_group(layers, index, linears, tokens, batch_size, parts, quickly) for index in kinds.values())
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        batch_size //= 2
    return 1


def _safe_in_group(
    layers: Layers,
    index: int,
    linears: Mapping[str, nn.Linear],
    tokens: TokenBatch,
    batch_size: int,
    parts: Sequence[int],
    quickly: bool,
) -> int:
    own = {name: linears[name] for name in layers.inside(index, linears)}

    def digests(size: int, rows: Sequence[int]) -> dict[tuple[str, int], tuple[int, int]]:
        found: dict[tuple[str, int], tuple[int, int]] = {}
        for part in batches(rows, size):

            def consume(name: str, grad: LayerGrad, part: Sequence[int] = part) -> None:
                for sequence in grad.sequences():
                    found[name, part[sequence]] = (_bits(grad.input.x[sequence]), _bits(grad.g[sequence]))

            ids = _ids(layers, tokens, part)
            with tapped(layers.model, own, consume):
                output = _run(layers, quickly)(index, ids, layers.embed(ids).requires_grad_(True))
                output.backward(output.detach())
        return found

    with layers.loaded(index):
        single = digests(1, range(batch_size))
        for size in {batch_size, *(count % batch_size for count in (parts or [len(tokens)]))} - {0, 1}:
            try:
                together = digests(size, range(size))
            except ModelError:  # rows of several sequences cannot be told apart
                return 1
            if any(single[key] != bits for key, bits in together.items()):
                return 1
    return batch_size


def _bits(values: Tensor) -> int:
    """A checksum of the exact bits."""
    words = values.contiguous().view(torch.int32 if values.element_size() == 4 else torch.int16).flatten().long()
    weights = torch.arange(words.numel(), device=words.device) % 65521 + 1
    return int((words * weights).sum())
