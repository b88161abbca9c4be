"""Text that every machine with Python has: the sources and the reference topics of the standard library.

The split is by file and depends on nothing but the file's name, so that a machine with another Python version holds out the same
modules: a file is *held out* (never trained on, used only to evaluate) when the SHA-256 of its relative path falls into the last
sixteenth. The regression tests of the library (`test/`) are used for training alone, because many distributions leave them out.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

__all__ = ["documents"]

Split = Literal["train", "calibration", "heldout"]

_SKIPPED = {"site-packages", "dist-packages", "__pycache__", "encodings", "lib2to3", "ensurepip", "config"}


def _held_out(name: str) -> bool:
    return hashlib.sha256(name.encode()).digest()[0] >= 240


def _topics() -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics

    yield from ((f"pydoc_data/topics/{key}", text) for key, text in sorted(topics.items()))


def _sources(root: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if _SKIPPED.intersection(name.parts) or name.parts[0] == "pydoc_data" or name.name.startswith("_sysconfigdata"):
            continue
        try:
            yield name.as_posix(), path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):  # a handful of the library's tests are broken on purpose
            continue


def documents(split: Split, root: Path | None = None) -> list[str]:
    """Documents of one split, in the order of their names' hashes (a fixed shuffle).

    Args:
        split: ``train`` (everything not held out), ``calibration`` (the same without `test/`, so the same on every distribution)
            or ``heldout`` (never trained on, without `test/`).
        root: Directory of the standard library; that of the running interpreter by default.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    named = [*_sources(root), *_topics()]
    chosen = [
        (name, text)
        for name, text in named
        if text.strip() and _held_out(name) == (split == "heldout") and (split == "train" or not _is_test(name))
    ]
    chosen.sort(key=lambda item: hashlib.sha256(b"order:" + item[0].encode()).digest())
    return [text for _, text in chosen]


def _is_test(name: str) -> bool:
    return bool({"test", "tests", "idle_test"}.intersection(name.split("/")))
