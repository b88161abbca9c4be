"""Twenty processes killed (SIGKILL) at random moments of a job, and the same call again each time: does it end with the same bytes?

A job runs undisturbed once. Then, for each kill, a process with `work` is killed when its present stage has done a random part of its units
and a random time after that, stages in turn so that every sweep is hit; the same call then goes on from what is left and must end with the
same checkpoint. Jobs are the embedded model's, one with natural-gradient steps and tuning among them.

    python benchmarks/kills.py -o benchmarks/results/kills.json
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from larger_than_memory import digest

from roundel.progress import Silent
from roundel.stages.report import versions
from roundel.store import write_json

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {"scheme": "int3-g64", "sequences": 72, "seq_len": 128, "eval_sequences": 16, "prefix_sequences": 64},
    "natural, tuned": {
        **{"scheme": "int3-g64", "sequences": 24, "seq_len": 128, "eval_sequences": 16, "prefix_sequences": 24, "curvature": "pilot"},
        **{"natural_places": 2, "tune": "end-to-end", "tune_steps": 16, "tune_tokens": 512},
    },
}
STAGES = ("curvature", "rounding", "tuning", "evaluation", "prediction")


class Reported(Silent):
    """Prints each step of each stage, for whoever waits for a moment to kill."""

    @contextmanager
    def stage(self, title: str, total: int, *, share: float = 1.0) -> Iterator[Callable[[int], None]]:
        done = 0

        def advance(units: int) -> None:
            nonlocal done
            done += units
            print(f"{title} {done / max(1, total)}", flush=True)

        print(f"{title} 0", flush=True)
        yield advance


def one(job: str, output: str, work: str) -> None:
    """In a process of its own: the whole job."""
    import torch

    import roundel

    torch.set_num_threads(1)
    roundel.quantize("demo", output=output, work=work, calibration="stdlib", progress=Reported(), **SETTINGS[job])


def killed(line: list[str], stage: str, part: float, later: float) -> str | None:
    """Runs a process until a moment; says where it was killed, None if it ended before."""
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    at = None
    for report in process.stdout:
        at = report.strip()
        title, done = at.rsplit(" ", 1)
        if title == stage and float(done) >= part:
            time.sleep(later)
            process.kill()
            break
    process.stdout.close()
    return at if process.wait() < 0 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=3)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    if given.one:
        one(*given.one)
        return
    chance, rows = random.Random(given.seed), []
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)

        def line(job: str, label: str) -> list[str]:
            return [sys.executable, __file__, "--one", job, str(scratch / f"out-{label}"), str(scratch / f"work-{label}")]

        wanted = {}
        for job in SETTINGS:
            subprocess.run(line(job, job), check=True, stdout=subprocess.DEVNULL)
            wanted[job] = digest(scratch / f"out-{job}")
        plan = [(job, stage) for job in SETTINGS for stage in STAGES if stage != "tuning" or "tune" in SETTINGS[job]]
        for kill in range(given.kills):
            job, stage = plan[kill % len(plan)]
            where = killed(line(job, str(kill)), stage, 0.95 * chance.random(), 0.5 * chance.random())
            left_behind = (scratch / f"out-{kill}").exists()
            if not left_behind:  # else killed after the checkpoint had been put in place, or too late
                subprocess.run(line(job, str(kill)), check=True, stdout=subprocess.DEVNULL)
            same = digest(scratch / f"out-{kill}") == wanted[job]
            rows.append({"job": job, "killed_at": where, "output_left_behind": left_behind, "same_bytes": same})
            print(rows[-1], flush=True)
    same = sum(row["same_bytes"] for row in rows)
    print(
        f"{same} of {len(rows)} jobs that were killed end with the same bytes; killed: {sum(row['killed_at'] is not None for row in rows)}"
    )
    if given.output:
        write_json(given.output, {"kind": "kills", "rows": rows, "settings": SETTINGS, "versions": versions()})
    sys.exit(same < len(rows))


if __name__ == "__main__":
    main()
