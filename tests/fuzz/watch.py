"""What a call may not do, whatever it is given: take long, take memory that the files do not justify, run or unpickle anything, write or
read outside of its directories, or raise anything but a `RoundelError`.

Reading and writing are seen by Python's audit events; what compiled readers open (safetensors) is not.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import roundel
from roundel.errors import RoundelError

__all__ = ["Outcome", "outcome"]

SECONDS = 20
"""Of the processor; thirty times as many on the clock, since other processes may have it."""
SPARE = 96 << 20
"""Bytes that any call may take."""
TIMES = 40
"""And so many times the size of its files: decoded weights in float32, a model, and a copy of it."""

FORBIDDEN = (
    "pickle.find_class",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.Popen",
    "socket.connect",
)
PACKAGE = str(Path(roundel.__file__).parent)


class Outcome(NamedTuple):
    """`kind` is `right`, `refused`, `theirs` (an error of Transformers' own, where users call it themselves), or what went wrong."""

    kind: str
    what: str = ""

    @property
    def bad(self) -> bool:
        """Whether it is none of what may be."""
        return self.kind not in ("right", "refused", "theirs")


class _Watch:
    """Installed once: audit hooks cannot be removed."""

    def __init__(self) -> None:
        self.armed: Path | None = None
        self.seen: list[str] = []
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.armed is None:
            return
        if event in FORBIDDEN and not _from_numba():
            self.seen.append(f"{event} {str(arguments)[:80]}")
        elif event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            given, flags = os.path.abspath(os.fsdecode(arguments[0])), arguments[2] or 0
            path = os.path.join(os.path.realpath(os.path.dirname(given)), os.path.basename(given))
            path = path if flags & os.O_NOFOLLOW else os.path.realpath(path)
            writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            inside = path.startswith(f"{self.armed}{os.sep}") and "/outside/" not in path
            if "/outside/" in path or (writes and not inside and not path.startswith("/dev/") and "__pycache__" not in path):
                self.seen.append(f"{'wrote' if writes else 'read'} {path}")


def _from_numba() -> bool:
    """Which keeps compiled functions of its own as pickles."""
    return any("/numba/" in frame.f_code.co_filename for frame, _ in traceback.walk_stack(None))


_WATCH: list[_Watch] = []


def outcome(call: Callable[[], object], scratch: Path, size: int, *, theirs: bool = False, patience: float = 1.0) -> Outcome:
    """Of a call on files of so many bytes, all in `scratch`; with `theirs` errors that pass no code of ours are those of Transformers."""
    if not _WATCH:
        _WATCH.append(_Watch())
    watch = _WATCH[0]
    watch.seen.clear()
    before = _peak(reset=True)
    timers = {signal.SIGPROF: (signal.ITIMER_PROF, patience * SECONDS), signal.SIGALRM: (signal.ITIMER_REAL, 30 * patience * SECONDS)}
    old = {number: signal.signal(number, _over) for number in timers}
    for timer, seconds in timers.values():
        signal.setitimer(timer, seconds)
    watch.armed = scratch
    try:
        call()
        found = Outcome("right")
    except RoundelError as error:
        found = Outcome("refused", type(error).__name__)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        found = _foreign(error, theirs)
    finally:
        watch.armed = None
        for number, (timer, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, old[number])
    if watch.seen:
        return Outcome("escape", watch.seen[0])
    taken = _peak() - before
    if taken > SPARE + TIMES * size:
        return Outcome("memory", f"{taken >> 20} MiB")
    return found


class _OverError(BaseException):
    pass


def _over(*_signal: object) -> None:
    raise _OverError


def _foreign(error: BaseException, theirs: bool) -> Outcome:
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename.startswith(PACKAGE)]
    if isinstance(error, _OverError):
        return Outcome("hang", f"{frames[-1].filename}:{frames[-1].name}")
    if theirs and not own:
        return Outcome("theirs", type(error).__name__)
    place = f"{Path(own[-1].filename).name}:{own[-1].name}" if own else f"{Path(frames[-1].filename).name}:{frames[-1].name}"
    text = re.sub(r"\d+", "N", str(error).splitlines()[0] if str(error) else "")
    return Outcome("foreign", f"{type(error).__name__} {place} {text[:70]}")


def _peak(*, reset: bool = False) -> int:
    """The most resident memory since the last reset, in bytes; 0 where the system does not say."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        return 1024 * int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]
    except (OSError, TypeError):
        return 0
