"""What `roundel plan` says of a job on a real model, and what the same job then takes: time, CPU time, memory, KL.

    python benchmarks/planned.py MODEL [MODEL ...] --calibration c4.txt --eval-data heldout.txt [--scheme int3-g64] [--memory 5G]

Both by their commands, on all cores, `--effort quick`; anything else that runs meanwhile makes the seconds worth nothing. `--kept` is where
the written directories and unfinished work stay, so that a stopped job goes on (its seconds then are of the rest only, and no row is
written). Rows go to `benchmarks/results/planned.json`, one for a model, a scheme and a memory.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from commands import keep_row, read_json, run

from roundel.stages.report import versions


def row_of(model: Path, options: list[str], kept: Path) -> dict[str, Any] | None:
    """None of a job that was stopped before."""
    roundel, plan = [sys.executable, "-m", "roundel"], kept / "plan.json"
    out, work = kept / "out", kept / "work"
    if stopped := work.exists():
        print(f"{work} is half done: the job goes on, and no row is made of it", file=sys.stderr)
    else:
        took = run([*roundel, "plan", str(model), *options, "--quiet", "--json", str(plan)])
    shutil.rmtree(out, ignore_errors=True)
    spent = run([*roundel, "quantize", str(model), "-o", str(out), *options, "--work", str(work)])
    shutil.rmtree(work)
    if stopped:
        return None
    planned, report = read_json(plan), read_json(out / "roundel.json")
    measured = report["evaluation"]
    return {
        **spent,
        "planned": {name: planned[name] for name in ("seconds", "total_seconds", "memory", "timed")} | {"took_seconds": took["seconds"]},
        "stages": report["seconds"],
        "bits_per_weight": report["bits_per_weight"]["quantized"],
        "kl": measured["kl"]["mean"],
        "kl_stderr": measured["kl"]["stderr"],
        "perplexity_original": measured["perplexity"]["reference"],
        "perplexity": measured["perplexity"]["model"],
        "versions": versions(),
        "cores": os.cpu_count(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--eval-data", required=True)
    parser.add_argument("--scheme", default="int3-g64")
    parser.add_argument("--memory")
    parser.add_argument("--kept", type=Path, help="Where work and results stay.")
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent / "results" / "planned.json")
    given = parser.parse_args()
    options = ["--scheme", given.scheme, "--effort", "quick", "--calibration", given.calibration, "--eval-data", given.eval_data]
    limited = ["--memory", given.memory] if given.memory else []
    for model in given.models:
        key = {"model": model.name, "scheme": given.scheme, "effort": "quick", "options": limited}
        with tempfile.TemporaryDirectory(prefix="planned-") as scratch:
            kept = (given.kept or Path(scratch)) / f"{model.name}-{given.scheme}"
            kept.mkdir(parents=True, exist_ok=True)
            row = row_of(model, options + limited, kept)
        if row is None:
            continue
        keep_row(given.output, "planned", key, row)


if __name__ == "__main__":
    main()
