"""Linears under another name: GPT-2's transposed `Conv1D`, and Falcon's subclass."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, FalconConfig, GPT2Config
from transformers.pytorch_utils import Conv1D

import roundel
from e2e import tiny
from roundel.artifacts.checkpoints import read
from roundel.errors import SchemeError
from roundel.models.load import load_model
from roundel.models.plain import as_linears, is_turned
from roundel.rounding.round import dequantized

Quantize = Callable[..., roundel.Quantized]
CPU = torch.device("cpu")


def make(name: str, vocabulary: int) -> nn.Module:
    torch.manual_seed(0)
    if name == "gpt2":
        config = GPT2Config(vocab_size=vocabulary, n_embd=64, n_layer=2, n_head=4, n_positions=128, initializer_range=0.1)
    else:
        config = FalconConfig(vocab_size=vocabulary, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.1)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module", params=["gpt2", "falcon"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer, path = tiny.make_tokenizer(starts=False), tmp_path_factory.mktemp("source") / request.param
    make(request.param, len(tokenizer)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("memory", [None, "1K"])
def test_all_matrices_are_quantized_and_read_back(source: Path, memory: str | None, quantize: Quantize, tmp_path: Path) -> None:
    result = quantize(source, tmp_path / "out", scheme="int4-g32", memory=memory)
    assert result.details["coverage"]["share"] == 1.0
    assert len(result.details["layers"]) == 8
    turned = source.name == "gpt2"
    assert result.details["format"] == "native"
    reason = (
        "stored transposed (Conv1D)" if turned else "fails to load packed linears of falcon (AttributeError: 'FalconLinear' object has no"
    )
    assert any(reason in line for line in result.details["warnings"])
    loaded, stored = load_model(result.path, device=CPU, dtype=torch.float32), read(result.path).rounded
    for name, weight in stored.items():
        module = loaded.get_submodule(name)
        assert torch.equal(module.dequantized(), dequantized(weight))
    roundel.export(result.path, to="dense", output=tmp_path / "dense")
    dense, original = load_file(tmp_path / "dense" / "model.safetensors"), load_file(source / "model.safetensors")
    assert {name: value.shape for name, value in dense.items()} == {name: value.shape for name, value in original.items()}
    whole = load_model(tmp_path / "dense", device=CPU, dtype=torch.float32)
    for name, weight in stored.items():
        own = whole.get_submodule(name).weight
        assert torch.equal(own.T if turned else own, dequantized(weight))


def test_a_format_whose_readers_know_none_of_it_is_refused(source: Path, quantize: Quantize, tmp_path: Path) -> None:
    if source.name != "gpt2":
        pytest.skip("its linears are as all others")
    with pytest.raises(SchemeError, match=r"stored transposed \(Conv1D\).*use --format native"):
        quantize(source, tmp_path / "out", scheme="int4-g32", format="compressed-tensors")
    result = quantize(source, tmp_path / "dense", scheme="int4-g32", format="dense")
    written = load_file(result.path / "model.safetensors")
    assert all(written[row["tensor"]].shape == tuple(reversed(row["shape"])) for row in result.details["layers"].values())


class Scaled(nn.Linear):
    """Computes something else."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Same(nn.Linear):
    """Computes the same in another way."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T + self.bias


def test_subclasses_are_taken_for_linears_by_what_they_compute() -> None:
    model = nn.ModuleDict({"scaled": Scaled(4, 6), "same": Same(4, 6), "turned": Conv1D(6, 4)})
    kept, x = {name: value.clone() for name, value in model.state_dict().items()}, torch.randn(3, 4)
    wanted = {name: module(x) for name, module in model.items()}
    as_linears(model)
    assert [type(module) for module in model.values()] == [Scaled, nn.Linear, nn.Linear]
    assert [is_turned(module) for module in model.values()] == [False, False, True]
    for name, module in model.items():
        torch.testing.assert_close(module(x), wanted[name])
        assert torch.equal(module.weight.T if name == "turned" else module.weight, kept[f"{name}.weight"])
