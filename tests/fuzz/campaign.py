"""Random changes to files of every kind, and what each call that reads them answers; see `edits`, `targets` and `watch`.

    python -m fuzz.campaign --seconds 600 -o benchmarks/results/fuzz.json      (`make fuzz`, from the repository's root)

Changes are made in one process, after each call was made undamaged, so that all is imported and compiled; another one watches it, tells a
crash and a hang in native code from their change, and starts it anew. Edits are drawn from the seed and the number of changes before, so
the same seed meets the same edits as long as the directories have the same bytes. A campaign goes on from the output that there is: counts
add up, with the commits that they were made at, and what went wrong at an earlier commit is tried again. What goes wrong is printed with
its edit, which belongs into `corpus.json` once it is mended. Processes of other cores take other seeds and outputs, to `--add` up.

Whole runs (quantize, export, tune, refine) take some thirty times as long as reading; they get 3 % of the changes. Of the pictures in
their reports one in sixteen is drawn.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch

from fuzz.edits import Edit, apply, random_edit
from fuzz.targets import CALLS, REFUSED, Bases
from fuzz.watch import Outcome, outcome
from roundel.evaluate import plots
from roundel.stages.report import versions
from roundel.store import write_json

ADDRESSES = 6 << 30
"""Bytes of address space that may be asked for beyond what is there at the beginning."""
DRAWN = 16
"""Of so many pictures one is drawn."""
STUCK = 900
"""Seconds after which a change that did not stop by itself is a hang."""
SAVED = 20
"""Seconds of work that can be lost."""


def one(name: str, edit: Edit | None, bases: Bases, scratch: Path, *, patience: float = 1.0) -> Outcome:
    """What a call answers to one change, or to none; it may take `patience` times as long as others."""
    base, call, _ = CALLS[name]
    source, given = base(bases), scratch / "given"
    for place in (given, scratch / "out"):
        shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(source, given)
    size = sum(path.stat().st_size for path in given.rglob("*") if path.is_file())
    if edit is not None:
        apply(edit, given)
    return outcome(lambda: call(bases, given, scratch), bases.path, size, theirs=name.startswith("from_pretrained"), patience=patience)


def undamaged(name: str, bases: Bases, scratch: Path) -> None:
    """Makes what a call reads, and calls it."""
    CALLS[name][0](bases)
    found = one(name, None, bases, scratch, patience=10)
    if found.kind == "memory":  # of what is imported and compiled at the first call
        found = one(name, None, bases, scratch, patience=10)
    assert found.kind == ("refused" if name in REFUSED else "right"), (name, found)


def prepared(place: Path) -> tuple[Bases, Path]:
    """What the calls need, and a directory to work in, with one beside it that nothing may touch."""
    bases, scratch = Bases(place), place / "scratch"
    (scratch / "outside").mkdir(parents=True, exist_ok=True)
    (scratch / "outside" / "secret").write_text("not to be read")
    return bases, scratch


class Campaign:
    """What was found, in the form that is written."""

    def __init__(self, output: Path, seed: int, commit: str) -> None:
        self.output = output
        if output.exists():
            self.found: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
        else:
            self.found = {
                "kind": "fuzz",
                "seed": seed,
                "mutations": 0,
                "outcomes": {},
                "seconds": 0,
                "rows": [],
                "failures": [],
                "stretches": [],
            }
        self.rows: dict[str, dict[str, Any]] = {row["call"]: row for row in self.found["rows"]}
        self.here = {"commit": commit, "seed": seed, "mutations": 0, "seconds": 0, "failures": 0, "versions": versions()}

    def count(self, name: str, kind: str) -> None:
        """One change more."""
        row = self.rows.setdefault(name, {"call": name})
        for counts in (row, self.found["outcomes"]):
            counts[kind] = counts.get(kind, 0) + 1
        self.found["mutations"] += 1
        self.here["mutations"] += 1

    def failed(self, name: str, edit: Edit, got: Outcome) -> None:
        """Once for each kind and commit."""
        self.here["failures"] += 1
        commit = self.here["commit"]
        if not any((known["what"], known["commit"]) == (got.what, commit) for known in self.found["failures"]):
            self.found["failures"].append({"call": name, "kind": got.kind, "what": got.what, "edit": json.dumps(edit), "commit": commit})
            print(json.dumps(self.found["failures"][-1])[:600], flush=True)

    def unmended(self) -> list[dict[str, Any]]:
        """What went wrong at other commits, and may do so no more."""
        return [known for known in self.found["failures"] if "mended" not in known and known["commit"] != self.here["commit"]]

    def save(self, seconds: float) -> None:
        """So many seconds since the last time."""
        if self.here not in self.found["stretches"]:
            self.found["stretches"].append(self.here)
        self.here["seconds"] += seconds
        self.found["seconds"] += seconds
        self.found["rows"] = [self.rows[name] for name in CALLS if name in self.rows]
        write_json(self.output, self.found)


def added(found: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Two campaigns as one, such as those of two cores."""
    rows: dict[str, dict[str, Any]] = {row["call"]: dict(row) for row in found["rows"]}
    for row in other["rows"]:
        own = rows.setdefault(row["call"], {"call": row["call"]})
        own.update({kind: own.get(kind, 0) + count for kind, count in row.items() if kind != "call"})
    kinds = [*found["outcomes"], *(kind for kind in other["outcomes"] if kind not in found["outcomes"])]
    return {
        **found,
        "mutations": found["mutations"] + other["mutations"],
        "outcomes": {kind: found["outcomes"].get(kind, 0) + other["outcomes"].get(kind, 0) for kind in kinds},
        "seconds": found["seconds"] + other["seconds"],
        "rows": [rows[name] for name in CALLS if name in rows],
        "failures": found["failures"] + other["failures"],
        "stretches": found["stretches"] + other["stretches"],
    }


