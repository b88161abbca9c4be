"""What several commands write to standard output or to a file."""

from __future__ import annotations

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
    from roundel.store import json_text, write_json

    if str(json_file) == "-":
        print(json_text(details))
    else:
        write_json(json_file, details)


def print_rows(title: str, rows: list[list[str]]) -> None:
    """A table without a header."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, show_header=False)
    for cells in rows:
        table.add_row(*cells)
    Console().print(table)
