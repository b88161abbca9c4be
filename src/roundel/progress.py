"""Signs of life on standard error: bars with the time left on a terminal, plain lines elsewhere, nothing with `--quiet`.

A command that runs several stages announces them once, with estimates of how long each takes relative to the others:

    with progress.job({"curvature": 3.0, "rounding": 5.0, "evaluation": 1.0}):
        with progress.stage("curvature", len(tokens)) as advance:
            for batch in tokens:
                ...
                advance(len(batch))
        for part in parts:  # a stage that comes in several pieces has its weight in as many shares
            with progress.stage("rounding", len(part), share=1 / len(parts)) as advance: ...

The fraction of the job that is done is the weight of what is done over the weight of all. The time left is what the present stage still
needs at its own pace, and for all others their weight times the seconds that a unit of weight has taken so far. Titles are announced in the
order in which their stages begin: one that another passes by is left out of the job (it was resumed, say), until it begins after all.
Stages that nobody announced are shown by themselves and count for nothing; a job within a job belongs to the outer one.
"""

from __future__ import annotations

import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

__all__ = ["Bars", "Job", "Lines", "Progress", "Silent", "Stage", "duration", "make_progress"]

EVERY = 30.0
"""Seconds between lines that say that work goes on."""

FIRST = 10.0
"""Seconds until the first of them in a stage."""

Advance = Callable[[int], None]
Clock = Callable[[], float]


class Progress(ABC):
    """Where long stages report to."""

    def job(self, stages: Mapping[str, float]) -> AbstractContextManager[None]:
        """All that the block does: titles of its stages in their order, and the weight of each, in any unit (estimated seconds, say)."""
        return nullcontext()

    @abstractmethod
    def stage(self, title: str, total: int, *, share: float = 1.0) -> AbstractContextManager[Advance]:
        """A stage of `total` units; the block calls what it is given with the number of units just done.

        `share` of the weight that the job gave to this title is for this stage; less than 1 where several stages have the title.
        """

    @abstractmethod
    def say(self, message: str) -> None:
        """One line of news."""

    def warn(self, message: str) -> None:
        """One line that must not be missed."""
        self.say(f"warning: {message}")


class Silent(Progress):
    """Says nothing; warnings are in the report."""

    @contextmanager
    def stage(self, title: str, total: int, *, share: float = 1.0) -> Iterator[Advance]:
        yield lambda _units: None

    def say(self, message: str) -> None:
        pass


@dataclass
class Stage:
    """A stage that runs."""

    title: str
    total: int
    began: float
    weight: float = 0.0
    """Of the job; 0 without one."""

    done: int = 0

    @property
    def fraction(self) -> float:
        """Of its units that is done."""
        return min(self.done / self.total, 1.0) if self.total else 0.0

    def left(self, now: float) -> float | None:
        """Seconds, if it goes on like this; None before any unit is done."""
        return (now - self.began) * (1 / self.fraction - 1) if self.fraction else None


