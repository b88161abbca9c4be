"""Decoder layers one by one, backward and through files: what the whole model gives, whatever the architecture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from e2e.tiny import VOCABULARY, architectures, make_model
from oracles.tiny import backward
from roundel.errors import ModelError, StorageError
from roundel.sweeps import HiddenStates, HiddenStore, Layers, forward, gradient_visits, layers
from roundel.sweeps.gradients import steps
from roundel.sweeps.layers import decoder_layers
from roundel.sweeps.tap import tapped
from roundel.types import LayerGrad, TokenBatch

WIDTH, WORDS = 8, 20


def tokens_of(sequences: int, length: int, vocabulary: int = VOCABULARY) -> TokenBatch:
    ids = torch.randint(2, vocabulary, (sequences, length), generator=torch.Generator().manual_seed(5))
    return TokenBatch(ids=ids, sequence_ids=tuple(range(7, 7 + sequences)))


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


@torch.no_grad()
def inputs_of(model: nn.Module, modules: Sequence[nn.Module], ids: Tensor) -> tuple[list[Tensor], Tensor]:
    """What each module is given as its hidden state, and the logits."""
    seen: list[Tensor] = []
    handles = [
        module.register_forward_pre_hook(
            lambda _module, args, kwargs: seen.append((args[0] if args else kwargs["hidden_states"]).clone()), with_kwargs=True
        )
        for module in modules
    ]
    logits = model(input_ids=ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return seen, logits


class Layer(nn.Module):
    """Attention's cheapest stand-in: every position sees the mean of those before it."""

    def __init__(self, mixed: nn.Linear | None = None) -> None:
        super().__init__()
        self.mixed, self.own = mixed or nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def add(self, x: Tensor, more: Tensor | float = 0.0) -> Tensor:
        before = x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]
        x = x + self.mixed(before + more).tanh()
        return x + self.own(x).tanh()

    def forward(self, x: Tensor) -> Any:
        return self.add(x)


class Tuples(Layer):
    """Returns more than the hidden state, which nobody reads."""

    def forward(self, x: Tensor) -> Any:
        return self.add(x), None, x.mean()


class Named(Layer):
    """Wants its hidden state by name."""

    def forward(self, *, scale: Tensor, hidden_states: Tensor) -> Any:
        return self.add(hidden_states, scale)


class HandsOn(Layer):
    """Each layer reads what the one before it returned beside the hidden state."""

    def forward(self, x: Tensor, other: Tensor | None = None) -> Any:
        return self.add(x, 0.0 if other is None else other), x.tanh()


class Remembers(Layer):
    """The first one leaves in a shared dictionary what the others look up."""

    def forward(self, x: Tensor, known: dict[str, Tensor]) -> Any:
        return self.add(x, known.setdefault("first", x.tanh()) if self.first else known["first"])


class Net(nn.Module):
    """Layers of one kind between an embedding and a head."""

    def __init__(self, kind: type[Layer], *, shared: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        mixed = nn.Linear(WIDTH, WIDTH) if shared == "linear" else None
        self.embedding, self.head, self.kind = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS), kind
        self.layers = nn.ModuleList([kind(mixed) for _ in range(3)])
        if shared == "layer":
            self.layers[2] = self.layers[0]
        for index, layer in enumerate(self.layers):
            layer.first = index == 0

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        x, rest, known = self.embedding(input_ids), None, {}
        for layer in self.layers:
            if self.kind is Named:
                output = layer(scale=torch.tensor(0.3), hidden_states=x)
            elif self.kind is HandsOn:
                output = layer(x, rest)
            else:
                output = layer(x, known) if self.kind is Remembers else layer(x)
            x, rest = (output[0], output[1]) if isinstance(output, tuple) else (output, None)
        return SimpleNamespace(logits=self.head(x.tanh()))


