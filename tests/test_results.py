"""The pages with results say what was measured: tables are those of the JSON, commands those that `make studies` runs."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def _studies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "studies"))
    for name in ("tables", "run_all"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_tables_are_those_of_the_json() -> None:
    import tables

    pages = [page.read_text(encoding="utf-8") for page in tables.PAGES]
    for page in pages:
        assert tables.rendered(page) == page
    assert set(re.findall(r"<!-- ([\w-]+) -->", "".join(pages))) == {*tables.TABLES, "end"}


def test_every_command_is_one_of_the_studies() -> None:
    """The page leaves out --resume and where results go."""
    import run_all

    def words(command: str) -> set[str]:
        return set(re.sub(r" (-o \S+|--resume|--figure \S+)", "", command).split())

    known = [words(study.command) for study in run_all.STUDIES.values()]
    quoted = re.findall(r"^(?:roundel compare|python studies/|python benchmarks/peers/).*$", PAGE, re.MULTILINE)
    assert len(quoted) >= 10
    for line in quoted:
        assert words(line) in known, line


def test_studies_write_what_tables_read() -> None:
    import run_all
    import tables

    written = {Path(target).stem for study in run_all.STUDIES.values() for target in study.files.values() if target.endswith(".json")}
    read = set(re.findall(r"(?:load|estimators|sequences|schemes)\(\"([\w-]+)\"", Path(tables.__file__).read_text(encoding="utf-8")))
    assert read - written == {"chaos", "fuzz"}  # of make chaos, make fuzz
