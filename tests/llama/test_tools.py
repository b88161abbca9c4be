"""Importance matrices: `llama-imatrix` measures what we say that it does, and `llama-quantize` reads our form of them as its own."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from torch import nn

from e2e.tiny import make_text
from llama.engine import HOME, LIBRARY
from llama.files import Written, write
from roundel.formats.imatrix import Imatrix, tensor_names
from roundel.formats.imatrix import write as write_imatrix
from roundel.models import load_tokenizer, locate

pytestmark = pytest.mark.skipif(not LIBRARY.is_file(), reason="no llama.cpp in this environment: make test-llama")

CHUNKS, TOKENS = 4, 128


def tool(name: str, *arguments: object) -> None:
    done = subprocess.run([str(HOME / name), *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return write(locate("demo"), tmp_path_factory.mktemp("original") / "model.gguf", lambda _name, _linear: None)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(make_text(4000), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def theirs(original: Written, text: Path) -> Path:
    path = text.with_name("imatrix.gguf")
    tool("llama-imatrix", "-m", original.path, "-f", text, "-c", TOKENS, "-b", TOKENS, "--chunks", CHUNKS, "-t", 1, "--no-ppl", "-o", path)
    return path


def means(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """Of a file: the mean weight of each column, and the number of tokens, by matrix."""
    found = {each.name: np.array(each.data, dtype=np.float64).flatten() for each in GGUFReader(path).tensors}
    counts = {name.removesuffix(".counts"): int(value.item()) for name, value in found.items() if name.endswith(".counts")}
    return {name: torch.from_numpy(found[f"{name}.in_sum2"] / count) for name, count in counts.items()}, counts


def test_it_measures_the_mean_square_of_each_input(original: Written, text: Path, theirs: Path) -> None:
    ids = load_tokenizer(locate("demo"))(text.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0, : CHUNKS * TOKENS]
    linears = {name: module for name, module in original.model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"}
    sums: dict[str, torch.Tensor] = {}

    def hook(name: str) -> object:
        return lambda _module, inputs: sums.__setitem__(name, inputs[0].double().square().flatten(0, 1).mean(0))

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in linears.items()]
    with torch.no_grad():
        original.model(ids.view(CHUNKS, TOKENS))
    for handle in handles:
        handle.remove()
    measured, counts = means(theirs)
    names = tensor_names("qwen3", linears)
    assert set(names.values()) == set(measured)
    assert set(counts.values()) == {CHUNKS * TOKENS}
    for name, found in sums.items():
        assert torch.allclose(measured[names[name]], found, rtol=0.01, atol=1e-3 * found.mean().item()), name


def test_quantize_reads_our_form_as_its_own(original: Written, theirs: Path, tmp_path: Path) -> None:
    values, counts = means(theirs)
    ours = tmp_path / "ours.gguf"
    matrix = Imatrix(architecture="qwen3", dataset="text", sequences=CHUNKS, seq_len=TOKENS, values=values, counts=counts)
    write_imatrix(ours, matrix)
    made = {}
    for name, options in {"theirs": ["--imatrix", theirs], "ours": ["--imatrix", ours], "none": []}.items():
        tool("llama-quantize", *options, original.path, tmp_path / f"{name}.gguf", "Q2_K", 1)
        made[name] = {each.name: each.data.tobytes() for each in GGUFReader(tmp_path / f"{name}.gguf").tensors}
    assert made["ours"] == made["theirs"] != made["none"]
