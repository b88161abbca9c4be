"""Hidden states of all sequences at one place of the model: in memory while they fit, else in a file.

A file is read and written by rows, never mapped: what has been read is not resident memory afterwards. A state that is to survive the
process (`--work`) is written under a temporary name and renamed when it is whole.

Each of several processes (`roundel.processes`) writes and reads its own sequences. A state that is kept is one file for all of them, so
that another number of them can go on from it; else each has its own.

Cost: `sequences * tokens * d` numbers in the model's own type for each place.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from roundel import processes
from roundel.errors import StorageError
from roundel.store import storage

__all__ = ["HiddenStates", "HiddenStore"]


class HiddenStates:
    """`(sequences, tokens, width)` numbers, or several such rows a token, read and written by sequences; what is read is in main memory."""

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, path: Path | None = None, *, whole: bool = False, shared: bool = False
    ) -> None:
        """Empty ones, or with `whole` those that the file holds; `shared`: it is all processes' file."""
        self.shape, self.dtype, self.path, self._whole, self._shared = shape, dtype, path, whole, shared
        self._row = prod(shape[1:]) * dtype.itemsize
        self._memory = None
        if path is None:
            self._memory = torch.empty(shape, dtype=dtype)
        else:
            with storage(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file = os.open(path if whole else _partial(path), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
                if not whole:
                    os.ftruncate(self._file, shape[0] * self._row)

    def read(self, rows: Sequence[int]) -> Tensor:
        """Some sequences, in a tensor of their own.

        Raises:
            StorageError: the file is shorter than it was made.
        """
        if self._memory is not None:
            return self._memory[list(rows)]
        assert self.path is not None
        found = torch.empty(len(rows), *self.shape[1:], dtype=self.dtype)
        for place, row in enumerate(rows):
            with storage(self.path, "reading"):
                count = os.preadv(self._file, [_bytes(found[place])], row * self._row)
            if count != self._row:
                raise StorageError(f"{self.path} is shorter than it should be; remove the work directory and start again")
        return found

    def write(self, rows: Sequence[int], values: Tensor) -> None:
        """Puts some sequences into their places.

        Raises:
            StorageError: the disk refuses.
        """
        values = values.detach().to("cpu", self.dtype).contiguous()
        if self._memory is not None:
            self._memory[list(rows)] = values
            return
        assert self.path is not None
        with storage(self.path):
            for row, value in zip(rows, values, strict=True):
                left, offset = _bytes(value), row * self._row
                while left:
                    written = os.pwritev(self._file, [left], offset)
                    left, offset = left[written:], offset + written

    def finish(self) -> None:
        """All sequences are written: a file now has its name."""
        if self.path is not None and not self._whole:
            self._together(lambda: _partial(self.path).replace(self.path))  # type: ignore[arg-type]
            self._whole = True

    def close(self) -> None:
        """Gives memory or file back."""
        self._memory = None
        if self.path is not None:
            os.close(self._file)
            self._together((self.path if self._whole else _partial(self.path)).unlink, missing_ok=True)

    def _together(self, change: Callable[..., object], **given: bool) -> None:
        """Changes the file's name, when nobody writes to it any more."""
        assert self.path is not None
        if self._shared:
            processes.wait()
        if not self._shared or processes.first():
            with storage(self.path):
                change(**given)
        if self._shared:
            processes.wait()


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _bytes(values: Tensor) -> memoryview:
    return memoryview(values.view(torch.uint8).numpy()).cast("B")  # type: ignore[arg-type]


@dataclass(kw_only=True)
class HiddenStore:
    """Makes hidden states: in memory up to `memory` bytes in all, then in files in `directory`; all in files if they are `kept`."""

    memory: int
    directory: Path | None = None
    kept: bool = False
    _used: dict[int, int] = field(default_factory=dict)

    def new(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> HiddenStates:
        """Empty states; `name` is the file's, if it takes one."""
        size = prod(shape) * dtype.itemsize // processes.world()  # of memory that is not written to none is taken
        if self.directory is None or (not self.kept and sum(self._used.values()) + size <= self.memory):
            made = HiddenStates(shape, dtype)
            self._used[id(made)] = size
            return made
        own = name if self.kept else processes.named(name)
        return HiddenStates(shape, dtype, self.directory / f"{own}.bin", shared=self.kept)

    def find(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> HiddenStates | None:
        """States that an earlier process has finished; None where there are none."""
        if not self.kept or self.directory is None:
            return None
        path = self.directory / f"{name}.bin"
        size = prod(shape) * dtype.itemsize
        there = processes.from_first(lambda: path.is_file() and path.stat().st_size == size)
        return HiddenStates(shape, dtype, path, whole=True, shared=True) if there else None

    def drop(self, states: HiddenStates) -> None:
        """What is not needed any more."""
        self._used.pop(id(states), None)
        states.close()
