"""What a command takes, for benchmarks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from roundel.store import write_json


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def keep_row(path: Path, kind: str, key: Mapping[str, Any], row: Mapping[str, Any]) -> None:
    """Puts a row into a file of such, in the place of the one that has the same key."""
    rows = read_json(path)["rows"] if path.is_file() else []
    others = [each for each in rows if any(each[name] != value for name, value in key.items())]
    write_json(path, {"kind": kind, "rows": [*others, {**key, **row}]})


def run(line: Sequence[str]) -> dict[str, float]:
    """Wall and CPU seconds and the largest resident set of one command; its failure ends ours."""
    began = time.monotonic()
    process = subprocess.Popen(line)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if status:
        sys.exit(f"{' '.join(line)}: exit {process.returncode}")
    return {"seconds": time.monotonic() - began, "cpu_seconds": used.ru_utime + used.ru_stime, "peak_mib": used.ru_maxrss / 1024}
