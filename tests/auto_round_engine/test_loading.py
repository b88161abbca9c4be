"""What Transformers with auto-round makes of our directories: weights are ours to the last bit, logits to the rounding of 16 bits.

auto-round's linears for the CPU multiply codes and scales in float16, in which each weight is the float16 number next to ours.

Needs auto-round: `make test-auto-round` installs it, in an environment of its own; the ordinary tests skip this file.
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
from transformers import AutoModelForCausalLM

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


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    return torch.cat([model(row[None], use_cache=False).logits.float() for row in ids])


def kl(of: Tensor, to: Tensor) -> float:
    p, q = of.log_softmax(-1), to.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


@torch.no_grad()
def test_its_linears_have_the_very_weights(written: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(written, dtype=torch.float16)
    packed = {name for name, module in model.named_modules() if hasattr(module, "qweight")}
    weights = read(written).rounded
    assert packed == weights.keys()
    for name, weight in weights.items():
        found = model.get_submodule(name)(torch.eye(weight.shape[1], dtype=torch.float16)).T
        assert torch.equal(found, dequantized(weight).half()), name
    config = json.loads((written / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert len({weight.scheme for weight in weights.values()}) == 1 or "extra_config" in config


def test_logits_and_kl(written: Path) -> None:
    tokens = evaluation_tokens(TEXT, load_tokenizer(locate(MODEL)), 64, 4).ids
    cpu = torch.device("cpu")
    truth = logits(load_model(locate(MODEL), device=cpu, dtype=torch.float32), tokens)
    expected = logits(load_written(written, device=cpu, dtype=torch.float32), tokens)
    found = logits(AutoModelForCausalLM.from_pretrained(written, dtype=torch.float16), tokens)
    measured, theirs = kl(truth, expected), kl(truth, found)
    print(
        f"\n{json.loads((written / 'roundel.json').read_text(encoding='utf-8'))['scheme']}: KL {measured:.5f}, in auto-round {theirs:.5f}"
    )
    assert (found - expected).abs().max() < 0.01 * expected.abs().max()
    assert theirs == pytest.approx(measured, rel=0.02, abs=2e-5)
