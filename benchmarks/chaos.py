"""Jobs that are disturbed: what is lost, what is said, and does the same command end with the same bytes?

    signals   a job is killed (SIGKILL), told to end (SIGTERM) or stopped for a while (SIGSTOP, SIGCONT) at a random moment; then the same
              command again, before which every second time all files of its work directory are dated to another decade
    full      no byte is free from a random moment of a stage on, on a file system of its own (tmpfs); then there is room again
    errors    system calls that change files fail with EIO, the n-th and all that follow (fault injection by strace)
    read-only the file system of output and work directory cannot be written to
    together  two processes with the same output, and the same work directory
    memory    the process may have so much more memory than it begins with (RLIMIT_DATA); then there is enough

Jobs are commands on a random model of three layers: `quantize` with all that it keeps (natural-gradient steps, tuning of both kinds, an
allocation of bits, quantized ends), `collect`, `tune`, `refine` of what was rounded to nearest, `export`. A job is a process forked off
this one, in which all is imported already, that runs the command line's `main`, without the pictures of reports. File systems need the
rights to mount them; what cannot be had is said in the result.

A unit of work is what a command need not do again: a group's curvature or codes, moved weights, hidden states of the backward sweep, sums
of a factors directory, a saved state of tuning. It is lost if it was whole on the disk when the job ended and was made again.

    python benchmarks/chaos.py -o benchmarks/results/chaos.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

from roundel import progress
from roundel.commands.app import main as command_line
from roundel.evaluate import plots
from roundel.stages import collecting, export, quantize, refine, tune  # noqa: F401 (before the forks)
from roundel.stages.report import versions
from roundel.stages.rounding import natural
from roundel.store import write_json

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from e2e import tiny

TEXT = ["--sequences", "12", "--seq-len", "16", "--eval-sequences", "4", "--batch-size", "2"]
ROUND = ["--scheme", "int3-g16", "--sweeps", "1", "--prefix-aware", "--prefix-sequences", "12"]
TUNED = ["--tune-steps", "16", "--tune-tokens", "64"]
UNITS = ("curvature/????.safetensors", "rounded/????.safetensors", "rounded/moved-????.safetensors", "ends/*", "hidden/curvature/*.bin")
TUNING = "tuning.safetensors"
SIGNALS = ("SIGKILL", "SIGTERM", "SIGSTOP")
NEAREST = ["--scheme", "int4-g32", "--format", "gptq", "--curvature", "identity", "--sweeps", "0", "--no-prefix-aware"]
ROOM = 32 << 20
MARGINS = (0.1, 0.3, 0.5, 0.6, 0.7, 0.8)
"""Of the memory that a job takes more than it begins with."""


ABORTS = ("bad_alloc", "LLVM ERROR: out of memory")
"""What native code says that ends a process for lack of memory, as docs/guarantees.md has it."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A command, which is given the model, the text, what was made before and where to write to."""

    command: str
    options: tuple[str, ...]
    stages: tuple[str, ...]
    given: str = "model"
    works: bool = True
    """Whether it has a work directory."""


JOBS = {
    "quantize": Job(
        command="quantize",
        options=(*TEXT, *ROUND, "--curvature", "kfac", "--natural-places", "1"),
        stages=("curvature", "rounding", "writing", "evaluation", "prediction"),
    ),
    "quantize, chosen and allocated, tuned end to end": Job(
        command="quantize",
        options=(
            *TEXT,
            "--sequences",
            "64",
            *ROUND,
            "--bits",
            "4.5",
            "--schemes",
            "int2-g16,int6-g16",
            *TUNED,
            "--tune",
            "end-to-end",
            "--natural-places",
            "0",
        ),
        stages=("curvature", "rounding", "tuning", "writing", "evaluation", "prediction"),
    ),
    "quantize, ends too, tuned by blocks": Job(
        command="quantize",
        options=(
            *(*TEXT, "--scheme", "q4_0", "--format", "gguf", "--embedding", "q8_0", "--head", "q8_0", "--no-prefix-aware"),
            *("--curvature", "sketch-b:rounds=2", *TUNED, "--tune", "blocks"),
        ),
        stages=("curvature", "rounding", "tuning", "writing", "evaluation", "prediction"),
    ),
    "collect": Job(command="collect", options=(*TEXT, "--curvature", "sketch-b:rounds=2", "--resume"), stages=("curvature",), works=False),
    "tune": Job(
        command="tune",
        options=(*TUNED, "--batch-size", "2"),
        stages=("tuning", "writing", "evaluation", "prediction"),
        given="made",
    ),
    "refine": Job(
        command="refine",
        options=(*TEXT, "--sweeps", "1", "--curvature", "kfac", "--natural-places", "1", *TUNED, "--tune", "end-to-end"),
        stages=("curvature", "rounding", "tuning", "evaluation", "prediction"),  # it writes after the last, told by none
        given="nearest",
    ),
    "export": Job(command="export", options=("--to", "native"), stages=("writing",), given="made", works=False),
}