class Job:
    """What is done of announced stages, and how long the rest may take."""

    def __init__(self, weights: Mapping[str, float], began: float) -> None:
        """Of the weight of each title.

        Raises:
            ValueError: one is not positive.
        """
        if any(weight <= 0 for weight in weights.values()):
            raise ValueError(f"weights of stages are {dict(weights)}: expected more than 0")
        self.began = began
        self._weights = dict(weights)
        self._over = dict.fromkeys(weights, 0.0)  # shares; keys are never added, for another thread reads this
        self._left_out = dict.fromkeys(weights, False)
        self._running: Stage | None = None
        self._seconds = 0.0
        self._shown = 0.0

    def begin(self, stage: Stage, share: float) -> None:
        """The stage runs from now on."""
        if stage.title not in self._weights:
            return
        for title, over in self._over.items():
            if title == stage.title:
                break
            self._left_out[title] = self._left_out[title] or over == 0
        self._left_out[stage.title] = False
        stage.weight = self._weights[stage.title] * min(share, 1 - self._over[stage.title])
        self._running = stage

    def end(self, stage: Stage, now: float) -> None:
        """The stage is over, done or not."""
        if self._running is not stage:
            return
        self._over[stage.title] += stage.weight / self._weights[stage.title]
        if stage.weight:
            self._seconds += now - stage.began
        self._running = None

    def fraction(self) -> float:
        """Of the whole weight that is done; never less than before."""
        whole = sum(weight for title, weight in self._weights.items() if not self._left_out[title])
        self._shown = max(self._shown, min(self._finished(self._running) / whole, 1.0) if whole else 0.0)
        return self._shown

    def left(self, now: float) -> float | None:
        """Seconds; None before anything can be said."""
        running = self._running
        spent = self._seconds + (now - running.began if running is not None and running.fraction else 0.0)
        finished = self._finished(running)
        if not finished:
            return None
        pace = spent / finished
        ahead = sum(weight * (1 - self._over[title]) for title, weight in self._weights.items() if not self._left_out[title])
        if running is None:
            return pace * max(ahead, 0.0)
        mine = running.left(now)
        if mine is None:
            mine = max(pace * running.weight - (now - running.began), 0.0)
        return mine + pace * max(ahead - running.weight, 0.0)

    def _finished(self, running: Stage | None) -> float:
        over = sum(self._weights[title] * share for title, share in self._over.items())
        return over + (running.weight * running.fraction if running is not None else 0.0)


