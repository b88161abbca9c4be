"""Progress by a clock that the tests set."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from roundel.progress import Bars, Job, Lines, Progress, Silent, Stage, duration, make_progress


class Clock:
    """Shows the time that it was set to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def lines(clock: Clock) -> Lines:
    """Whose thread finds nothing to do: the clock stands still, but for `sleep`, and the tests beat at once after it."""
    return Lines(clock, first=10, every=30)


def told(capsys: pytest.CaptureFixture[str]) -> list[str]:
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()


# Lines


def test_a_quick_stage_tells_its_end_alone(lines: Lines, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with lines.stage("collecting", 8) as advance:
        for _ in range(8):
            clock.sleep(1)
            advance(1)
            lines.beat()
    assert told(capsys) == ["collecting: done in 8.0 s"]


def test_a_long_stage_tells_how_it_stands(lines: Lines, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with lines.stage("collecting", 100) as advance:
        for _ in range(100):
            clock.sleep(1)
            advance(1)
            lines.beat()
    assert told(capsys) == [
        "collecting: 10/100 in 10 s, 1 min 30 s left",
        "collecting: 40/100 in 40 s, 1 min 0 s left",
        "collecting: 70/100 in 1 min 10 s, 30 s left",
        "collecting: 100/100 in 1 min 40 s, 0.0 s left",
        "collecting: done in 1 min 40 s",
    ]


def test_a_stage_that_does_not_advance_tells_so(lines: Lines, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with lines.stage("collecting", 4):
        for _ in range(40):
            clock.sleep(1)
            lines.beat()
    assert told(capsys) == ["collecting: 0/4 in 10 s", "collecting: 0/4 in 40 s", "collecting: done in 40 s"]


def test_news_are_signs_of_life(lines: Lines, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with lines.stage("collecting", 4):
        clock.sleep(9)
        lines.say("hello")
        clock.sleep(9)
        lines.beat()
        assert told(capsys) == ["hello"]


def test_the_thread_tells_while_nothing_is_called(capsys: pytest.CaptureFixture[str]) -> None:
    with Lines(first=0.05, every=0.05).stage("collecting", 4):
        time.sleep(0.2)
    *lines, last = told(capsys)
    assert 1 <= len(lines) <= 4
    assert all(line.startswith("collecting: 0/4 in ") for line in lines)
    assert last.startswith("collecting: done in ")
    time.sleep(0.1)
    assert told(capsys) == []


def test_an_empty_stage_ends(lines: Lines, capsys: pytest.CaptureFixture[str]) -> None:
    with lines.stage("nothing", 0):
        pass
    assert told(capsys) == ["nothing: done in 0.0 s"]


def test_a_stage_that_fails_is_not_done(lines: Lines, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="x"), lines.job({"collecting": 1}), lines.stage("collecting", 4):
        raise ValueError("x")
    assert told(capsys) == []
    with lines.stage("again", 1):
        pass
    assert told(capsys) == ["again: done in 0.0 s"]


def test_lines_tell_of_the_job(lines: Lines, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with lines.job({"collecting": 1, "rounding": 3}):
        clock.sleep(10)
        lines.beat()
        with lines.stage("collecting", 2) as advance:
            clock.sleep(10)
            advance(1)
            lines.beat()
            clock.sleep(10)
            advance(1)
        with lines.stage("rounding", 4) as advance:
            clock.sleep(10)
            lines.beat()
            clock.sleep(30)
            advance(1)
            lines.beat()
    assert told(capsys) == [
        "all: 0 % in 10 s",
        "collecting: 1/2 in 10 s, 10 s left; all: 12 % in 20 s, 1 min 10 s left",
        "collecting: done in 20 s; all: 25 % in 30 s, 1 min 0 s left",
        "rounding: 0/4 in 10 s; all: 25 % in 40 s, 50 s left",
        "rounding: 1/4 in 40 s, 2 min 0 s left; all: 44 % in 1 min 10 s, 2 min 0 s left",
        "rounding: done in 40 s",
        "all: done in 1 min 10 s",
    ]


def test_a_job_within_a_job_belongs_to_it(lines: Lines, capsys: pytest.CaptureFixture[str]) -> None:
    with lines.job({"a": 1, "b": 1}):
        with lines.job({"a": 1, "c": 1}), lines.stage("a", 1), lines.stage("c", 1):
            pass
        assert [line.split(";")[1] for line in told(capsys)] == [" all: 0 % in 0.0 s", " all: 50 % in 0.0 s, 0.0 s left"]


def test_warnings_say_that_they_are(lines: Lines, capsys: pytest.CaptureFixture[str]) -> None:
    lines.say("hello")
    lines.warn("careful")
    assert told(capsys) == ["hello", "warning: careful"]


# The job


def run(job: Job, title: str, began: float, ended: float, share: float = 1) -> None:
    stage = Stage(title, 1, began)
    job.begin(stage, share)
    job.end(stage, ended)


def test_stages_over_and_their_pace_tell_the_rest() -> None:
    job = Job({"a": 1, "b": 2, "c": 1}, began=0)
    assert (job.fraction(), job.left(5)) == (0, None)
    run(job, "a", 5, 15)
    assert (job.fraction(), job.left(15)) == (0.25, 30)
    stage = Stage("b", 4, 15)
    job.begin(stage, 1)
    assert job.left(18) == 17 + 10  # by the pace of a, until b has one of its own
    assert job.left(100) == 10
    stage.done = 2
    assert job.fraction() == 0.5
    assert job.left(55) == 40 + (10 + 40) / 2  # b as fast as it is, c as fast as all so far
    job.end(stage, 95)
    assert (job.fraction(), job.left(95)) == (0.75, 30)


def test_a_stage_passed_by_is_left_out_until_it_begins() -> None:
    job = Job({"a": 6, "b": 1, "c": 1}, began=0)
    run(job, "b", 0, 10)
    assert (job.fraction(), job.left(10)) == (0.5, 10)
    run(job, "a", 10, 70)
    assert (job.fraction(), job.left(70)) == (0.875, 10)


def test_shares_of_a_stage() -> None:
    job = Job({"a": 1, "b": 3}, began=0)
    for _ in range(2):
        run(job, "a", 0, 5, share=0.5)
        run(job, "b", 0, 15, share=0.5)
    assert (job.fraction(), job.left(40)) == (1, 0)
    run(job, "b", 0, 15, share=0.5)  # one more than there should be
    assert (job.fraction(), job.left(40)) == (1, 0)


def test_the_fraction_never_falls() -> None:
    job = Job({"a": 8, "b": 1, "c": 1}, began=0)
    run(job, "b", 0, 10)
    assert job.fraction() == 0.5
    job.begin(Stage("a", 8, 10), 1)
    assert job.fraction() == 0.5


def test_stages_that_nobody_announced_count_for_nothing() -> None:
    job = Job({"a": 1, "b": 1}, began=0)
    run(job, "a", 0, 10)
    run(job, "other", 10, 1000)
    assert (job.fraction(), job.left(1000)) == (0.5, 10)


def test_weights_are_positive() -> None:
    with pytest.raises(ValueError, match="more than 0"):
        Job({"a": 0}, began=0)


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "0.0 s"), (4.25, "4.2 s"), (10, "10 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")]
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


# Bars, and the choice


def test_bars_show_the_job_and_its_stage(clock: Clock) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    bars = Bars(clock, console=console)
    with bars.job({"collecting": 1, "rounding": 3}):
        with bars.stage("collecting", 2) as advance:
            clock.sleep(20)
            advance(2)
        with bars.stage("rounding", 4) as advance:
            clock.sleep(20)
            advance(1)
            bars.say("hello")
            assert bars._bars is not None
            bars._bars.refresh()
            whole, stage = [row.description for row in bars._bars.tasks]
            assert (whole, stage) == ("all", "rounding")
            shown = Console(width=120, file=io.StringIO(), record=True)
            shown.print(bars._bars.get_renderable())
            first, second = shown.export_text().splitlines()
            assert "44 %" in first
            assert "1 min 0 s left" in first
            assert "1/4" in second
            assert "1 min 0 s left" in second
    assert isinstance(console.file, io.StringIO)
    written = console.file.getvalue()
    assert all(text in written for text in ("hello", "collecting: done in 20 s", "rounding: done in 20 s", "all: done in 40 s"))


def test_bars_without_a_job(clock: Clock) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    bars = Bars(clock, console=console)
    with bars.stage("collecting", 2) as advance:
        advance(1)
        assert bars._bars is not None
        assert [row.description for row in bars._bars.tasks] == ["collecting"]
    bars.warn("careful")
    assert isinstance(console.file, io.StringIO)
    assert "warning: careful" in console.file.getvalue()


def test_silence(capsys: pytest.CaptureFixture[str]) -> None:
    progress: Progress = Silent()
    with progress.job({"collecting": 1}), progress.stage("collecting", 4, share=0.5) as advance:
        advance(4)
    progress.say("hello")
    progress.warn("careful")
    assert capsys.readouterr() == ("", "")


def test_the_choice_depends_on_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(make_progress(quiet=True), Silent)
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    assert isinstance(make_progress(quiet=False), Lines)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert isinstance(make_progress(quiet=False), Bars)
