"""Models and text that all whole-run tests share, and a way to call the command line in this process."""

from __future__ import annotations

import importlib
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import roundel
from e2e import layouts, tiny
from roundel.commands.app import main
from roundel.evaluate import plots
from roundel.recipes import Recipe
from roundel.stages import evaluation
from roundel.sweeps import Layers, safe_batch_size
from roundel.types import TokenBatch

SETTINGS: dict[str, Any] = {"sequences": 8, "seq_len": 32, "eval_sequences": 4, "sweeps": 1}


class Outcome(NamedTuple):
    """What a command did."""

    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def _pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn in shared fixtures and where they are looked at: those of a report take as long as rounding a tiny model."""
    if request.path.name in ("test_inspect.py", "test_reports.py"):
        return
    monkeypatch.setattr(plots, "_png", lambda _figure: b"not drawn")
    if request.path.name not in ("test_compare.py", "test_schemes.py", "test_tune.py"):
        for kind in ("curves", "heat_map", "intervals"):
            monkeypatch.setattr(plots, kind, lambda *_series, **_labels: b"not drawn")


@pytest.fixture(autouse=True)
def _short_texts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written at their length in shared fixtures, where they are read, and where reports of other processes are compared."""
    if request.path.name not in ("test_determinism.py", "test_processes.py", "test_reports.py", "test_work.py"):
        monkeypatch.setattr(evaluation, "NEW_TOKENS", 1)


@pytest.fixture(autouse=True)
def _batches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a batch gives the bits of its sequences is tried once for each kind of model and batch: a sixth of a tiny job."""
    if request.path.name in ("test_auto.py", "test_determinism.py", "test_out_of_memory.py"):
        return
    for user in ("curvature", "collecting"):
        monkeypatch.setattr(importlib.import_module(f"roundel.stages.{user}"), "safe_batch_size", _tried_once)


_TRIED: dict[tuple[Any, ...], int] = {}


def _tried_once(layers: Layers, linears: Mapping[str, nn.Linear], tokens: TokenBatch, **given: Any) -> int:
    model: Any = layers.model
    key = (type(model), model.config.to_json_string(), model.dtype, len(layers), tuple(linears), tokens.ids.shape, str(given))
    if key not in _TRIED:
        _TRIED[key] = safe_batch_size(layers, linears, tokens, **given)
    return _TRIED[key]


@contextmanager
def exactly() -> Iterator[None]:
    """Gradients and sums without products in bfloat16 (`roundel.linalg.fast`), for comparisons with others' sums to the last bits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("roundel.curvature.collect"), "fast_products", lambda _device: nullcontext())
        patch.setattr(importlib.import_module("roundel.sweeps.gradients"), "fast", lambda call: call)
        yield


@pytest.fixture
def exact() -> Iterator[None]:
    """See `exactly`."""
    with exactly():
        yield


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file: some 4000 tokens."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(tiny.make_text(9000), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`model(name, dtype=...)`: the directory of a tiny model, made at the first call; not to be changed."""
    made: dict[tuple[str, torch.dtype], Path] = {}

    def make(name: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
        if (name, dtype) not in made:
            made[name, dtype] = tiny.save_model(tmp_path_factory.mktemp(name), name, dtype=dtype)
        return made[name, dtype]

    return make


@pytest.fixture(scope="session")
def quantize(text: Path) -> Callable[..., roundel.Quantized]:
    """`roundel.quantize` with few and short sequences of `text`."""

    def run(source: Path, output: Path, **settings: Any) -> roundel.Quantized:
        return roundel.quantize(source, output=output, **{"calibration": str(text), **SETTINGS, **settings})

    return run


@pytest.fixture(scope="session")
def quantized(
    model: Callable[..., Path], quantize: Callable[..., roundel.Quantized], tmp_path_factory: pytest.TempPathFactory
) -> roundel.Quantized:
    """The tiny Llama in 4 bits, with as many sweeps as the command takes; not to be changed."""
    return quantize(model(), tmp_path_factory.mktemp("quantized") / "out", scheme="int4-g32", sweeps=Recipe().sweeps)


@pytest.fixture(scope="session")
def made(quantize: Callable[..., roundel.Quantized], tmp_path_factory: pytest.TempPathFactory) -> layouts.Made:
    """Quantized models in others' layouts, each made at the first call."""
    return layouts.Made(layouts.save_wide(tmp_path_factory.mktemp("wide")), quantize, tmp_path_factory.mktemp("made"))


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Outcome]]:
    """`command("quantize", ...)` runs the console script in this process."""
    handler = signal.getsignal(signal.SIGTERM)

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["roundel", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        return Outcome(int(caught.value.code or 0), *capfd.readouterr())

    yield run
    signal.signal(signal.SIGTERM, handler)
