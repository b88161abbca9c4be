"""A job's directory: what is finished of it and what is half done, so that the same call goes on after a crash, to the same bytes.

Without `--work` it is a temporary directory beside the output that vanishes with the job, and holds only what does not fit into memory.

    job.json        a digest of all that decides the codes: another job is refused
    lock            held by the process at work: a second one is refused
    hidden/         hidden states and gradients at the layer that is being worked on      (`sweeps.hidden`)
    curvature/      factors of each group of layers, until it is rounded                  (`artifacts.curvatures`)
    rounded/        codes of each group                                                   (`artifacts.rounded`)
    ends/           curvature and codes of embedding and output head                      (`stages.ends`)

Every file is written under a temporary name and renamed when it is whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from roundel import processes
from roundel.artifacts.memory import memory_budget
from roundel.errors import StorageError, damaged
from roundel.store import common, hidden_beside, locked, write_json
from roundel.sweeps import HiddenStore

__all__ = ["Work", "budgets", "open_work", "readable"]

HIDDEN = 1 << 28
"""Bytes of hidden states in main memory where nothing is said: files of the size that they then have are cached by the system anyway."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """The directory of a job under way."""

    path: Path
    kept: bool
    """Whether it outlives the process."""
    memory: int
    """Bytes that may be used."""
    hidden: int
    """Bytes of hidden states that may be in main memory, where the directory is not kept."""

    @property
    def curvature(self) -> Path:
        """Where factors are."""
        return self.path / "curvature"

    @property
    def ends(self) -> Path:
        """Where those of embedding and output head are."""
        return self.path / "ends"

    @property
    def rounded(self) -> Path:
        """Where codes are."""
        return self.path / "rounded"

    def store(self, name: str) -> HiddenStore:
        """For the hidden states of one sweep."""
        return HiddenStore(memory=0 if self.kept else self.hidden, directory=self.path / "hidden" / name, kept=self.kept)

    def passing(self, name: str) -> HiddenStore:
        """For states that a resumed job makes anew."""
        return HiddenStore(memory=self.hidden, directory=self.path / "hidden" / name)

    def claim(self, digest: str) -> None:
        """Refuses a directory that holds another job.

        Raises:
            StorageError: it does.
        """
        if not self.kept or not processes.first():
            return
        job, known = self.path / "job.json", None
        if job.exists():
            with readable(job):
                known = json.loads(job.read_text(encoding="utf-8"))["digest"]
        if known is None:
            write_json(job, {"digest": digest})
        elif known != digest:
            raise StorageError(
                f"{self.path} holds the work of another job, of another model, text or recipe: take another one for --work or remove it"
            )


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns what goes wrong while a file of a work directory is read into an error that says what to do.

    Raises:
        StorageError: something has.
    """
    with damaged(StorageError, path, f"it is damaged; remove {path.parent} and start again"):
        yield


def budgets(memory: str | int | None) -> tuple[int, int]:
    """Bytes of main memory for all and, a part of it, for hidden states.

    Raises:
        SchemeError: `memory` is no size.
    """
    whole = memory_budget(memory)
    return whole, min(whole // 4, HIDDEN) if memory is None else whole // 4


@contextmanager
def open_work(path: Path | None, *, beside: Path, memory: str | int | None) -> Iterator[Work]:
    """The directory of a job, for as long as it is at work; `beside`: the output, next to which a temporary one is made.

    Raises:
        StorageError: another process is at work there, or the disk refuses.
        SchemeError: `memory` is no size.
    """
    budget, hidden = budgets(memory)
    if path is None:
        temporary = hidden_beside(beside, "work-")
        try:
            yield Work(path=temporary, kept=False, memory=budget, hidden=hidden)
            processes.wait()
        finally:
            if processes.first():
                shutil.rmtree(temporary, ignore_errors=True)
        return
    if not processes.first():
        processes.wait()
        yield Work(path=common(path), kept=True, memory=budget, hidden=hidden)
        processes.wait()
        return
    with locked(path / "lock"):
        processes.wait()
        yield Work(path=common(path), kept=True, memory=budget, hidden=hidden)
        processes.wait()
