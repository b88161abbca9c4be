"""Progress where there is no terminal."""

import pytest

from roundel import progress
from roundel.progress import Lines, Silent, make_progress


@pytest.fixture(autouse=True)
def _every_stage_is_long(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "quick" not in request.node.name:
        monkeypatch.setattr(progress, "QUICK", 0.0)


def test_a_quick_stage_tells_its_end_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with Lines().stage("collecting", 8) as advance:
        for _ in range(8):
            advance(1)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_lines_tell_quarters_and_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    with Lines().stage("collecting", 8) as advance:
        for _ in range(8):
            advance(1)
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert [line.split(",")[0] for line in lines[:-1]] == [f"collecting: {done}/8" for done in (2, 4, 6)]
    assert lines[-1].startswith("collecting: done in ")


def test_a_large_step_tells_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with Lines().stage("collecting", 10) as advance:
        advance(9)
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_an_empty_stage_ends(capsys: pytest.CaptureFixture[str]) -> None:
    with Lines().stage("nothing", 0):
        pass
    assert capsys.readouterr().err.startswith("nothing: done")


def test_a_stage_that_fails_is_not_done(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="x"), Lines().stage("collecting", 4):
        raise ValueError("x")
    assert "done" not in capsys.readouterr().err


def test_warnings_say_that_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    Lines().say("hello")
    Lines().warn("careful")
    assert capsys.readouterr().err == "hello\nwarning: careful\n"


def test_silence(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Silent()
    with progress.stage("collecting", 4) as advance:
        advance(4)
    progress.say("hello")
    progress.warn("careful")
    assert capsys.readouterr() == ("", "")


def test_the_choice_depends_on_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(make_progress(quiet=True), Silent)
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    assert isinstance(make_progress(quiet=False), Lines)