NETS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    **{name: ((lambda name=name: make_model(name)), 2) for name in architectures()},
    "tuples": (lambda: Net(Tuples), 3),
    "named": (lambda: Net(Named), 3),
    "hands-on": (lambda: Net(HandsOn), 1),
    "remembers": (lambda: Net(Remembers), 1),
    "shared-linear": (lambda: Net(Layer, shared="linear"), 1),
}
"""And into how many groups each falls."""


def net(name: str) -> tuple[nn.Module, TokenBatch]:
    model = NETS[name][0]().eval()
    return model, tokens_of(3, 40, int(model.get_input_embeddings().num_embeddings))


@pytest.mark.parametrize("name", NETS)
def test_one_by_one_is_all_at_once_bit_for_bit(name: str) -> None:
    model, tokens = net(name)
    found = Layers(model)
    assert len(found) == NETS[name][1]
    seen, logits = inputs_of(model, [model.get_submodule(layer) for layer in found.names], tokens.ids)
    with torch.no_grad():
        hidden = found.embed(tokens.ids)
        for index, group in enumerate(found.groups):
            assert torch.equal(hidden, seen[found.names.index(group[0])])
            hidden = found.run(index, tokens.ids, hidden)
        assert torch.equal(found.through(tokens.ids), hidden)
        assert torch.equal(found.logits(tokens.ids, hidden), logits)
        for size in (1, 7):
            parts = [found.logits(tokens.ids[:1, k : k + size], hidden[:1, k : k + size]) for k in range(0, 40, size)]
            torch.testing.assert_close(torch.cat(parts, dim=1), logits[:1], rtol=1e-4, atol=1e-5)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_layer_that_is_run_in_several_places_is_refused() -> None:
    model = Net(Layer, shared="layer")
    with pytest.raises(ModelError, match="cannot be run by themselves"):
        Layers(model)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_another_module_in_a_layers_place_is_given_what_the_layer_is() -> None:
    model, tokens = net("llama")
    found, other = Layers(model), make_model("llama", seed=1).model.layers[1]
    with torch.no_grad():
        hidden = found.run(0, tokens.ids, found.embed(tokens.ids))
        expected = found.run(1, tokens.ids, hidden, instead=other)
        assert not torch.equal(expected, found.run(1, tokens.ids, hidden))
        model.model.layers[1].load_state_dict(other.state_dict())
        assert torch.equal(expected, found.run(1, tokens.ids, hidden))


def test_a_forward_that_somebody_else_has_put_there_stays() -> None:
    model = Net(Layer)
    calls: list[Tensor] = []
    original = model.layers[1].forward
    model.layers[1].forward = own = lambda x: calls.append(x) or original(x)
    found = Layers(model)
    calls.clear()
    ids = tokens_of(1, 4, WORDS).ids
    found.run(1, ids, found.embed(ids))
    assert len(calls) == 1
    assert model.layers[1].forward is own


def test_numbers_that_are_not_finite_are_no_reason_to_refuse_a_model() -> None:
    """Whoever measures something says what is wrong."""
    model = Net(Layer)
    with torch.no_grad():
        model.layers[1].own.weight.fill_(torch.nan)
    assert len(Layers(model)) == 3


def test_sixteen_bits_are_compared_as_such() -> None:
    for name in ("llama", "gemma3"):
        assert len(Layers(make_model(name).to(torch.bfloat16))) == 2


def test_slices_hold_no_more_logits_than_they_may(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Layers(Net(Layer))
    assert found.slices(50) == [slice(0, 50)]
    for most, size in ((7 * WORDS + 3, 7), (WORDS - 1, 1)):
        monkeypatch.setattr(layers, "SLICE", most)
        parts = found.slices(10)
        assert [k for part in parts for k in range(part.start, part.stop)] == list(range(10))
        assert max(part.stop - part.start for part in parts) == size


def test_the_layers_are_the_outermost_list_with_the_most_weights() -> None:
    model = nn.Module()
    model.small = nn.ModuleList([nn.Linear(2, 2)] * 5)
    model.large = nn.ModuleList(nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(9, 9) for _ in range(4))}) for _ in range(2))
    assert decoder_layers(model) == ["large.0", "large.1"]
    with pytest.raises(ModelError, match="no list of decoder layers"):
        decoder_layers(nn.Linear(2, 2))


