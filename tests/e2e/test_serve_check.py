"""`roundel serve-check`: what it says of an engine that computes the same, something else, or nothing.

The engine is a small script run as the real ones are (`engines.child`). It looks up what Transformers has computed; real engines are in
`tests/vllm_engine`, `tests/mlx_engine` and `tests/llama`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from roundel.commands import serve_check as checking
from roundel.commands.serve_check import serve_check
from roundel.engines import ENGINES
from roundel.errors import ModelError, SchemeError
from roundel.models import load_tokenizer
from roundel.stages.text import evaluation_tokens

ENGINE = """
import os, signal
import numpy as np

FLAW = {flaw!r}

def open_engine(request):
    print("Using NoKernel for nothing")
    if FLAW == "missing":
        import an_engine_that_is_not_there
    if FLAW == "raises":
        raise ValueError("no place for weight_packed\\n  in this engine\\n")
    if FLAW == "killed":
        print("RuntimeError: out of everything", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    known = np.load({truth!r})
    original = "roundel.json" not in os.listdir(request["model"])

    def rows_of(window):
        (number,) = (k for k, own in enumerate(known["windows"]) if own.tolist() == window)
        rows = known["original" if original else "written"][number]
        rows = (1.5 if FLAW == "scaled" and not original else 1) * rows + known["noise"]
        rows -= np.log(np.exp(rows).sum(-1, keepdims=True))
        return rows[:, :-1] if FLAW == "narrow" else rows

    def continued(prompt, count):
        (number,) = (k for k, own in enumerate(known["prompts"]) if own.tolist() == prompt)
        found = known["greedy"][number, :count].tolist()
        return [*found[:-1], (found[-1] + 1) % 300] if FLAW == "greedy" else found

    return rows_of, continued
"""


@pytest.fixture(scope="module")
def truth(quantized, model, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Log-probabilities and greedy tokens as Transformers has them."""
    windows = evaluation_tokens(str(text), load_tokenizer(quantized.path), 32, 4).ids
    found: dict[str, Any] = {
        "windows": windows,
        "prompts": windows[:3, :16],
        "noise": 0.01 * torch.arange(300.0, dtype=torch.float64).cos(),
    }
    with torch.no_grad():
        for name, path in (("written", quantized.path), ("original", model())):
            net = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
            found[name] = net(windows).logits.log_softmax(-1)
            if name == "written":
                ids = windows[:3, :16]
                for _ in range(24):
                    ids = torch.cat([ids, net(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
                found["greedy"] = ids[:, 16:]
    file = tmp_path_factory.mktemp("truth") / "truth.npz"
    np.savez(file, **{name: value.numpy() for name, value in found.items()})
    return file


@pytest.fixture
def engine(truth: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`engine(flaw)`: such a one in place of vLLM, or of another."""

    def install(flaw: str, name: str = "vllm") -> None:
        file = tmp_path / "engine.py"
        file.write_text(ENGINE.format(flaw=flaw, truth=str(truth)), encoding="utf-8")
        monkeypatch.setitem(ENGINES, name, dataclasses.replace(ENGINES[name], file=file, kernels=r"(Using \w+Kernel)"))

    return install


@pytest.fixture
def check(quantized, text: Path, engine, command) -> Callable[..., Any]:
    """`check(flaw, ...)` runs the command on the tiny Llama."""

    def run(flaw: str, *more: object) -> Any:
        engine(flaw)
        return command("serve-check", quantized.path, "--engine", "vllm", "--data", text, *more)

    return run


def test_an_engine_that_computes_the_same(check, quantized, model, truth: Path, tmp_path: Path) -> None:
    outcome = check("", "--json", tmp_path / "found.json", "--log", tmp_path / "log", "--original", model())
    assert outcome.code == 0, outcome.err
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["windows"] == [4, 32]
    assert found["difference"]["logprob_max"] < 0.03
    with np.load(truth) as known:
        same = (known["written"] + known["noise"]).argmax(-1) == known["written"].argmax(-1)
    assert found["difference"]["top1_agreement"] == same.mean() > 0.95
    for each in (found["difference"], found["noise"]):  # half the variance of the noise
        assert each["kl"] == pytest.approx(2.5e-5, rel=0.1)
    assert found["kl"]["engine"] == pytest.approx(found["kl"]["ours"], rel=0.05)
    assert found["kl"]["ours"] > 10 * found["difference"]["kl"]
    assert found["kl"]["report"] == quantized.details["evaluation"]["kl"]["mean"]
    assert found["greedy"] == {"tokens": 72, "equal": 72, "tied": 0, "different": 0, "largest_gap": 0.0}
    assert found["kernels"] == ["Using NoKernel"]
    assert found["versions"]["numpy"] == np.__version__
    assert found["tolerance"] == 0.005
    assert "72 of 72 tokens equal" in outcome.out
    assert "Using NoKernel for nothing" in (tmp_path / "log").read_text()


def test_json_alone_on_standard_output_and_no_original(check) -> None:
    outcome = check("", "--json", "-", "--quiet", "--no-noise", "--tolerance", "0.001")
    found = json.loads(outcome.out)
    assert outcome.code == 0
    assert found["noise"] is None
    assert found["tolerance"] == 0.001


def test_an_engine_that_computes_something_else(check, tmp_path: Path) -> None:
    """The report is there all the same; more is allowed where that is asked for."""
    outcome = check("scaled", "--json", tmp_path / "found.json")
    assert outcome.code == 3
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["difference"]["kl"] > 0.005
    assert not found["passed"]
    assert "KL(ours || vllm) is" in outcome.err.splitlines()[-1]
    assert check("scaled", "--tolerance", "5", "--quiet").code == 0


def test_more_is_allowed_to_a_noisy_engine(check, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model) -> None:
    monkeypatch.setattr(checking, "OVER_NOISE", 1e5)
    outcome = check("scaled", "--json", tmp_path / "found.json", "--original", model(), "--noise")
    found = json.loads((tmp_path / "found.json").read_text())
    assert outcome.code == 0
    assert found["tolerance"] == pytest.approx(1e5 * found["noise"]["kl"])


def test_greedy_text_that_its_own_log_probabilities_do_not_explain(check) -> None:
    outcome = check("greedy", "--quiet")
    assert outcome.code == 3
    assert "3 of 72 tokens that are not the likeliest" in outcome.err


def test_tied_tokens_count_as_equal(check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "TIE", 1e3)
    outcome = check("greedy", "--json", "-")
    assert outcome.code == 0
    greedy = json.loads(outcome.out)["greedy"]
    assert (greedy["equal"], greedy["tied"], greedy["different"]) == (69, 3, 0)


@pytest.mark.parametrize(
    ("flaw", "said"),
    [
        ("missing", "vllm is not installed for"),
        ("raises", "vllm cannot serve {path}: ValueError: no place for weight_packed in this engine"),
        ("killed", "ended by SIGKILL: RuntimeError: out of everything"),
        ("narrow", "vocabularies of 299 and 300"),
    ],
)
def test_one_clear_error(flaw: str, said: str, check, quantized) -> None:
    outcome = check(flaw, "--quiet")
    assert outcome.code == 2
    (line,) = outcome.err.splitlines()
    assert said.format(path=quantized.path) in line


def test_what_cannot_work_is_refused_before_anything_is_loaded(quantized, text: Path, command, tmp_path: Path) -> None:
    line = ("serve-check", quantized.path, "--quiet", "--data", text, "--engine")
    for more, said in (
        (["tgi"], "expected vllm, mlx, llama.cpp"),
        (["mlx"], "in the format compressed-tensors, which mlx does not read; it reads mlx, dense"),
        (["vllm", "--dtype", "int8"], "vllm takes auto, float32"),
        (["vllm", "--python", tmp_path / "no-python"], "there is no such program"),
        (["vllm", "--original", tmp_path / "nothing"], "no model at"),
    ):
        outcome = command(*line, *more)
        assert outcome.code == 2, more
        assert said in outcome.err.splitlines()[-1]
    (tmp_path / "other").mkdir()
    assert "has no roundel.json" in command("serve-check", tmp_path / "other", "--engine", "vllm").err


def test_a_file_for_llama_cpp_is_cut_by_the_originals_tokenizer(model, quantize, engine, text: Path, tmp_path: Path) -> None:
    """Its own is in the file, where only llama.cpp reads it as it should."""
    path = quantize(model(), tmp_path / "out", scheme="q8_0", format="gguf", curvature="identity", sweeps=0).path
    engine("raises", "llama.cpp")
    with pytest.raises(ModelError, match=r"llama.cpp cannot serve .*no place for"):
        serve_check(path, engine="llama.cpp", data=str(text))
    with pytest.raises(SchemeError, match="GGUF files only"):
        serve_check(path, engine="llama.cpp", data=str(text), noise=True)
    report = json.loads((path / "roundel.json").read_text())
    (path / "roundel.json").write_text(json.dumps({**report, "model": {"name": "moved"}}))
    with pytest.raises(ModelError, match="give --original"):
        serve_check(path, engine="llama.cpp", data=str(text))


def test_large_vocabularies_have_fewer_and_shorter_windows(check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "WINDOW", 300 * 32)
    monkeypatch.setattr(checking, "ROWS", 4 * 300 * 32 * 2)
    outcome = check("", "--json", "-", "--no-noise")
    assert json.loads(outcome.out)["windows"] == [2, 32]
    assert "2 windows of 32 tokens instead of 4 of 32" in outcome.err


@pytest.mark.parametrize(("name", "module"), [("vllm", "vllm"), ("mlx", "mlx"), ("llama.cpp", "llama_cpp")])
def test_engines_that_are_not_installed_say_how(name: str, module: str, quantized, text: Path) -> None:
    if importlib.util.find_spec(module) is not None:
        pytest.skip("it is installed")
    engine = ENGINES[name]
    with pytest.raises(SchemeError, match=r"is not installed for .*pip install"):
        serve_check(_told(quantized.path, engine.formats[0]), engine=name, data=str(text))


def _told(path: Path, form: str) -> Path:
    """The tiny Llama, said to be in another format; nothing is loaded of it."""
    place = path.parent / f"as-{form}"
    if not place.exists():
        place.mkdir()
        for file in path.iterdir():
            if file.is_file():
                (place / file.name).write_bytes(file.read_bytes())
        report = json.loads((path / "roundel.json").read_text())
        (place / "roundel.json").write_text(json.dumps({**report, "format": form}))
    return place
