"""Random changes to files of every kind, and what each call that reads them answers; see `edits`, `targets` and `watch`.

    python -m fuzz.campaign --seconds 600 -o benchmarks/results/fuzz.json      (`make fuzz`, from the repository's root)

Edits are drawn from a seed, so the same seed meets the same edits as long as the directories have the same bytes. What goes wrong is
printed with its edit, which belongs into `corpus.json` once it is mended.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from random import Random

import torch

from fuzz.edits import Edit, apply, random_edit
from fuzz.targets import CALLS, Bases
from fuzz.watch import Outcome, outcome
from roundel.stages.report import versions
from roundel.store import write_json

ADDRESSES = 6 << 30
"""Bytes of address space that may be asked for beyond what is there at the beginning."""


def one(name: str, edit: Edit | None, bases: Bases, scratch: Path) -> Outcome:
    """What a call answers to one change, or to none."""
    base, call, _ = CALLS[name]
    source, given = base(bases), scratch / "given"
    for place in (given, scratch / "out"):
        shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(source, given)
    size = sum(path.stat().st_size for path in given.rglob("*") if path.is_file())
    if edit is not None:
        apply(edit, given)
    return outcome(lambda: call(bases, given, scratch), bases.path, size, theirs=name.startswith("from_pretrained"))


def undamaged(name: str, bases: Bases, scratch: Path) -> None:
    """Makes what a call reads, and calls it."""
    CALLS[name][0](bases)
    found = one(name, None, bases, scratch)
    assert found.kind == "right" or (name.startswith("export") and found.kind == "refused"), (name, found)  # not to every format


def prepared(place: Path) -> tuple[Bases, Path]:
    """What the calls need, and a directory to work in, with one beside it that nothing may touch."""
    bases, scratch = Bases(place), place / "scratch"
    (scratch / "outside").mkdir(parents=True, exist_ok=True)
    (scratch / "outside" / "secret").write_text("not to be read")
    return bases, scratch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="calls whose names have this in them")
    parser.add_argument("--bases", type=Path, help="keep the directories there")
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as temporary:
        place = (given.bases or Path(temporary)).resolve()
        bases, scratch = prepared(place)
        tempfile.tempdir = str(scratch)
        names = [name for name in CALLS if given.only in name]
        for name in names:
            undamaged(name, bases, scratch)  # everything is imported and compiled
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (taken + ADDRESSES, taken + ADDRESSES))
        random, found = Random(given.seed), {name: Counter[str]() for name in names}
        failures: dict[str, dict[str, object]] = {}
        started = time.monotonic()
        while time.monotonic() - started < given.seconds:
            (name,) = random.choices(names, [CALLS[name][2] for name in names])
            edit = random_edit(random, CALLS[name][0](bases), links=name == "resume")
            got = one(name, edit, bases, scratch)
            found[name][got.kind] += 1
            if got.bad and got.what not in failures:
                failures[got.what] = {"call": name, "kind": got.kind, "what": got.what, "edit": edit}
                print(json.dumps(failures[got.what])[:600], flush=True)
    total = sum(found.values(), Counter[str]())
    print(f"{total.total()} changes: {dict(total)}; {len(failures)} different failures")
    if given.output:
        rows = [{"call": name, **counts} for name, counts in found.items()]
        head = {"kind": "fuzz", "mutations": total.total(), "outcomes": dict(total), "seconds": given.seconds, "seed": given.seed}
        write_json(given.output, {**head, "rows": rows, "failures": list(failures.values()), "versions": versions()})
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