def test_modules_are_inside_of_one_group_or_outside_of_all() -> None:
    model = make_model("llama")
    found, every = Layers(model), linears(model)
    assert found.outside(every) == ["lm_head"]
    assert [*found.inside(0, every), *found.inside(1, every), "lm_head"] == list(every)
    assert found.inside(1, {"model.layers.1": model, "model.layers.10.q": model}) == ["model.layers.1"]


# Backward


def whole_gradients(
    model: nn.Module, chosen: dict[str, nn.Linear], tokens: TokenBatch, labels: str
) -> dict[tuple[str, int], tuple[Tensor, ...]]:
    """`x` and `g` of each linear and sequence, by passes of the whole model."""
    found: dict[tuple[str, int], tuple[Tensor, ...]] = {}
    for row in range(len(tokens)):
        with tapped(
            model, chosen, lambda name, grad, row=row: found.__setitem__((name, row), (grad.input.x[0].clone(), grad.g[0].clone()))
        ):
            backward(model, tokens[row : row + 1], 3, labels)
    return found


def replayed(visits: Iterator[Any], rows: Sequence[Sequence[int]]) -> dict[tuple[str, int], list[tuple[Tensor, ...]]]:
    """The same in the order of the replays of each visit."""
    found: dict[tuple[str, int], list[tuple[Tensor, ...]]] = {}
    for visit in visits:
        for part in rows:

            def consume(name: str, grad: LayerGrad, part: Sequence[int] = part) -> None:
                for sequence, row in enumerate(part):
                    found.setdefault((name, row), []).append((grad.input.x[sequence].clone(), grad.g[sequence].clone()))

            visit.replay(part, consume)
    return found


def sweep(model: nn.Module, chosen: dict[str, nn.Linear], tokens: TokenBatch, **settings: Any) -> Iterator[Any]:
    own = {"seed": 3, "labels": "sampled", "batch_size": 2, "store": HiddenStore(memory=1 << 30), **settings}
    return gradient_visits(Layers(model), chosen, tokens, **own)


@pytest.mark.parametrize("name", NETS)
def test_gradients_are_those_of_the_whole_model_however_often_they_are_asked_for(name: str) -> None:
    model, tokens = net(name)
    chosen = linears(model)
    expected = whole_gradients(model, chosen, tokens, "probe")
    found = replayed(sweep(model, chosen, tokens, labels="probe"), [[2], [0, 1], [2, 1]])
    assert found.keys() == expected.keys()
    for key, seen in found.items():
        assert len(seen) == (1 if key[1] == 0 else 2)
        for each in seen:
            for own, other in zip(each, expected[key], strict=True):
                torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5 * other.abs().max().item())


def test_the_head_comes_first_and_layers_that_nobody_asks_for_are_passed() -> None:
    model, tokens = net("llama")
    every = linears(model)
    done: list[int] = []
    for kept, indices in ((every, [2, 1, 0]), ({"lm_head": every["lm_head"]}, [2])):
        done.clear()
        visits = [(visit.index, visit.names) for visit in sweep(model, kept, tokens, advance=done.append)]
        assert [index for index, _ in visits] == indices
        assert visits[0][1] == ["lm_head"]
        assert sum(done) == len(tokens) * steps(Layers(model), kept)
    first = {name: every[name] for name in every if ".layers.0." in name}
    done.clear()
    expected = whole_gradients(model, first, tokens, "sampled")
    found = replayed(sweep(model, first, tokens, advance=done.append), [[0, 1, 2]])
    for key, (own,) in found.items():
        torch.testing.assert_close(own[1], expected[key][1], rtol=1e-4, atol=1e-6)
    assert sum(done) == len(tokens) * steps(Layers(model), first) == 3 * 5


