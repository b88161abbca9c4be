"""What several commands write to standard output or to a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["emit", "print_rows"]


def emit(details: dict[str, Any], json_file: Path | None) -> None:
    """Writes the report where `--json` says.

    Raises:
        StorageError: it cannot be written.
    """
    if json_file is None:
        return
    if str(json_file) == "-":
        text = json.dumps(details, indent=2, ensure_ascii=False, allow_nan=False)
        print(text.encode(errors="backslashreplace").decode())  # as `roundel.store.write_text`
    else:
        from roundel.store import write_json

        write_json(json_file, details)


def print_rows(title: str, rows: list[list[str]]) -> None:
    """A table without a header."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, show_header=False)
    for cells in rows:
        table.add_row(*cells)
    Console().print(table)
