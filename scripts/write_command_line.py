"""docs/command-line.md from the program itself: every command, argument and option, with its help and default.

    python scripts/write_command_line.py

A test compares the page with what this would write.
"""

from pathlib import Path
from typing import Any, get_type_hints

import typer.main

from roundel.commands.app import app

PAGE = Path(__file__).resolve().parent.parent / "docs" / "command-line.md"
KINDS = {"N": "int", "X": "float", "PATH": "Path", "TEXT": "str", "": ""}
"""What stands for a value, by a word in the type of its parameter."""

HEAD = """# Command line

Every command and option as `roundel COMMAND --help` says it; `python scripts/write_command_line.py` writes this page. Which of them matter:
[everyday tasks](getting-started.md#options-of-quantize).
"""


def cell(text: str) -> str:
    """Of a table: bars end it, brackets would be links."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("[", "\\[")


def default(parameter: Any) -> str:
    """What is taken where nothing is said; empty for what is left out or off then."""
    value = parameter.default
    if parameter.required:
        return "required"
    if value is None or value is False or callable(value):
        return ""
    return "on" if value is True else f"`{cell(str(value))}`"


def named(parameter: Any, hint: str) -> str:
    if parameter.param_type_name == "argument":
        return f"`{parameter.metavar or parameter.name.upper()}`"
    kind = next(name for name, kind in KINDS.items() if kind in hint)
    names = ", ".join([*parameter.opts, *parameter.secondary_opts])
    value = (parameter.metavar or kind).replace("|", " or ")  # a bar ends a cell, in code as well
    return f"`{names if parameter.is_flag else f'{names} {value}'}`"


def section(name: str, command: Any) -> str:
    hints = {key: str(hint) for key, hint in get_type_hints(command.callback).items()}
    rows = [
        f"| {named(each, hints[each.name])} | {cell(each.help or '')} | {default(each)} |\n"
        for each in command.params
        if each.name in hints
    ]
    return f"\n## {name}\n\n{command.help.strip()}\n\n| | | default |\n|---|---|---|\n{''.join(rows)}"


def page() -> str:
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    return HEAD + "".join(section(name, command) for name, command in commands.items())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
