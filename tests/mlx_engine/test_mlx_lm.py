"""What mlx-lm makes of our directories: weights, logits, greedy text and KL are ours.

MLX computes in the type of the scales. With scales, norms and embedding made float32 the very same model runs in float32, and its logits
are ours to a part in a thousand. In 16 bits any model's logits differ, the dense original's too: that is the engine's noise. What MLX's
products for CPUs lose in bfloat16 beside that, which is more, is printed.

Needs mlx-lm: `make test-mlx` installs it, in an environment of its own; the ordinary tests skip this file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine_rows import served
from roundel.artifacts.checkpoints import load_written, read
from roundel.models import load_model, load_tokenizer, locate
from roundel.rounding.round import dequantized
from roundel.stages.text import evaluation_tokens

mx = pytest.importorskip("mlx.core")
mlx_lm = pytest.importorskip("mlx_lm")

MODELS = ["demo", *filter(None, [os.environ.get("ROUNDEL_MODEL")])]
SETTINGS: dict[str, Any] = {
    "calibration": "stdlib",
    "effort": "quick",
    "sequences": 64,
    "seq_len": 128,
    "eval_data": "stdlib-heldout",
    "eval_sequences": 32,
}
KINDS: dict[str, dict[str, Any]] = {
    "int4-g64-affine": {},
    "int3-g64": {},
    "int2-g32-affine": {},
    "mixed": {"scheme": "int4-g64-affine", "bits": 5.0},
}
TEXT = "stdlib-heldout"


@pytest.fixture(scope="module", params=MODELS)
def original(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module", params=list(KINDS))
def written(request: pytest.FixtureRequest, original: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mlx") / "out"
    options = {"scheme": request.param, **SETTINGS, **KINDS[request.param]}
    line = [
        sys.executable,
        "-m",
        "roundel",
        "quantize",
        original,
        "-o",
        str(path),
        "--quiet",
        "--format",
        "mlx",
    ]  # where types are not checked
    subprocess.run([*line, *(f"--{name.replace('_', '-')}={value}" for name, value in options.items())], check=True)
    return path


@pytest.fixture(scope="module")
def tokens(original: str) -> Tensor:
    return evaluation_tokens(TEXT, load_tokenizer(locate(original)), 64, 4).ids


def engine(path: Path, *, dtype: Any = mx.float32) -> Any:
    model, _ = mlx_lm.load(str(path))
    model.set_dtype(dtype)
    return model


def logits(model: Any, ids: Tensor) -> Tensor:
    found = [model(mx.array(row[None].numpy())).astype(mx.float32) for row in ids]
    return torch.from_numpy(np.concatenate([np.array(each) for each in found]))


@torch.no_grad()
def of_torch(model: Any, ids: Tensor) -> Tensor:
    return torch.cat([model(row[None], use_cache=False).logits for row in ids])


def kl(of: Tensor, to: Tensor) -> float:
    p, q = of.log_softmax(-1), to.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


def module_of(model: Any, name: str) -> Any:
    for part in name.split("."):
        model = model[int(part)] if part.isdigit() else getattr(model, part)
    return model


def test_its_own_dequantisation_finds_the_very_weights(written: Path) -> None:
    model = engine(written)
    for name, weight in read(written).rounded.items():
        module = module_of(model, name)
        found = np.array(mx.dequantize(module.weight, module.scales, module.biases, module.group_size, module.bits))
        expected = dequantized(weight).numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max() * 2**module.bits)


def test_logits_text_and_kl(written: Path, original: str, tokens: Tensor) -> None:
    scheme = json.loads((written / "roundel.json").read_text(encoding="utf-8"))["scheme"]
    reference = load_model(locate(original), device=torch.device("cpu"), dtype=torch.float32)
    ours = load_written(written, device=torch.device("cpu"), dtype=torch.float32)
    truth, expected = of_torch(reference, tokens), of_torch(ours, tokens)
    exact = logits(engine(written), tokens)
    assert (exact - expected).abs().max() < 1e-3 * expected.abs().max()
    measured = kl(truth, expected)
    assert kl(truth, exact) == pytest.approx(measured, rel=0.01)

    noise = kl(truth, logits(engine(locate(original), dtype=mx.bfloat16), tokens))
    usual = {str(kind): kl(truth, logits(engine(written, dtype=kind), tokens)) for kind in (mx.bfloat16, mx.float16)}
    print(f"\n{original} {scheme}: KL {measured:.5f}, in MLX {usual}; of the dense original in bfloat16 {noise:.5f}")
    assert abs(usual["mlx.core.float16"] - measured) < 3 * noise + 0.02 * measured


def test_greedy_text(written: Path) -> None:
    model, ours = engine(written), load_written(written, device=torch.device("cpu"), dtype=torch.float32)
    prompt = load_tokenizer(written)("def read_file(path):\n").input_ids
    found, expected = list(prompt), list(prompt)
    for _ in range(8):
        found.append(int(logits(model, torch.tensor([found]))[0, -1].argmax()))
        expected.append(int(of_torch(ours, torch.tensor([expected]))[0, -1].argmax()))
    assert found == expected


def test_served_as_users_have_it(written: Path, original: str) -> None:
    """In the directory's own 16 bits; its row is in benchmarks/results/engines-mlx.json."""
    found = served(written, Path(original).name, engine="mlx", original=original, sequences=4)
    assert found is not None
    assert found["kl"]["engine"] == pytest.approx(found["kl"]["ours"], rel=0.05, abs=0.005)  # see the head of this file; int3-g64 has .0039