def limited(more: int | None) -> None:
    """This process may have so many bytes of addresses more than it has; None: as many as it likes."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (hard if more is None else taken + more, hard))


def changed(campaign: Campaign, place: Path, seconds: float, only: str) -> None:
    """Changes for so long, or until this process is told to end."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    told = []
    signal.signal(signal.SIGTERM, lambda *_signal: told.append(True))
    bases, scratch = prepared(place)
    tempfile.tempdir = str(scratch)
    draw, pictures = plots._png, itertools.count()
    names = [name for name in CALLS if only in name]
    warm: set[str] = set()
    plots._png = lambda figure: b"not drawn" if next(pictures) % DRAWN else draw(figure)

    def warmed(name: str) -> None:
        if name not in warm:
            warm.add(name)
            (place / "pending").unlink(missing_ok=True)
            limited(None)
            undamaged(name, bases, scratch)  # all that it needs is imported and compiled
            limited(ADDRESSES)
            gc.collect()
            gc.freeze()

    for known in campaign.unmended():
        warmed(known["call"])
        if not one(known["call"], json.loads(known["edit"]), bases, scratch).bad:
            known["mended"] = campaign.here["commit"]
    random = Random(f"{campaign.found['seed']} {campaign.found['mutations']}")
    began = saved = now = time.monotonic()
    while now < began + seconds and not told:
        (name,) = random.choices(names, [CALLS[name][2] for name in names])
        warmed(name)
        edit = random_edit(random, CALLS[name][0](bases), links=name == "resume")
        (place / "pending").write_text(json.dumps([name, edit]))
        got = one(name, edit, bases, scratch)
        campaign.count(name, got.kind)
        if got.bad:
            campaign.failed(name, edit, got)
        now = time.monotonic()
        if now - saved > SAVED:
            campaign.save(now - saved)
            saved = now
    campaign.save(now - saved)


def watched(place: Path, campaign: Callable[[], Campaign], seconds: float, only: str) -> Outcome | None:
    """How a process that makes changes has ended, where a change ended it."""
    pending = place / "pending"
    pending.unlink(missing_ok=True)
    work = os.fork()
    if work == 0:
        code = 1
        try:
            changed(campaign(), place, seconds, only)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    signal.signal(signal.SIGTERM, lambda *_signal: os.kill(work, signal.SIGTERM))
    while True:
        ended, status = os.waitpid(work, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            if code > 0:
                raise SystemExit(code)
            return Outcome("crash", f"ended with {code}") if code else None
        if pending.exists() and time.time() - pending.stat().st_mtime > STUCK:
            os.kill(work, signal.SIGKILL)
            os.waitpid(work, 0)
            return Outcome("hang", "in native code")
        time.sleep(0.5)


def commit_here() -> str:
    """Of the source, marked where files differ from it."""
    line = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="calls whose names have this in them")
    parser.add_argument("--bases", type=Path, help="keep the directories there")
    parser.add_argument("-o", "--output", type=Path, help="goes on from what it has")
    parser.add_argument("--add", type=Path, help="another campaign's output, which is added to this one's; nothing is tried")
    given = parser.parse_args()
    if given.add is not None:
        write_json(given.output, added(*(json.loads(path.read_text(encoding="utf-8")) for path in (given.output, given.add))))
        return
    commit = commit_here()
    with tempfile.TemporaryDirectory() as temporary:
        place = (given.bases or Path(temporary)).resolve()
        place.mkdir(parents=True, exist_ok=True)
        output = (given.output or place / "fuzz.json").resolve()
        while (end := watched(place, lambda: Campaign(output, given.seed, commit), given.seconds, given.only)) is not None:
            campaign, (name, edit) = Campaign(output, given.seed, commit), json.loads((place / "pending").read_text())
            campaign.count(name, end.kind)
            campaign.failed(name, edit, end)
            campaign.save(0)
        found = json.loads(output.read_text(encoding="utf-8"))
    left = [failure for failure in found["failures"] if "mended" not in failure]
    print(f"{found['mutations']} changes: {found['outcomes']}; {len(left)} different failures")
    sys.exit(bool(left))


if __name__ == "__main__":
    main()