class _Telling(Progress):
    """Keeps the job and the stages that run; how they are shown is for subclasses."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self.clock = clock
        self._job: Job | None = None
        self._stages: list[Stage] = []
        self._shows = False

    @contextmanager
    def job(self, stages: Mapping[str, float]) -> Iterator[None]:
        if self._job is not None or not stages:
            yield
            return
        job = Job(stages, self.clock())
        with self._display():
            self._job = job
            try:
                with self._showing_job(job):
                    yield
            finally:
                self._job = None
            self.say(f"all: done in {duration(self.clock() - job.began)}")

    @contextmanager
    def stage(self, title: str, total: int, *, share: float = 1.0) -> Iterator[Advance]:
        stage, job = Stage(title, total, self.clock()), self._job
        if job is not None:
            job.begin(stage, share)
        with self._display():
            self._stages.append(stage)
            try:
                with self._showing(stage) as advance:
                    yield advance
            finally:
                self._stages.remove(stage)
                if job is not None:
                    job.end(stage, self.clock())
                    self._moved(job)
            self.say(f"{title}: done in {duration(self.clock() - stage.began)}{self._so_far()}")

    @contextmanager
    def _display(self) -> Iterator[None]:
        """Something is shown, by the outermost of these blocks."""
        if self._shows:
            yield
            return
        self._shows = True
        try:
            with self._live():
                yield
        finally:
            self._shows = False

    def _so_far(self) -> str:
        """What the line at the end of a stage says of the job."""
        return ""

    def _moved(self, job: Job) -> None:
        """More of the job is done than before."""

    @abstractmethod
    def _live(self) -> AbstractContextManager[object]:
        """Around everything that is shown."""

    def _showing_job(self, job: Job) -> AbstractContextManager[object]:
        """Around the stages of a job."""
        return nullcontext()

    @abstractmethod
    def _showing(self, stage: Stage) -> AbstractContextManager[Advance]:
        """Around one stage; counts its units."""


class Lines(_Telling):
    """A line when a stage ends, and from a thread one after 10 s and then every 30 s, whether units get done or not."""

    def __init__(self, clock: Clock = time.monotonic, *, first: float = FIRST, every: float = EVERY) -> None:
        super().__init__(clock)
        self.first, self.every = first, every
        self._lock = threading.RLock()
        self._last = 0.0
        self._told = False

    def say(self, message: str) -> None:
        with self._lock:
            self._last = self.clock()
            print(message, file=sys.stderr, flush=True)

    def beat(self) -> None:
        """Says where things stand, if nothing was said for long."""
        with self._lock:
            now = self.clock()
            if now - self._last < (self.every if self._told else self.first):
                return
            self._told = True
            for stage in self._stages[-1:]:
                times = _times(now - stage.began, stage.left(now))
                self.say(f"{stage.title}: {stage.done}/{stage.total} {times}{self._so_far()}")
                return
            self.say(self._so_far().removeprefix("; "))

    def _so_far(self) -> str:
        now, job = self.clock(), self._job
        if job is None or job.fraction() == 1:
            return ""
        return f"; all: {100 * job.fraction():.0f} % {_times(now - job.began, job.left(now))}"

    @contextmanager
    def _live(self) -> Iterator[None]:
        over = threading.Event()

        def run() -> None:
            while not over.wait(min(self.first, self.every) / 10):
                self.beat()

        self._last, self._told = self.clock(), False
        thread = threading.Thread(target=run, name="roundel progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()  # nothing is said after the end

    @contextmanager
    def _showing(self, stage: Stage) -> Iterator[Advance]:
        def advance(units: int) -> None:
            stage.done += units

        self._told = False
        yield advance


class Bars(_Telling):
    """On a terminal: the job's bar, and below it that of the present stage."""

    def __init__(self, clock: Clock = time.monotonic, *, console: Console | None = None) -> None:
        super().__init__(clock)
        self.console = console or Console(stderr=True)
        self._bars: RichProgress | None = None
        self._whole_row: TaskID | None = None

    def say(self, message: str) -> None:
        self.console.print(message, highlight=False, markup=False)

    def warn(self, message: str) -> None:
        self.console.print(f"warning: {message}", style="yellow", highlight=False, markup=False)

    @contextmanager
    def _live(self) -> Iterator[None]:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[amount]}"), TimeElapsedColumn(), _Left())
        with RichProgress(*columns, console=self.console, transient=True, get_time=self.clock) as self._bars:
            yield

    @contextmanager
    def _showing_job(self, job: Job) -> Iterator[None]:
        with self._row("all", 1.0, "0 %", lambda: job.left(self.clock())) as self._whole_row:
            yield
        self._whole_row = None

    @contextmanager
    def _showing(self, stage: Stage) -> Iterator[Advance]:
        bars = self._bars
        assert bars is not None

        def advance(units: int) -> None:
            stage.done += units
            bars.update(row, completed=stage.done, amount=f"{stage.done}/{stage.total}")
            if self._job is not None:
                self._moved(self._job)

        with self._row(stage.title, stage.total, f"0/{stage.total}", lambda: stage.left(self.clock())) as row:
            yield advance

    @contextmanager
    def _row(self, title: str, total: float, amount: str, left: Callable[[], float | None]) -> Iterator[TaskID]:
        assert self._bars is not None
        row = self._bars.add_task(title, total=total, amount=amount, left=left)
        try:
            yield row
        finally:
            self._bars.remove_task(row)

    def _moved(self, job: Job) -> None:
        if self._bars is not None and self._whole_row is not None:
            self._bars.update(self._whole_row, completed=job.fraction(), amount=f"{100 * job.fraction():.0f} %")


class _Left(ProgressColumn):
    """The time left, of the row's own estimate."""

    def render(self, task: Task) -> Text:
        left = task.fields["left"]()
        return Text("" if left is None else f"{duration(left)} left")


def duration(seconds: float) -> str:
    """In words: 4.2 s, 40 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def _times(spent: float, left: float | None) -> str:
    return f"in {duration(spent)}" + ("" if left is None else f", {duration(left)} left")


def make_progress(*, quiet: bool) -> Progress:
    """The progress that suits standard error."""
    if quiet:
        return Silent()
    return Bars() if sys.stderr.isatty() else Lines()
