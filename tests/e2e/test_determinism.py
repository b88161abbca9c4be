"""The seed decides every byte; the batch size decides none."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from oracles.tiny import label_gradient
from roundel.calibration import read_documents, windows
from roundel.grids import parse_scheme
from roundel.models import load_model, load_tokenizer, select_linears
from roundel.sweeps import Layers, safe_batch_size
from roundel.types import TokenBatch

FILES = ("model.safetensors", "config.json")
SAME = {
    "same-seed": {},
    "batch-1": {"batch_size": 1},
    "batch-3": {"batch_size": 3},
}


@pytest.fixture(scope="module", params=["llama", "gpt-neox"])
def first(request, model, quantize, tmp_path_factory):
    source = model(request.param)
    return source, quantize(source, tmp_path_factory.mktemp("first") / "out", scheme="int3-g32", seed=5)


def contents(directory) -> list[bytes]:
    return [(directory / file).read_bytes() for file in FILES]


@pytest.mark.parametrize("options", SAME.values(), ids=SAME)
def test_same_seed_same_bytes(first, quantize, tmp_path, options) -> None:
    source, result = first
    again = quantize(source, tmp_path / "out", scheme="int3-g32", seed=5, **options)
    assert contents(again.path) == contents(result.path)
    volatile = {"seconds", "resources", "layers"}
    assert {k: v for k, v in again.details.items() if k not in volatile} == {k: v for k, v in result.details.items() if k not in volatile}


@pytest.mark.parametrize("first", ["llama"], indirect=True)
def test_two_threads(first, quantize, tmp_path) -> None:
    """The same number gives the same bytes; another one may not, and is as good."""
    source, result = first
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        one, other = (quantize(source, tmp_path / name, scheme="int3-g32", seed=5) for name in ("one", "other"))
    finally:
        torch.set_num_threads(threads)
    assert contents(one.path) == contents(other.path)
    assert abs(one.report.kl_mean - result.report.kl_mean) < result.report.kl_stderr


def test_another_seed_gives_another_checkpoint(first, quantize, tmp_path) -> None:
    source, result = first
    other = quantize(source, tmp_path / "out", scheme="int3-g32", seed=6)
    weights, config = contents(other.path)
    assert weights != contents(result.path)[0]
    assert config == contents(result.path)[1]
    # The held-out text does not depend on the seed, so that seeds can be compared.
    assert other.details["evaluation"]["sha256"] == result.details["evaluation"]["sha256"]
    assert other.details["calibration"]["sha256"] != result.details["calibration"]["sha256"]


class RowByRow(nn.Linear):
    """A linear whose products have the same shape for every batch size."""

    def forward(self, x):
        return torch.stack([nn.functional.linear(row, self.weight, self.bias) for row in x])


class Block(nn.Module):
    """A layer whose numbers depend, if there is noise, on how many sequences it sees together, and on nothing else of the batch."""

    def __init__(self, noise: float, noisy_size: int) -> None:
        super().__init__()
        self.first, self.second = RowByRow(8, 8), RowByRow(8, 8)
        self.noise, self.noisy_size = noise, noisy_size

    def forward(self, x):
        x = self.first(x).tanh()
        if len(x) == self.noisy_size:
            x = x * (1 + self.noise)
        return self.second(x)


class Batchy(nn.Module):
    """A model of such layers."""

    def __init__(self, noise: float, noisy_size: int) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(50, 8), RowByRow(8, 50)
        self.layers = nn.ModuleList(Block(noise, noisy_size) for _ in range(2))

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids, use_cache=False) -> SimpleNamespace:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        return SimpleNamespace(logits=self.head(x))


@pytest.mark.parametrize(
    ("noise", "noisy_size", "expected"),
    [
        (0.0, 4, 4),
        (1e-6, 4, 1),
        (1e-6, 2, 1),  # only the last, smaller batch: 10 = 4 + 4 + 2
        (1e-6, 3, 4),  # a size that does not occur
    ],
)
def test_batches_that_change_bits_are_not_used(noise, noisy_size, expected) -> None:
    torch.manual_seed(0)
    model = Batchy(noise, noisy_size).eval()
    tokens = TokenBatch(ids=torch.randint(50, (10, 16)), sequence_ids=tuple(range(10)))
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    layers = Layers(model)
    assert safe_batch_size(layers, linears, tokens, batch_size=4) == expected
    assert safe_batch_size(layers, linears, tokens, batch_size=1) == 1
    assert all(p.requires_grad for p in model.parameters())


def test_never_more_than_there_are_sequences(model, text) -> None:
    loaded = load_model(model(), device=torch.device("cpu"), dtype=torch.float32)
    tokens = windows(read_documents(str(text), load_tokenizer(model())), load_tokenizer(model()), 16, most=3)
    linears = select_linears(loaded, parse_scheme("int4-g32").check).linears
    batch = TokenBatch(ids=tokens, sequence_ids=(0, 1, 2))
    assert safe_batch_size(Layers(loaded), linears, batch, batch_size=64) in (1, 3)


def test_the_seed_decides_the_labels() -> None:
    tokens = TokenBatch(ids=torch.zeros(2, 40, dtype=torch.int64), sequence_ids=(7, 8))
    logits = torch.zeros(2, 40, 50)
    labels = [label_gradient(logits, tokens, seed).argmin(-1) for seed in (0, 0, 1)]
    assert torch.equal(labels[0], labels[1])
    assert not torch.equal(labels[0], labels[2])
    assert not torch.equal(labels[0][0], labels[0][1])