@dataclass(kw_only=True)
class Ended:
    """How a process has ended."""

    code: int
    """Its exit code; negative: the signal."""
    said: str
    """On standard error."""
    steps: list[tuple[str, float]] = field(default_factory=list)
    """Stages, and how much of each was done."""
    made: list[str] = field(default_factory=list)
    """Files that were given their names."""
    seconds: float = 0.0
    memory: int = 0
    """Bytes that it had at most."""

    @property
    def at(self) -> str:
        """Where it was in the end."""
        return f"{self.steps[-1][0]} {self.steps[-1][1]:.2f}" if self.steps else "before any stage"

    @property
    def saves(self) -> int:
        """How often it has saved a state of tuning."""
        return sum(Path(path).name == TUNING for path in self.made)

    @property
    def one_error(self) -> bool:
        """Whether it said one line, that this is an error."""
        return self.said.startswith("error: ") and self.said.count("\n") == 1


class Told(progress.Silent):
    """Notes each step of each stage in a file, and lets something happen there."""

    def __init__(self, notes: int, happens: Callable[[str, float], None]) -> None:
        self.notes, self.happens = notes, happens

    @contextmanager
    def stage(self, title: str, total: int, *, share: float = 1.0) -> Iterator[Callable[[int], None]]:
        done = 0

        def advance(units: int) -> None:
            nonlocal done
            done += units
            part = done / max(1, total)
            os.write(self.notes, f"at {title} {part}\n".encode())
            self.happens(title, part)

        advance(0)
        yield advance


