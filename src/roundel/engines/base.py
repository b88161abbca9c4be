"""Asking an engine for its log-probabilities, in a process of its own.

Engines pin other versions of torch and Transformers than Roundel's, so that each is run by a Python of its own: `child` there, which is
handed a JSON request and one of the engines' files here, and imports nothing of Roundel. What comes back is NumPy's `.npy`, read without
pickle and mapped, not loaded, and a JSON with the greedy continuations.

Not done: engines on other machines, more than one device.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from roundel.errors import ModelError, SchemeError
from roundel.store import write_json

__all__ = ["Answer", "Engine", "Request"]

CHILD = Path(__file__).with_name("child.py")

ERROR = re.compile(r"\b\w+(?:Error|Exception)\b.*")
"""A line of a log that says what went wrong."""

WINDOW = re.compile(r"window \d+ of \d+")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What an engine is asked."""

    model: Path
    windows: Sequence[Sequence[int]]
    """Of one length."""
    prompts: Sequence[Sequence[int]]
    new_tokens: int
    dtype: str


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What an engine says."""

    rows: NDArray[np.float32]
    """Log-probabilities of what follows each token, `(windows, tokens, vocabulary)`, on the disk."""
    greedy: list[list[int]]
    versions: dict[str, str]
    kernels: list[str]
    """Those that it names in its log."""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """One that is installed for some Python."""

    name: str
    file: Path
    """Its side, see `child`."""
    install: str
    """How."""
    formats: tuple[str, ...]
    """Of written directories that it reads."""
    dtypes: tuple[str, ...]
    kernels: str | None
    """A pattern whose first group is what a line of its log says of kernels; None where it says nothing."""

    def ask(self, request: Request, *, python: str, out: Path, advance: Callable[[int], None], keep: Callable[[str], None]) -> Answer:
        """Runs it, with `python`, in the directory `out`.

        Args:
            request: The question.
            python: A program.
            out: Empty; holds what comes back.
            advance: Called with 1 after each window.
            keep: Called with the log, whatever comes of it.

        Raises:
            SchemeError: the Python cannot be run or has no such engine.
            ModelError: the engine refuses the directory, or ends; with its own line.
        """
        longest = max(len(request.windows[0]) + 1, max(map(len, request.prompts)) + request.new_tokens)
        asked = {**vars(request), "model": str(request.model.absolute()), "longest": longest, "out": str(out)}
        write_json(out / "request.json", asked)
        program = shutil.which(python)
        if program is None:
            raise SchemeError(f"--python {python}: there is no such program")
        code, log = _run([program, str(CHILD), str(self.file), str(out / "request.json")], advance)
        keep(log)
        answer: dict[str, Any] = {}
        if (out / "answer.json").is_file():
            answer = json.loads((out / "answer.json").read_text(encoding="utf-8"))
        if "missing" in answer:
            raise SchemeError(
                f"{self.name} is not installed for {program} (no module {answer['missing']}): {self.install}, or --python PATH"
            )
        if code != 0 or "error" in answer or not answer:
            raise ModelError(f"{self.name} cannot serve {request.model}: {answer.get('error') or _ending(code, log)}")
        rows = np.load(out / "rows.npy", mmap_mode="r", allow_pickle=False)
        if rows.shape[:2] != (len(request.windows), len(request.windows[0])) or len(answer["greedy"]) != len(request.prompts):
            raise ModelError(
                f"{self.name} gave {rows.shape[:2]} log-probabilities of {len(request.windows)} windows: not what was asked for"
            )
        named = dict.fromkeys(match[1] for match in re.finditer(self.kernels, log)) if self.kernels else {}
        return Answer(rows=rows, greedy=answer["greedy"], versions=answer["versions"], kernels=sorted(named))


def _run(command: list[str], advance: Callable[[int], None]) -> tuple[int, str]:
    """Exit code and everything printed."""
    lines: list[str] = []
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONHOME", "VIRTUAL_ENV")}
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as child:
        assert child.stdout is not None
        try:
            for line in child.stdout:
                lines.append(line)
                advance(1 if WINDOW.match(line) else 0)
        except BaseException:
            child.kill()
            raise
    return child.returncode, "".join(lines)


def _ending(code: int, log: str) -> str:
    """Why a process ended that did not say so itself."""
    said = [match[0] for line in log.splitlines() if (match := ERROR.search(line))] or log.strip().splitlines() or ["it printed nothing"]
    how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return f"{how}: {said[-1].strip()}"
