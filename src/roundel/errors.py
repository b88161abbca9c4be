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
    "damaged",
    "in_layer",
    "is_out_of_memory",
    "of_reading",
    "reason_of",
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
def damaged(kind: type[RoundelError], what: object, then: str = "it is damaged") -> Iterator[None]:
    """Turns whatever the reader of a damaged or hostile file raises into one error of a kind; memory that runs out stays what it is.

    Readers believe what they read, so any type may be raised, far from the cause: bounds are checked in one place, here.
    """
    try:
        yield
    except (RoundelError, MemoryError):
        raise
    except BaseException as error:
        if not of_reading(error):
            raise
        if "cannot allocate memory" in str(error).lower():  # of a map of the file, which is as large as that: no fault of its content
            raise MemoryLimitError(error) from error
        raise kind(f"{what} cannot be read ({reason_of(error)}): {then}") from error


def reason_of(error: BaseException) -> str:
    """What an error of others says, in one line."""
    lines = str(error).strip().splitlines()
    said = f"{lines[0]} {lines[1].strip()}" if lines[1:] and lines[0].endswith(":") else "".join(lines[:1])
    return f"no {said}" if isinstance(error, KeyError) and said else said[:300] or type(error).__name__


def of_reading(error: BaseException) -> bool:
    """Whether a file may be to blame: libraries in Rust raise a type for their own faults that is no `Exception`."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


@contextmanager
def in_layer(name: str) -> Iterator[None]:
    """Adds the layer's name to any `RoundelError` raised inside, unless an inner context has named it already."""
    try:
        yield
    except RoundelError as error:
        error.layer = error.layer or name
        raise
