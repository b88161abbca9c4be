"""What Transformers with auto-round makes of our directories: weights are ours to the last bit, logits to the rounding of 16 bits.

auto-round has two kinds of linears for the CPU. Those in torch multiply codes and scales in float16, in which each weight is the float16
number next to ours. The kernels of auto-round-lib, which it takes by itself where they are installed, have no 3 bits; in float32 their
weights are ours.

Needs auto-round and auto-round-lib: `make test-auto-round` installs it, in an environment of its own; the ordinary tests skip this file.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoRoundConfig

import roundel
from e2e import tiny
from e2e.test_experts import original
from roundel.artifacts.checkpoints import load_written, read
from roundel.models import load_model, load_tokenizer, locate
from roundel.rounding.round import dequantized
from roundel.stages.text import evaluation_tokens

pytest.importorskip("auto_round")

pytestmark = pytest.mark.filterwarnings("default")  # of what auto-round imports

MODEL, TEXT = "demo", "stdlib-heldout"
SETTINGS: dict[str, Any] = {"calibration": "stdlib", "effort": "quick", "sequences": 64, "seq_len": 128, "eval_sequences": 32}
KINDS: dict[str, dict[str, Any]] = {
    "int2-g32": {},
    "int3-g64": {},
    "int8-channel": {},
    "int4-g64-asym": {},
    "int3-channel-asym": {},
    "mixed": {"scheme": "int4-g64", "bits": 3.6},
    "mixed, zero points": {"scheme": "int4-g32-asym", "bits": 4.1},
    "some left alone": {"scheme": "int4-g64", "exclude": "*.0.mlp.up_proj"},
}


@pytest.fixture(scope="module", params=list(KINDS))
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("auto-round") / "out"
    options = {"scheme": request.param, **SETTINGS, **KINDS[request.param]}
    line = [sys.executable, "-m", "roundel", "quantize", MODEL, "-o", str(path), "--quiet", "--format", "auto-round"]
    subprocess.run([*line, *(f"--{name.replace('_', '-')}={value}" for name, value in options.items())], check=True)
    return path


def loaded(path: Path, backend: str, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, quantization_config=AutoRoundConfig(backend=backend))


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    return torch.cat([model(row[None], use_cache=False).logits.float() for row in ids])


def kl(of: Tensor, to: Tensor) -> float:
    p, q = of.log_softmax(-1), to.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


@torch.no_grad()
def test_its_linears_have_the_very_weights(written: Path) -> None:
    model = loaded(written, "torch", torch.float16)
    packed = {name for name, module in model.named_modules() if hasattr(module, "qweight")}
    weights = read(written).rounded
    assert packed == weights.keys()
    for name, weight in weights.items():
        found = model.get_submodule(name)(torch.eye(weight.shape[1], dtype=torch.float16)).T
        assert torch.equal(found, dequantized(weight).half()), name
    config = json.loads((written / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert len({weight.scheme for weight in weights.values()}) == 1 or "extra_config" in config


@torch.no_grad()
def test_its_kernels_have_them_too(written: Path) -> None:
    weights = read(written).rounded
    if any(weight.scheme.startswith("int3") for weight in weights.values()):
        pytest.skip("auto-round-lib has no kernels for 3 bits")
    model = loaded(written, "ark", torch.float32)
    for name, weight in weights.items():
        module = model.get_submodule(name)
        assert type(module).__module__.startswith("auto_round_kernel")
        assert torch.equal(module(torch.eye(weight.shape[1])).T, dequantized(weight)), name


def test_logits_and_kl(written: Path) -> None:
    tokens = evaluation_tokens(TEXT, load_tokenizer(locate(MODEL)), 64, 4).ids
    cpu = torch.device("cpu")
    truth = logits(load_model(locate(MODEL), device=cpu, dtype=torch.float32), tokens)
    expected = logits(load_written(written, device=cpu, dtype=torch.float32), tokens)
    found = logits(loaded(written, "torch", torch.float16), tokens)
    measured, theirs = kl(truth, expected), kl(truth, found)
    print(
        f"\n{json.loads((written / 'roundel.json').read_text(encoding='utf-8'))['scheme']}: KL {measured:.5f}, in auto-round {theirs:.5f}"
    )
    assert (found - expected).abs().max() < 0.01 * expected.abs().max()
    assert theirs == pytest.approx(measured, rel=0.02, abs=2e-5)


@pytest.mark.parametrize("name", ["qwen3-moe", "deepseek-v3"])
@torch.no_grad()
def test_experts_are_found_one_by_one(name: str, tmp_path: Path) -> None:
    """Also a router that is no linear, and with the latter a linear of widths that the format does not hold."""
    source, output, text = tmp_path / name, tmp_path / "out", tmp_path / "text.txt"
    tokenizer = tiny.make_tokenizer(starts=False)
    tokenizer.save_pretrained(source)
    original(name, len(tokenizer)).to(torch.bfloat16).save_pretrained(source)
    text.write_text(tiny.make_text(9000), encoding="utf-8")
    short: dict[str, Any] = {"sequences": 8, "seq_len": 32, "eval_sequences": 2, "curvature": "identity", "sweeps": 0}
    roundel.quantize(source, output=output, calibration=str(text), scheme="int4-g32", format="auto-round", **short)
    ids = torch.arange(5, 45).view(2, 20)
    # first: auto-round takes away how Transformers puts experts together, for the whole process
    expected = logits(load_written(output, device=torch.device("cpu"), dtype=torch.float32), ids)
    model = loaded(output, "torch", torch.float16)
    for module, weight in read(output).rounded.items():
        found = model.get_submodule(module)(torch.eye(weight.shape[1], dtype=torch.float16)).T
        assert torch.equal(found, dequantized(weight).half()), module
    assert (logits(model, ids) - expected).abs().max() < 0.01 * expected.abs().max()
