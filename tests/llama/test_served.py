"""Files of ours through `roundel serve-check --engine llama.cpp`, as users run it: rows of benchmarks/results/engines-llama-cpp.json.

Needs llama-cpp-python, which `make test-llama` installs without a llama.cpp of its own: it takes the libraries of `engine.HOME`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine_rows import served, sources, written
from llama.engine import HOME, LIBRARY

pytestmark = pytest.mark.skipif(
    not LIBRARY.is_file() or importlib.util.find_spec("llama_cpp") is None,
    reason="no llama-cpp-python in this environment: make test-llama",
)

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "k-quants": ("demo", {"scheme": "q4_k"}),
    "two bits": ("demo", {"scheme": "q2_k"}),
    "a codebook": ("demo", {"scheme": "iq3_xxs"}),
    "several types": ("demo", {"scheme": "q4_k", "target_size": "2M"}),
    "own head": ("untied", {"scheme": "q4_k"}),
    "experts": ("mixture", {"scheme": "q4_k"}),
}


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """`source(kind)`: an original."""
    return sources(tmp_path_factory)


@pytest.mark.parametrize("case", CASES)
def test_it_computes_what_is_written(case: str, source: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(HOME))
    kind, options = CASES[case]
    path = written(source(kind), tmp_path / "out", format="gguf", **options)
    found = served(path, kind, engine="llama.cpp", original=source(kind))
    assert found is not None
    assert found["difference"]["kl"] < 0.002  # activations in 8 bits
    assert found["kl"]["ours"] == pytest.approx(found["kl"]["report"], rel=0.001)