class Process:
    """A command in a process of its own."""

    def __init__(
        self,
        arguments: list[str],
        *,
        happens: Callable[[str, float], None] = lambda _title, _part: None,
        first: Callable[[], None] = lambda: None,
        waits: bool = False,
    ) -> None:
        """Starts it; `happens` at each step and `first` are called in it, with `waits` it begins when told to."""
        self._notes, self._error = (tempfile.TemporaryFile() for _ in range(2))  # noqa: SIM115 (until it has ended)
        gate, self._gate = os.pipe()
        self._began = time.monotonic()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of threads that this process does not have
            self.pid = os.fork()
        if self.pid == 0:
            self._run(arguments, gate, happens, first)
        os.close(gate)
        if not waits:
            self.go()

    def go(self) -> None:
        """The command begins."""
        os.close(self._gate)

    def _run(self, arguments: list[str], gate: int, happens: Callable[[str, float], None], first: Callable[[], None]) -> None:
        code, notes = 99, self._notes.fileno()
        try:
            os.close(self._gate)
            os.dup2(self._error.fileno(), 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.read(gate, 1)

            def audit(event: str, given: tuple[Any, ...]) -> None:
                if event == "os.rename":
                    os.write(notes, f"made {given[1]}\n".encode())

            sys.addaudithook(audit)
            progress.make_progress = lambda *, quiet: Told(notes, happens)  # type: ignore[assignment]
            natural.STEP_TOKENS = 64
            plots._png = lambda _figure: b"not drawn"
            torch.set_num_threads(1)
            first()
            sys.argv = ["roundel", *arguments]
            command_line()
        except SystemExit as ended:
            code = int(ended.code or 0)
        except BaseException:
            with suppress(BaseException):
                traceback.print_exc()
            code = 1
        finally:
            with suppress(BaseException):
                sys.stderr.flush()
                os.write(notes, f"memory {status_bytes('VmPeak')}\n".encode())
            os._exit(code)

    def wait(self) -> Ended:
        """Until it has ended."""
        _, status = os.waitpid(self.pid, 0)
        told, said = (_read(file) for file in (self._notes, self._error))
        said = re.sub(rf"{re.escape(tempfile.gettempdir())}/(tmp\w+/)?", "", said)
        found = Ended(code=os.waitstatus_to_exitcode(status), said=said, seconds=time.monotonic() - self._began)
        for line in told.splitlines():
            kind, _, rest = line.partition(" ")
            if kind == "at":
                title, _, part = rest.rpartition(" ")
                found.steps.append((title, float(part)))
            elif kind == "made":
                found.made.append(rest)
            elif kind == "memory":
                found.memory = int(rest)
        return found


def _read(file: IO[bytes]) -> str:
    file.seek(0)
    with file:
        return file.read().decode(errors="replace")


def status_bytes(key: str) -> int:
    """What this process has of memory."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) << 10
    return 0


@dataclass(frozen=True, kw_only=True)
class Place:
    """A directory in which a job writes."""

    path: Path

    @property
    def output(self) -> Path:
        return self.path / "out"

    @property
    def work(self) -> Path:
        return self.path / "work"

    def digest(self) -> str:
        """Of all that the output holds but what says how long it took."""
        found = hashlib.sha256()
        for path in sorted(self.output.rglob("*")):
            if path.is_file() and path.name not in ("roundel.json", "refined.json", "README.md", "report.html", "lock"):
                found.update(path.name.encode() + path.read_bytes())
        return found.hexdigest()

    def litter(self) -> list[str]:
        """What lies beside output and work directory."""
        return sorted(path.name for path in self.path.iterdir() if path.name not in ("out", "work", "other", "ballast"))

    def units(self) -> set[str]:
        """Files that are whole and need not be made again."""
        found = [path for pattern in UNITS for path in self.work.glob(pattern)] if self.work.is_dir() else []
        found += self.output.glob("sums-*.safetensors")
        return {str(path) for path in found if path.is_file() and not path.name.startswith(".")}

    def tuned(self) -> int:
        """How often a state of tuning was saved."""
        path = self.work / TUNING
        if not path.is_file():
            return 0
        with safe_open(path, framework="pt") as stored:
            history = json.loads(stored.metadata()["roundel"])["history"]
        return len(history) - ("step" in history[0])  # of steps the first row is their start

    def redated(self, chance: random.Random) -> None:
        """Dates every file to some time in fifty years."""
        for path in self.path.rglob("*"):
            when = chance.uniform(0, 50 * 365 * 86400)
            os.utime(path, (when, when), follow_symlinks=False)


class Chaos:
    """The campaign: what jobs give undisturbed, and rows of what became of those that were disturbed."""

    def __init__(self, scratch: Path, seed: int, names: list[str]) -> None:
        self.scratch, self.chance, self.rows = scratch, random.Random(seed), list[dict[str, Any]]()
        self.jobs = {name: job for name, job in JOBS.items() if name in names}
        self.left_out: dict[str, str] = {}
        self._count = 0
        self.wanted: dict[str, str] = {}
        self.usual: dict[str, Ended] = {}

    def prepare(self) -> None:
        """The model, its text, and every job undisturbed."""
        if os.fork() == 0:  # torch's threads are to begin in the jobs
            torch.manual_seed(0)
            LlamaForCausalLM(LlamaConfig(**{**tiny.MODERN, "num_hidden_layers": 3})).save_pretrained(self.scratch / "model")
            tiny.make_tokenizer(starts=False).save_pretrained(self.scratch / "model")
            (self.scratch / "text.txt").write_text(tiny.make_text(9000), encoding="utf-8")
            os._exit(0)
        assert os.wait()[1] == 0
        text = ["--calibration", str(self.scratch / "text.txt"), "--quiet"]
        nearest = Process(["quantize", str(self.scratch / "model"), "-o", str(self.scratch / "nearest"), *TEXT, *NEAREST, *text]).wait()
        if nearest.code:
            raise SystemExit(nearest.said)
        for name, job in ({"quantize": JOBS["quantize"]} | self.jobs).items():
            place = self.place()
            self.usual[name] = Process(self.line(job, place)).wait()
            if self.usual[name].code:
                raise SystemExit(f"{name}: {self.usual[name].said}")
            self.wanted[name] = place.digest()
            if name == "quantize":
                shutil.copytree(place.output, self.scratch / "made")
            shutil.rmtree(place.path)
            print(f"{name}: {self.usual[name].seconds:.1f} s undisturbed", flush=True)

    def place(self, inside: Path | None = None) -> Place:
        """A new one."""
        self._count += 1
        path = (inside or self.scratch) / f"place-{self._count}"
        path.mkdir()
        return Place(path=path)

    def line(self, job: Job, place: Place) -> list[str]:
        """The command."""
        text = ["--calibration", str(self.scratch / "text.txt")] if "--sequences" in job.options else []
        text += ["--reference", str(self.scratch / "model")] if job.command == "refine" else []
        work = ["--work", str(place.work)] if job.works else []
        return [job.command, str(self.scratch / job.given), "-o", str(place.output), *job.options, *text, *work, "--quiet"]

    def again(self, name: str, place: Place, row: dict[str, Any]) -> None:
        """The same command once more, undisturbed, and what that says of what was left."""
        before, saved = place.units(), place.tuned()
        ended = Process(self.line(JOBS[name], place)).wait()
        row["again"] = ended.code
        row["units_kept"] = len(before) + saved
        row["units_lost"] = len(before & set(ended.made)) + max(0, saved + ended.saves - self.usual[name].saves)
        row["same_bytes"] = ended.code == 0 and place.digest() == self.wanted[name]
        if ended.code:
            row["said_again"] = ended.said[-300:]

    def note(self, kind: str, name: str, row: dict[str, Any], place: Place | None = None) -> None:
        """Keeps a row; what was written is removed."""
        self.rows.append({"kind": kind, "job": name, **row})
        print(self.rows[-1], flush=True)
        if place is not None:
            shutil.rmtree(place.path, ignore_errors=True)

    def signals(self, count: int) -> None:
        """That many jobs, in turn, are hit; those that ended before do not count."""
        names, hit = list(self.jobs), 0
        while hit < count:
            name, kind = names[hit % len(names)], SIGNALS[hit // len(names) % len(SIGNALS)]
            place = self.place()
            process = Process(self.line(JOBS[name], place))
            time.sleep(self.chance.uniform(0, self.usual[name].seconds))
            os.kill(process.pid, signal.Signals[kind])
            if kind == "SIGSTOP":
                time.sleep(self.chance.uniform(0.05, 0.5))
                os.kill(process.pid, signal.SIGCONT)
            ended = process.wait()
            row: dict[str, Any] = {"signal": kind, "at": ended.at, "code": ended.code}
            if kind == "SIGSTOP":
                hit += 1
                row["same_bytes"] = ended.code == 0 and place.digest() == self.wanted[name]
                self.note("signals", name, row, place)
                continue
            if ended.code == 0:  # it came too late
                shutil.rmtree(place.path)
                continue
            hit += 1
            row["expected_code"] = ended.code == (-signal.SIGKILL if kind == "SIGKILL" else 143)
            row["no_output"] = JOBS[name].command == "collect" or not place.output.exists()
            row["litter"] = place.litter()
            row["redated"] = hit % 2 == 0
            if row["redated"]:
                place.redated(self.chance)
            if place.output.exists() and JOBS[name].command != "collect":  # killed after it was put in place: it is whole
                row["no_output"] = row["same_bytes"] = place.digest() == self.wanted[name]
            else:
                self.again(name, place, row)
            self.note("signals", name, row, place)

    def full(self) -> None:
        """Each stage of each job, with no room left."""
        with self.mounted("full") as disk:
            if disk is None:
                return
            for name, job in self.jobs.items():
                for stage in job.stages:
                    place, part, ballast = self.place(disk), self.chance.uniform(0, 0.6), disk / "ballast"
                    shutil.copytree(self.scratch / "made", place.path / "other")
                    reached = False

                    def fill(title: str, done: float, stage: str = stage, part: float = part, ballast: Path = ballast) -> None:
                        nonlocal reached
                        reached = reached or (title == stage and done >= part)
                        if reached:
                            filled(ballast)

                    ended = Process(self.line(job, place), happens=fill).wait()
                    row: dict[str, Any] = {"stage": stage, "at": ended.at, "code": ended.code, "said": ended.said[-300:]}
                    row["clear"] = (
                        ended.code == 4 and ended.one_error and ("no space is left" in ended.said or "took no more" in ended.said)
                    )
                    row["no_output"] = job.command == "collect" or not place.output.exists()
                    row["litter"] = place.litter()
                    row["others_whole"] = same_files(place.path / "other", self.scratch / "made")
                    ballast.unlink(missing_ok=True)
                    self.again(name, place, row)
                    self.note("full", name, row, place)

    def read_only(self) -> None:
        """Each job, where nothing can be written."""
        with self.mounted("read-only") as disk:
            if disk is None:
                return
            for name, job in self.jobs.items():
                place = self.place(disk)
                run("mount", "-o", "remount,ro", str(disk))
                ended = Process(self.line(job, place)).wait()
                run("mount", "-o", "remount,rw", str(disk))
                row = {"code": ended.code, "said": ended.said[-300:], "clear": ended.code in (2, 4) and ended.one_error}
                self.again(name, place, row)
                self.note("read-only", name, row, place)

    def errors(self, count: int) -> None:
        """Each job, with system calls that fail from the n-th on."""
        if shutil.which("strace") is None:
            self.left_out["errors"] = "there is no strace"
            return
        calls = "pwritev,pwritev2,pwrite64,ftruncate,rename,renameat,renameat2"
        for number in range(count):
            for name, job in self.jobs.items():
                place = self.place()
                process = Process(self.line(job, place), waits=True)
                nth = 1 + int(self.chance.expovariate(1 / (4.0 if number % 2 else 40.0)))
                injected = ["strace", "-f", "-qq", "-o", "/dev/null", "-p", str(process.pid), f"-etrace={calls}"]
                tracer = subprocess.Popen([*injected, f"-einject={calls}:error=EIO:when={nth}+"], stderr=subprocess.DEVNULL)
                while "TracerPid:\t0" in Path(f"/proc/{process.pid}/status").read_text() and tracer.poll() is None:
                    time.sleep(0.01)
                process.go()
                ended = process.wait()
                tracer.wait()
                row: dict[str, Any] = {"at": ended.at, "nth": nth, "code": ended.code, "said": ended.said[-300:]}
                if ended.code == 0:  # there were not as many
                    row["same_bytes"] = place.digest() == self.wanted[name]
                else:
                    row["clear"] = ended.code == 4 and ended.one_error
                    row["no_output"] = job.command == "collect" or not place.output.exists()
                    row["litter"] = [name for name in place.litter() if not name.startswith(".out.")]  # nothing can be renamed
                    self.again(name, place, row)
                self.note("errors", name, row, place)

    def together(self) -> None:
        """Two processes with everything the same, and two with work directories of their own."""
        for name, job in self.jobs.items():
            for same_work in (True, False) if job.works else (True,):
                place = self.place()
                lines = [self.line(job, place), self.line(job, place)]
                if not same_work:
                    lines[1][lines[1].index(str(place.work))] += "-2"
                processes = [Process(line) for line in lines]
                ended = [process.wait() for process in processes]
                codes = sorted(each.code for each in ended)
                losers = [each for each in ended if each.code]
                row = {"codes": codes, "same_work": same_work, "said": "".join(each.said for each in losers)[-300:]}
                row["clear"] = codes in ([0, 2], [0, 4]) and all(each.one_error for each in losers)
                row["same_bytes"] = place.digest() == self.wanted[name]
                self.note("together", name, row, place)

    def memory(self) -> None:
        """Each job, with less memory than it needs."""
        for name, job in self.jobs.items():
            for margin in MARGINS:
                place = self.place()
                most = self.usual[name].memory - status_bytes("VmSize")

                def limited(margin: float = margin, most: int = most) -> None:
                    limit = status_bytes("VmSize") + int(margin * most)
                    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

                ended = Process(self.line(job, place), first=limited).wait()
                row: dict[str, Any] = {"margin": margin, "at": ended.at, "code": ended.code, "said": ended.said[-300:]}
                if ended.code == 0:
                    row["same_bytes"] = place.digest() == self.wanted[name]
                else:
                    row["aborted"] = ended.code == -signal.SIGABRT and any(word in ended.said for word in ABORTS)
                    row["clear"] = row["aborted"] or (ended.code == 6 and ended.one_error)
                    row["no_output"] = job.command == "collect" or not place.output.exists()
                    self.again(name, place, row)
                self.note("memory", name, row, place)

    @contextmanager
    def mounted(self, kind: str) -> Iterator[Path | None]:
        """A small file system; None where it cannot be had."""
        disk = self.scratch / kind
        disk.mkdir()
        if run("mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", str(disk)):
            self.left_out[kind] = "no file system can be mounted here"
            yield None
            return
        try:
            yield disk
        finally:
            run("umount", "-l", str(disk))


def run(*line: str) -> int:
    """The exit code of a command, which may not be there."""
    try:
        return subprocess.run(line, check=False, stderr=subprocess.DEVNULL).returncode
    except OSError:
        return 127


def filled(ballast: Path) -> None:
    """Takes whatever is free."""
    with ballast.open("ab", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            with suppress(OSError):  # no space left on device
                while True:
                    file.write(bytes(size))


def same_files(first: Path, second: Path) -> bool:
    """Whether two directories hold the same."""
    ours, theirs = ({p.relative_to(d): p.read_bytes() for p in d.rglob("*") if p.is_file()} for d in (first, second))
    return ours == theirs


def faults(row: dict[str, Any]) -> list[str]:
    """What is not as promised."""
    wanted = {
        "same_bytes": True,
        "units_lost": 0,
        "clear": True,
        "no_output": True,
        "others_whole": True,
        "expected_code": True,
        "again": 0,
    }
    found = [key for key, value in wanted.items() if row.get(key, value) != value]
    return found + (["litter"] if row.get("litter") and row.get("signal") != "SIGKILL" else [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--signals", type=int, default=108)
    parser.add_argument("--errors", type=int, default=4, help="times each job")
    parser.add_argument(
        "--only", nargs="*", default=["signals", "full", "read-only", "errors", "together", "memory"], help="rows of others stay"
    )
    parser.add_argument("--jobs", nargs="*", default=list(JOBS), choices=JOBS, metavar="JOB", help="rows of others stay")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    began, others = time.monotonic(), {}
    if given.output and given.output.exists():
        others = json.loads(given.output.read_text(encoding="utf-8"))
        others["rows"] = [row for row in others["rows"] if row["kind"] not in given.only or row["job"] not in given.jobs]
    with tempfile.TemporaryDirectory() as name:
        chaos = Chaos(Path(name), given.seed, given.jobs)
        chaos.prepare()
        campaigns = {
            "signals": lambda: chaos.signals(given.signals),
            "full": chaos.full,
            "read-only": chaos.read_only,
            "errors": lambda: chaos.errors(given.errors),
            "together": chaos.together,
            "memory": chaos.memory,
        }
        for kind in given.only:
            campaigns[kind]()
            found = result(chaos, others, given.seed, round(time.monotonic() - began))
            if given.output:
                write_json(given.output, found)
    print(json.dumps(found["summary"], indent=2))
    sys.exit(any(row["faults"] for row in found["rows"]))


def result(chaos: Chaos, others: dict[str, Any], seed: int, seconds: int) -> dict[str, Any]:
    """What there is so far, with the rows of `others`, an earlier result."""
    rows = [*others.get("rows", []), *({**row, "faults": faults(row)} for row in chaos.rows)]
    seconds += others.get("seconds", 0)
    summary = {
        kind: {
            "disturbed": len(own),
            "same_bytes": sum(row.get("same_bytes", False) for row in own),
            "units_kept": sum(row.get("units_kept", 0) for row in own),
            "units_lost": sum(row.get("units_lost", 0) for row in own),
            "aborted": sum(row.get("aborted", False) for row in own),
            "faults": dict(Counter(fault for row in own for fault in row["faults"])),
        }
        for kind in dict.fromkeys(row["kind"] for row in rows)
        for own in [[row for row in rows if row["kind"] == kind]]
    }
    jobs = {name: [job.command, *job.options] for name, job in JOBS.items()}
    found = {"kind": "chaos", "seed": seed, "seconds": seconds, "summary": summary, "left_out": chaos.left_out, "rows": rows}
    return {**found, "jobs": jobs, "versions": versions()}


if __name__ == "__main__":
    main()
