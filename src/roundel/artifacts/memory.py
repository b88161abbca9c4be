"""How much memory a job may use: `--memory 8G`, by default most of what is free."""

from __future__ import annotations

import re
from pathlib import Path

from roundel import processes
from roundel.errors import SchemeError

__all__ = ["memory_budget", "stays_on_disk"]

SHARE = 0.7
"""Of what is free."""

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def memory_budget(given: str | int | None) -> int:
    """Bytes that each process may use; of what is free each that shares this machine has its part.

    Raises:
        SchemeError: it is no size.
    """
    if given is None:
        return int(SHARE * _available()) // processes.on_this_machine()
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", str(given).strip(), re.IGNORECASE)
    if found is None or float(found[1]) <= 0:
        raise SchemeError(f"memory {given!r}: expected a size such as 8G or 500M")
    return int(float(found[1]) * UNITS[found[2].upper()])


def stays_on_disk(weights: int, budget: int) -> bool:
    """Whether a model of so many bytes is loaded one decoder layer after the other."""
    return weights > budget // 2


def _available() -> int:
    """Free memory of the machine, or of the control group if that has less."""
    found = 4 << 30
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            found = int(line.split()[1]) << 10
    for limit, used in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        values = [next(iter(_lines(Path("/sys/fs/cgroup") / name)), "max") for name in (limit, used)]
        if all(value.isdecimal() for value in values):
            found = min(found, max(0, int(values[0]) - int(values[1])))
    return found


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
