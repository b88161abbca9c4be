"""Quantized models of others: what was read is what was written, only bytes of what has changed change, and damaged files are refused."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file

from e2e.layouts import LAYOUTS, LEFT, files
from roundel.artifacts.checkpoints import read
from roundel.artifacts.source import load_source
from roundel.given import open_given
from roundel.recipes import Recipe
from roundel.rounding.round import dequantized
from roundel.stages import refine


@pytest.fixture(scope="module")
def source(made):
    return load_source(str(made.wide), Recipe.of(scheme="int8-channel", format="dense"), "cpu", "float32")


@pytest.mark.parametrize("kind", LAYOUTS)
def test_what_is_read_can_be_written_back(kind, made, source, tmp_path) -> None:
    scheme, form, _ = LAYOUTS[kind]
    path = made(kind)
    given = open_given(str(path), source)
    expected = {"model.layers.1.self_attn.o_proj"} if kind == "exl3" else set(source.linears)
    if form in ("mlx", "gguf"):
        expected |= {"model.embed_tokens", "lm_head"}
    if form == "gguf":
        expected -= {LEFT, "model.layers.1.mlp.up_proj"}  # one has no grid, one is not quantized
    assert set(given) == expected
    assert set(given.left) == ({LEFT} if form == "gguf" else set())
    if form not in ("gguf", "gptq") or kind == "gptq":
        for name, weight in read(path).rounded.items():
            assert torch.equal(dequantized(given[name]), dequantized(weight))
            assert torch.equal(given[name].codes, weight.codes)
    if kind == "gptq_v2":
        for name, weight in read(made.plain(scheme, form)).rounded.items():
            assert torch.equal(given[name].codes, weight.codes)
    if kind in ("act-order", "split"):
        W = load_file(made.wide / "model.safetensors")["model.layers.0.mlp.down_proj.weight"].float()
        assert (dequantized(given["model.layers.0.mlp.down_proj"]) - W).norm() < 0.2 * W.norm()
    (tmp_path / "same").mkdir()
    given.copy_to(tmp_path / "same", dict(given), {})
    assert files(tmp_path / "same") == files(path)
    name = "model.layers.1.self_attn.o_proj"
    codes = given[name].codes.roll(1, 0)
    (tmp_path / "changed").mkdir()
    given.copy_to(tmp_path / "changed", {name: dataclasses.replace(given[name], codes=codes)}, {})
    again = open_given(str(tmp_path / "changed"), source)
    assert torch.equal(again[name].codes, codes)
    assert all(torch.equal(again[own].codes, given[own].codes) for own in given if own != name)
    assert {file: len(data) for file, data in files(tmp_path / "changed").items()} == {
        file: len(data) for file, data in files(path).items()
    }


TENSOR = "blk.0.ffn_down.weight"


def header(*, side: int | None = None, kind: int | None = None, offset: int | None = None) -> Callable[[Path], None]:
    """Changes what the header says of a tensor."""

    def change(file: Path) -> None:
        data = bytearray(file.read_bytes())
        sides = data.index(TENSOR.encode()) + len(TENSOR) + 4
        for place, size, value in ((sides, 8, side), (sides + 16, 4, kind), (sides + 20, 8, offset)):
            if value is not None:
                data[place : place + size] = value.to_bytes(size, "little")
        file.write_bytes(data)

    return change


def renamed(old: bytes, new: bytes) -> Callable[[Path], None]:
    assert len(old) == len(new)
    return lambda file: file.write_bytes(file.read_bytes().replace(old, new)) and None


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-2000])


def infinite(file: Path) -> None:
    tensor = next(each for each in GGUFReader(file).tensors if each.name == TENSOR)
    data = bytearray(file.read_bytes())
    data[tensor.data_offset : tensor.data_offset + 2] = np.float16(np.inf).tobytes()
    file.write_bytes(data)


def header_of_safetensors(**changed: object) -> Callable[[Path], None]:
    """The same of safetensors."""

    def change(file: Path) -> None:
        data = file.read_bytes()
        size = int.from_bytes(data[:8], "little")
        entries = json.loads(data[8 : 8 + size])
        entries["model.layers.0.mlp.down_proj.qweight"] |= changed
        new = json.dumps(entries).encode()
        file.write_bytes(len(new).to_bytes(8, "little") + new + data[8 + size :])

    return change


def tensors(**changed: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    """Parts of all linears of a GPTQ directory."""

    def change(file: Path) -> None:
        found = load_file(file)
        found = {name: changed.get(name.rpartition(".")[2], torch.clone)(value).contiguous() for name, value in found.items()}
        save_file(found, file, metadata={"format": "pt"})

    return change


def method(name: str) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        config = json.loads((file.parent / "config.json").read_text())
        config["quantization_config"]["quant_method"] = name
        (file.parent / "config.json").write_text(json.dumps(config))

    return change


HOSTILE = {
    "gguf": {
        "cut": (cut, "ends before|damaged"),
        "an offset beyond the end": (header(offset=1 << 40), "ends before|damaged"),
        "an unknown type": (header(kind=99), "damaged"),
        "a wrong size": (header(side=64), "another model|damaged"),
        "a missing tensor": (renamed(b"ffn_down", b"ffn_dawn"), "lacks blk.0.ffn_down.weight"),
        "another architecture": (renamed(b"\0llama", b"\0gemma"), "of the architecture gemma"),
        "an infinite scale": (infinite, "infinite"),
        "not GGUF": (lambda file: file.write_bytes(b"GGUF") and None, "damaged"),
    },
    "gptq": {
        "cut": (cut, "damaged|safetensors"),
        "an offset beyond the end": (header_of_safetensors(data_offsets=[0, 1 << 40]), "damaged|safetensors"),
        "an unknown type": (header_of_safetensors(dtype="I33"), "damaged|safetensors"),
        "a wrong size": (tensors(qweight=lambda value: value[1:]), "nothing in it can be refined"),
        "wrong groups": (tensors(g_idx=lambda value: value * 0 + 7), "g_idx"),
        "another method": (method("hqq"), "hqq"),
        "infinite scales": (tensors(scales=lambda value: value * torch.inf), "infinite"),
    },
}


@pytest.mark.parametrize(("kind", "what"), [(kind, what) for kind, own in HOSTILE.items() for what in own])
def test_damaged_files_are_refused_with_one_line_before_work(kind, what, made, text, command, tmp_path, monkeypatch) -> None:
    change, message = HOSTILE[kind][what]
    shutil.copytree(made(kind), tmp_path / "given")
    change(next(file for file in (tmp_path / "given").iterdir() if file.suffix in (".gguf", ".safetensors")))
    refused(command, tmp_path / "given", made.wide, text, tmp_path, monkeypatch, message)


@pytest.mark.parametrize("kind", ["gguf", "gptq", "mlx"])
def test_another_models_files_are_refused(kind, made, model, text, command, tmp_path, monkeypatch) -> None:
    refused(command, made(kind), model("llama"), text, tmp_path, monkeypatch, "another model|nothing in it can be refined")


def refused(command, given: Path, reference: Path, text: Path, tmp_path: Path, monkeypatch, message: str) -> None:
    def none(*_given: object, **_named: object) -> None:
        raise AssertionError("work has begun")

    monkeypatch.setattr(refine, "read_text", none)
    found = command("refine", given, "--reference", reference, "-o", tmp_path / "out", "--calibration", text, "-q")
    assert found.code == 2, found.err
    lines = found.err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert re.search(message, lines[0]), lines
    assert not (tmp_path / "out").exists()
