"""What stages note for the report while they run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from roundel import processes
from roundel.allocator import give_back_freed_memory
from roundel.progress import Progress

__all__ = ["Notes"]


class Notes:
    """Warnings for the report, shown as they come, and the seconds of each stage."""

    def __init__(self, progress: Progress, clock: Callable[[], float] = time.monotonic) -> None:
        """Seconds are those of the clock."""
        self.progress, self._clock = progress, clock
        self.warnings: list[str] = []
        self.seconds: dict[str, float] = {}
        self.tried: list[dict[str, Any]] = []
        """Numbers of sequences, where the text says how many are enough (`stages.sequences`)."""
        self.processes = processes.world()
        self.planned: dict[str, Any] | None = None
        """What the job was expected to take (`stages.plan`)."""

    def warn(self, message: str) -> None:
        self.warnings.append(message)
        self.progress.warn(message)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """One stage, after which the memory that it has freed goes back to the system."""
        began = self._clock()
        yield
        give_back_freed_memory()
        self.seconds[name] = round(self._clock() - began, 3)