def test_what_arrives_at_a_groups_output_is_known_without_a_replay() -> None:
    model, tokens = net("llama")
    for visit in sweep(model, linears(model), tokens):
        if visit.index < 2:
            output = f"model.layers.{visit.index}.mlp.down_proj"  # added to the stream, so it has the stream's gradient
            for (name, row), (own,) in replayed(iter([visit]), [[0], [1], [2]]).items():
                if name == output:
                    torch.testing.assert_close(visit.g.read([row])[0], own[1], rtol=1e-4, atol=1e-6)


def test_each_sequence_may_have_labels_of_its_own() -> None:
    model, tokens = net("llama")
    chosen = linears(model)
    kinds = ["sampled", "probe", "data"]
    found = replayed(sweep(model, chosen, tokens, labels=kinds), [[0], [1], [2]])
    for row, kind in enumerate(kinds):
        expected = whole_gradients(model, chosen, tokens, kind)
        for name in chosen:
            torch.testing.assert_close(found[name, row][0][1], expected[name, row][1], rtol=1e-4, atol=1e-6)


def test_slices_of_logits_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = net("llama")
    chosen = {name: linear for name, linear in linears(model).items() if "layers.1" in name}
    whole = replayed(sweep(model, chosen, tokens), [[0], [1], [2]])
    monkeypatch.setattr(layers, "SLICE", 3 * VOCABULARY)
    for key, (own,) in replayed(sweep(model, chosen, tokens), [[0], [1], [2]]).items():
        torch.testing.assert_close(own[1], whole[key][0][1], rtol=1e-4, atol=1e-6)


def test_a_sweep_goes_on_where_an_earlier_process_has_stopped(tmp_path: Path) -> None:
    model, tokens = net("llama")
    chosen = linears(model)
    rows = [[0], [1], [2]]
    whole = replayed(sweep(model, chosen, tokens), rows)
    finished: set[int] = set()
    found: dict[tuple[str, int], Any] = {}
    for stop in (2, 1, 0):
        store, done = HiddenStore(memory=0, directory=tmp_path, kept=True), list[int]()
        for visit in sweep(model, chosen, tokens, store=store, finished=finished.__contains__, advance=done.append):
            assert visit.index == stop
            found |= replayed(iter([visit]), rows)
            finished.add(visit.index)
            if stop:
                break  # killed
    assert sum(done) == len(tokens) * steps(Layers(model), chosen)
    assert found.keys() == whole.keys()
    for key, (own,) in found.items():
        assert all(map(torch.equal, own, whole[key][0]))
    assert list(tmp_path.iterdir()) == []
    assert list(sweep(model, chosen, tokens, store=store, finished=finished.__contains__)) == []


