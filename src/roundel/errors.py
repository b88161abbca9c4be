"""Everything that Roundel raises on purpose.

    RoundelError
    |- InputError          the user gave something that cannot work; exit code 2
    |  |- ModelError         a model, its configuration or its weights
    |  |- DataError          calibration or evaluation text
    |  |- SchemeError        a scheme, curvature or other setting
    |  |- FactorsError       a factors directory that is damaged, of another model or of other settings
    |  `- OutputError        the place to write to
    |- NumericalError      a factor or gradient that no fall-back could repair; exit code 3
    |- StorageError        the disk refused (full, read-only); exit code 4
    |- ProcessesError      another process of the same job has ended; exit code 5
    `- MemoryLimitError    main memory, or the GPU's, is not enough; exit code 6

A message says what was given, what was expected and what to try. The name of a layer is added once, by `in_layer`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = [
    "DataError",
    "FactorsError",
    "InputError",
    "MemoryLimitError",
    "ModelError",
    "NumericalError",
    "OutputError",
    "ProcessesError",
    "RoundelError",
    "SchemeError",
    "StorageError",
    "in_layer",
    "is_out_of_memory",
]


class RoundelError(Exception):
    """Base of all errors that Roundel raises on purpose."""

    exit_code = 1
    layer: str | None = None

    def __str__(self) -> str:
        text = super().__str__()
        return f"{self.layer}: {text}" if self.layer else text


class InputError(RoundelError):
    """The user gave something that cannot work."""

    exit_code = 2


class ModelError(InputError):
    """A model, its configuration or its weights cannot be used."""


class DataError(InputError):
    """Calibration or evaluation text cannot be used."""


class SchemeError(InputError):
    """A scheme, curvature name or setting is not valid."""


class FactorsError(InputError):
    """A factors directory is damaged, of another model or of other settings."""


class OutputError(InputError):
    """The output location cannot be used."""


class NumericalError(RoundelError):
    """Numbers are beyond what the fall-backs can repair."""

    exit_code = 3


class StorageError(RoundelError):
    """The disk refused to take the data."""

    exit_code = 4


class ProcessesError(RoundelError):
    """Another process of the same job has ended, or was never there."""

    exit_code = 5


class MemoryLimitError(RoundelError):
    """The job needs more memory than there is."""

    exit_code = 6

    def __init__(self, reason: object = "") -> None:
        """Of the allocator's message."""
        first = next(iter(str(reason).strip().splitlines()), "")
        super().__init__(
            f"out of memory{f' ({first})' if first else ''}: try a smaller --batch-size or --seq-len, --memory to keep weights and states "
            "on the disk, or another --device; with --work the same call goes on from what is finished"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator has refused: Python's, torch's for the CPU and its maps, which raise a bare RuntimeError, or a GPU's."""
    words = ("out of memory", "can't allocate memory", "cannot allocate memory", "alloc_failed", "can't start new thread")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words))


@contextmanager
def in_layer(name: str) -> Iterator[None]:
    """Adds the layer's name to any `RoundelError` raised inside, unless an inner context has named it already."""
    try:
        yield
    except RoundelError as error:
        error.layer = error.layer or name
        raise
