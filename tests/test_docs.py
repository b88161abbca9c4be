"""The pages say what is: every relative link leads somewhere, every `roundel` command line names a command and options that exist."""

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from roundel.cli import app

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_relative_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_exist(page: Path) -> None:
    commands = typer.main.get_command(app).commands
    blocks = re.findall(r"```(?:bash|sh|console)?\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    joined = "\n".join(blocks).replace("\\\n", " ")
    for line in re.findall(r"^\s*(?:\$ )?roundel (.+)$", joined, re.MULTILINE):
        words = shlex.split(line, comments=True)
        if words[0].startswith("-"):
            continue
        assert words[0] in commands, f"{page.name}: roundel {words[0]}"
        known = {option for parameter in commands[words[0]].params for option in parameter.opts} | {"--help"}
        for word in words[1:]:
            if re.fullmatch(r"--?[a-z][a-z-]*", word):
                assert word in known, f"{page.name}: roundel {words[0]} {word}"


def test_commands_are_found_at_all() -> None:
    assert "roundel quantize" in (ROOT / "README.md").read_text(encoding="utf-8")