class Absent:
    """Weights of layers that are there only while they are asked for."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.kept, self.most = model, {}, 0
        self.names = decoder_layers(model)
        for name in self.names:
            self.kept[name] = {key: value.clone() for key, value in model.get_submodule(name).state_dict().items()}
            self._wipe(name)

    def _wipe(self, name: str) -> None:
        for parameter in self.model.get_submodule(name).parameters():
            parameter.data.fill_(torch.nan)

    @contextmanager
    def loaded(self, modules: Sequence[str]) -> Iterator[None]:
        for name in modules:
            self.model.get_submodule(name).load_state_dict(self.kept[name])
        present = sum(not next(self.model.get_submodule(name).parameters()).isnan().any() for name in self.names)
        self.most = max(self.most, present)
        yield
        for name in modules:
            self._wipe(name)


@pytest.mark.parametrize("name", ["llama", "gpt-neox", "tuples"])
def test_only_one_group_has_to_be_in_memory(name: str) -> None:
    model, tokens = net(name)
    chosen = linears(model)
    expected = whole_gradients(model, chosen, tokens, "sampled")
    weights = Absent(model)
    found = Layers(model, weights)
    assert len(found) == NETS[name][1]
    store = HiddenStore(memory=1 << 30)
    visits = gradient_visits(found, chosen, tokens, seed=3, labels="sampled", batch_size=2, store=store)
    for key, (own,) in replayed(visits, [[0], [1], [2]]).items():
        for one, other in zip(own, expected[key], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * other.abs().max().item())
    assert weights.most == 1


# Hidden states


def test_hidden_states_are_the_same_in_memory_and_in_files(tmp_path: Path) -> None:
    model, tokens = net("llama")
    found = Layers(model)
    inside, outside = (
        forward(found, tokens, batch_size=2, store=HiddenStore(memory=memory, directory=tmp_path)) for memory in (1 << 30, 0)
    )
    assert [states.path is None for states in (*inside, *outside)] == [True] * 3 + [False] * 3
    for one, other in zip(inside, outside, strict=True):
        for rows in ([0, 1, 2], [2], [1, 0]):
            assert torch.equal(one.read(rows), other.read(rows))
    chosen = linears(model)
    ways = [
        replayed(sweep(model, chosen, tokens, store=HiddenStore(memory=memory, directory=tmp_path / "other")), [[0, 2], [1]])
        for memory in (1 << 30, 40_000, 0)
    ]
    for way in ways[1:]:
        assert all(torch.equal(one, other) for key in way for one, other in zip(way[key][0], ways[0][key][0], strict=True))
    assert list((tmp_path / "other").iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_is_read_until_it_is_dropped(tmp_path: Path, dtype: torch.dtype) -> None:
    store = HiddenStore(memory=3 * 4 * 5 * dtype.itemsize, directory=tmp_path)
    values = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    first, second = (store.new(name, (3, 4, 5), dtype) for name in ("a", "b"))
    assert (first.path, second.path) == (None, tmp_path / "b.bin")
    for states in (first, second):
        states.write([2, 0], values[[2, 0]])
        states.write([1], values[1:2])
        states.finish()
        assert torch.equal(states.read([0, 1, 2]), values)
        states.read([0]).zero_()
        assert torch.equal(states.read([0]), values[:1])
    store.drop(first)
    store.drop(second)
    assert list(tmp_path.iterdir()) == []
    assert store.new("c", (3, 4, 5), dtype).path is None  # what was dropped is free again


def test_a_kept_state_is_found_when_it_is_whole(tmp_path: Path) -> None:
    store, shape, values = HiddenStore(memory=1 << 30, directory=tmp_path, kept=True), (2, 3, 4), torch.randn(2, 3, 4)
    states = store.new("a", shape, torch.float32)
    states.write([0, 1], values)
    assert store.find("a", shape, torch.float32) is None
    states.finish()
    again = HiddenStore(memory=0, directory=tmp_path, kept=True)
    found = again.find("a", shape, torch.float32)
    assert found is not None
    assert torch.equal(found.read([1]), values[1:])
    assert again.find("a", (2, 3, 5), torch.float32) is None
    assert HiddenStore(memory=0, directory=tmp_path).find("a", shape, torch.float32) is None


def test_a_short_file_is_one_clear_error(tmp_path: Path) -> None:
    states = HiddenStates((3, 4, 5), torch.float32, tmp_path / "a.bin")
    states.write([0, 1, 2], torch.ones(3, 4, 5))
    states.finish()
    with (tmp_path / "a.bin").open("r+b") as file:
        file.truncate(3 * 80 - 1)
    assert torch.equal(states.read([0, 1]), torch.ones(2, 4, 5))
    with pytest.raises(StorageError, match=r"a\.bin is shorter than it should be"):
        states.read([2])
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="writing"):
        HiddenStates((1, 1, 1), torch.float32, tmp_path / "file" / "a.bin")
