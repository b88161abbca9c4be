"""What running a group of layers tells of its linears: order, shared inputs, and what is added to the stream."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, GraniteConfig, GraniteForCausalLM

from e2e.tiny import GROUPED, SIZES, architectures, make_model
from roundel.sweeps import Layers
from roundel.sweeps.watch import Readers, observe, reading_order

ATTENTION, MLP = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")
SEQUENTIAL = [ATTENTION, ("self_attn.o_proj",), MLP, ("mlp.down_proj",)]
NEOX = [("attention.query_key_value",), ("attention.dense",), ("mlp.dense_h_to_4h",), ("mlp.dense_4h_to_h",)]
LLAMA = (SEQUENTIAL, ("self_attn.o_proj", "mlp.down_proj"))


def seeded(make: Callable[..., nn.Module], config: Any) -> nn.Module:
    torch.manual_seed(0)
    return make(config).eval()


def neox_in_sequence() -> nn.Module:
    return seeded(GPTNeoXForCausalLM, GPTNeoXConfig(**SIZES, intermediate_size=96, use_parallel_residual=False))


def granite() -> nn.Module:
    config = GraniteConfig(**GROUPED, residual_multiplier=0.22, embedding_multiplier=3.0, attention_multiplier=0.2, logits_scaling=2.0)
    return seeded(GraniteForCausalLM, config)


EXPECTED: dict[str, tuple[list[tuple[str, ...]], tuple[str, ...]]] = {
    "llama": LLAMA,
    "llama-tied": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "mistral": LLAMA,
    "gemma2": (SEQUENTIAL, ()),  # a norm comes between the linear and the stream
    "gemma3": (SEQUENTIAL, ()),
    "phi3": (
        [("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)],
        ("self_attn.o_proj", "mlp.down_proj"),
    ),
    "opt": (
        [ATTENTION, ("self_attn.out_proj",), ("fc1",), ("fc2",)],
        ("self_attn.out_proj", "fc2"),
    ),  # its MLP is given all tokens in a row
    "gpt-neox": (NEOX, ("attention.dense", "mlp.dense_4h_to_h")),
    "gpt-neox-in-sequence": (NEOX, ("attention.dense", "mlp.dense_4h_to_h")),
    "granite": LLAMA,
}
OTHERS = {"gpt-neox-in-sequence": neox_in_sequence, "granite": granite}


def watched(name: str, index: int = 1) -> tuple[Layers, Tensor, Tensor, dict[str, nn.Module], str]:
    model = OTHERS[name]() if name in OTHERS else make_model(name)
    layers = Layers(model)
    ids = torch.randint(2, 300, (2, 40), generator=torch.Generator().manual_seed(1))
    hidden = layers.embed(ids)
    for before in range(index):
        with torch.no_grad():
            hidden = layers.run(before, ids, hidden)
    prefix = f"{layers.groups[index][0]}."
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and name.startswith(prefix)}
    return layers, ids, hidden, dict(reversed(linears.items())), prefix  # reversed: names must not tell the order


def test_all_architectures_are_expected() -> None:
    assert set(EXPECTED) == {*architectures(), *OTHERS}


@pytest.mark.parametrize("name", EXPECTED)
def test_order_shared_inputs_and_additions(name: str) -> None:
    layers, ids, hidden, linears, prefix = watched(name)
    before = hidden.clone()
    found = reading_order(layers, 1, ids, hidden, linears)
    reads, added = EXPECTED[name]
    assert [tuple(own.removeprefix(prefix) for own in readers.names) for readers in found] == reads
    assert tuple(own.removeprefix(prefix) for readers in found for own in readers.added if readers.per_token) == added
    assert all(readers.per_token for readers in found)
    assert torch.equal(hidden, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in layers.model.modules())


@pytest.mark.parametrize("name", [name for name, (_, added) in EXPECTED.items() if added])
def test_the_rest_is_what_the_stream_would_be_without_the_linear(name: str) -> None:
    layers, ids, hidden, linears, prefix = watched(name)
    added = [prefix + own for own in EXPECTED[name][1]]
    seen, output = observe(layers, 1, ids, hidden, linears, added=added, stop=False)
    with torch.no_grad():
        assert torch.equal(output, layers.run(1, ids, hidden))
    for own in added:
        module = linears[own]
        assert seen[own].factor == pytest.approx(0.22 if name == "granite" else 1)
        assert seen[own].runs == 1
        part = seen[own].factor * module(seen[own].x)
        if own.endswith(("down_proj", "4h_to_h", "fc2")) or name == "gpt-neox":  # nothing comes after it but the sum
            torch.testing.assert_close(seen[own].rest + part, output, rtol=1e-4, atol=1e-4)
        else:
            torch.testing.assert_close(seen[own].rest, hidden, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt-neox", "granite"])
def test_an_early_stop_has_seen_the_same(name: str) -> None:
    layers, ids, hidden, linears, prefix = watched(name)
    ran: list[str] = []
    for own, module in linears.items():
        module.register_forward_hook(lambda _module, _args, _output, own=own: ran.append(own))
    whole, _ = observe(layers, 1, ids, hidden, linears, added=[prefix + own for own in EXPECTED[name][1]], stop=False)
    order = [prefix + own for names in EXPECTED[name][0] for own in names]
    for place, own in enumerate(order):
        added = [own] if own.removeprefix(prefix) in EXPECTED[name][1] else []
        ran.clear()
        seen, _ = observe(layers, 1, ids, hidden, {own: linears[own]}, added=added, stop=True)
        assert torch.equal(seen[own].x, whole[own].x)
        if added:
            assert torch.equal(seen[own].rest, whole[own].rest)
        assert ran[:place] == order[:place]
        if name != "gpt-neox" or not added:  # there the sum is formed at the very end
            assert len(ran) == place + len(added)


class Experts(nn.Module):
    """The first linear sees all tokens, each of two experts some of them, and the last one none."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.idle = nn.Linear(8, 8), nn.Linear(8, 1), nn.Linear(8, 8)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        chosen, flat = (self.gate(x) > 0).flatten(), x.flatten(0, 1).clone()
        for expert, own in zip(self.experts, (chosen, ~chosen), strict=True):
            flat[own] = flat[own] + expert(flat[own])
        return flat.view(x.shape)


