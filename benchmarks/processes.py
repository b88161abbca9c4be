"""What several processes make of a job's time: `roundel quantize` in one process and in several, of one thread each, in turn in one run.

    python benchmarks/processes.py MODEL --calibration TEXT [--counts 1,2] [--rounds 1] [-o FILE.json] [options of quantize]

Time is the wall clock of the stages, from the report, and of the whole command with its imports. The codes of all must be the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from roundel.stages.report import versions
from roundel.store import write_json


def run(count: int, model: str, options: list[str], scratch: Path) -> dict[str, Any]:
    target = scratch / f"out-{count}"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "-m", "roundel"]
    line = [sys.executable, *(launch if count > 1 else ["-m", "roundel"]), "quantize", model, "-o", str(target), "--quiet", *options]
    began = time.monotonic()
    subprocess.run(line, check=True, env={**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"})
    whole = time.monotonic() - began
    report = json.loads((target / "roundel.json").read_text(encoding="utf-8"))
    digest = hashlib.sha256()
    for path in sorted(target.glob("*.safetensors")):
        digest.update(path.read_bytes())
    subprocess.run(["rm", "-r", str(target)], check=True)
    return {"processes": count, "seconds": whole, "stages": report["seconds"], "sha256": digest.hexdigest()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--counts", default="1,2")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path)
    given, options = parser.parse_known_args()
    best: dict[int, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for _ in range(given.rounds):
            for count in map(int, given.counts.split(",")):
                row = run(count, given.model, options, Path(scratch))
                print(row, flush=True)
                if count not in best or row["seconds"] < best[count]["seconds"]:
                    best[count] = row
    rows = list(best.values())
    for row in rows:
        row["of_the_first"] = {
            "whole": row["seconds"] / rows[0]["seconds"],
            "stages": sum(row["stages"].values()) / sum(rows[0]["stages"].values()),
        }
        row["same_codes"] = row["sha256"] == rows[0]["sha256"]
    print(json.dumps(rows, indent=1))
    if given.output is not None:
        content = {"kind": "processes", "model": Path(given.model).name, "options": options, "cores": os.cpu_count()}
        write_json(given.output, {**content, "versions": versions(), "rows": rows})


if __name__ == "__main__":
    main()
