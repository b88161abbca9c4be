"""What the engines' tests have in common: written directories, served and compared, a row of benchmarks/results/engines-NAME.json for each.

`docs/engines/index.md` has these rows as a table; `python studies/tables.py` makes it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import roundel
from roundel.commands.serve_check import require, serve_check
from roundel.errors import ModelError
from roundel.store import write_json

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"

SETTINGS: dict[str, Any] = {
    "curvature": "identity",
    "sweeps": 0,
    "prefix_aware": False,
    "calibration": "stdlib",
    "sequences": 16,
    "seq_len": 128,
    "eval_data": "stdlib-heldout",
    "eval_sequences": 32,
}
"""Rounded to the nearest: what is looked at is how it is read. The text is that of serve-check."""


def written(source: str | Path, output: Path, **options: Any) -> Path:
    """A directory as users make it."""
    return roundel.quantize(source, output=output, **{**SETTINGS, **options}).path


def served(path: Path, kind: str, *, engine: str, refused: str | None = None, **options: Any) -> dict[str, Any] | None:
    """Serves it and checks; writes the row. None where the engine refuses it, with a line that has `refused` in it.

    Raises:
        RoundelError: it is refused without being expected to, or computes something else.
    """
    report = json.loads((path / "roundel.json").read_text(encoding="utf-8"))
    row: dict[str, Any] = {
        "model": kind,
        "scheme": " ".join(filter(None, [_schemes(report), "part" if report["skipped"] else ""])),
        "format": report["format"],
        "report_kl": report["evaluation"]["kl"]["mean"],
        "error": None,
    }
    try:
        found = serve_check(path, engine=engine, **options)
    except ModelError as error:
        row["error"] = str(error).partition(f"{path}: ")[2] or str(error)
        _write(engine, row)
        if refused is None or refused not in row["error"]:
            raise
        return None
    row |= {key: found[key] for key in ("versions", "kernels", "dtype", "windows", "difference", "noise", "kl", "greedy", "passed")}
    _write(engine, row)
    require(found)
    return found


def _schemes(report: dict[str, Any]) -> str:
    return ", ".join(sorted({layer["scheme"] for layer in report["layers"].values()}))


def _write(engine: str, row: dict[str, Any]) -> None:
    """In place of the row of the same model, scheme and format."""
    file = RESULTS / f"engines-{engine}.json"
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []

    def key(of: dict[str, Any]) -> tuple[str, str, str]:
        return of["model"], of["scheme"], of["format"]

    write_json(file, {"engine": engine, "rows": sorted([*(old for old in rows if key(old) != key(row)), row], key=key)})