class Mixture(nn.Module):
    """Layers of experts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)
        self.layers = nn.ModuleList(Experts() for _ in range(2))

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        return SimpleNamespace(logits=self.head(x))


def test_experts_and_linears_that_do_not_run_have_no_row_for_each_token() -> None:
    layers = Layers(Mixture())
    linears = {name: module for name, module in layers.model.named_modules() if isinstance(module, nn.Linear) and "layers.0" in name}
    ids = torch.arange(18).view(2, 9)
    found = reading_order(layers, 0, ids, layers.embed(ids), linears)
    assert found == [
        Readers(names=("layers.0.first",), added=("layers.0.first",), per_token=True),
        Readers(names=("layers.0.gate",), added=(), per_token=True),
        Readers(names=("layers.0.experts.0",), added=(), per_token=False),
        Readers(names=("layers.0.experts.1",), added=(), per_token=False),
        Readers(names=("layers.0.idle",), added=(), per_token=False),
    ]


class InPlace(nn.Module):
    """Adds to what a linear has written, in place and with all tokens in a row, before that is added to the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        y = self.one(flat)
        y.add_(self.other(flat))
        return x + y.view(x.shape)


def test_the_rest_of_an_output_that_is_added_to_in_place() -> None:
    model = Mixture()
    model.layers = nn.ModuleList(InPlace() for _ in range(2))
    layers, ids = Layers(model), torch.arange(18).view(2, 9)
    hidden = layers.embed(ids)
    own = {name: model.get_submodule(name) for name in ("layers.0.one", "layers.0.other")}
    seen, output = observe(layers, 0, ids, hidden, own, added=list(own), stop=False)
    with torch.no_grad():
        for name, module in own.items():
            assert seen[name].rest.shape == hidden.shape
            torch.testing.assert_close(seen[name].rest + module(hidden), output)
