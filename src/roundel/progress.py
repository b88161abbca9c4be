"""Progress on standard error: bars with the time left on a terminal, plain lines elsewhere, nothing with `--quiet`."""

from __future__ import annotations

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

__all__ = ["Lines", "Progress", "Silent", "make_progress"]

QUICK = 3.0
"""Seconds before a stage is worth lines of its own."""

Advance = Callable[[int], None]


class Progress(ABC):
    """Where long stages report to."""

    @abstractmethod
    def stage(self, title: str, total: int) -> AbstractContextManager[Advance]:
        """A stage of `total` units; the block calls what it is given with the number of units just done."""

    @abstractmethod
    def say(self, message: str) -> None:
        """One line of news."""

    def warn(self, message: str) -> None:
        """One line that must not be missed."""
        self.say(f"warning: {message}")


class Silent(Progress):
    """Says nothing; warnings are in the report."""

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Advance]:
        yield lambda _units: None

    def say(self, message: str) -> None:
        pass


class Lines(Progress):
    """A line when a stage ends, and at each quarter of one that takes more than a few seconds."""

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Advance]:
        began = time.monotonic()
        done, quarter = 0, 0

        def advance(units: int) -> None:
            nonlocal done, quarter
            done += units
            passed = 4 * done // max(total, 1)
            if passed > quarter and done < total:
                quarter = passed
                spent = time.monotonic() - began
                if spent < QUICK:
                    return
                self.say(f"{title}: {done}/{total}, {spent:.0f} s, {spent * (total - done) / done:.0f} s left")

        yield advance
        self.say(f"{title}: done in {time.monotonic() - began:.1f} s")

    def say(self, message: str) -> None:
        print(message, file=sys.stderr, flush=True)


class Bars(Progress):
    """Rich progress bars."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Advance]:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with RichProgress(*columns, console=self.console) as bars:
            task = bars.add_task(title, total=total)
            yield lambda units: bars.advance(task, units)

    def say(self, message: str) -> None:
        self.console.print(message, highlight=False, markup=False)

    def warn(self, message: str) -> None:
        self.console.print(f"warning: {message}", style="yellow", highlight=False, markup=False)


def make_progress(*, quiet: bool) -> Progress:
    """The progress that suits standard error."""
    if quiet:
        return Silent()
    return Bars() if sys.stderr.isatty() else Lines()
