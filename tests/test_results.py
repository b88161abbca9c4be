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
    for name in ("figures", "tables", "run_all"):
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


def test_figures_draw_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    import figures
    import tables

    drawn: list[dict[str, list[tuple[str, float, float, float]]]] = []
    monkeypatch.setattr(figures.plots, "rates", lambda families, **_: drawn.append(families))
    for make in figures.FIGURES.values():
        make()
    sizes, files, minutes = drawn
    assert all(size > 0 < kl for families in drawn for points in families.values() for _, size, kl, _ in points)
    assert {size for _, size, _, _ in sizes["AutoRound, 200 iterations"]} == {bits * figures.LINEARS / 8e6 for bits in (2.25, 3.25, 4.25)}
    for families, ours, table in (
        (sizes, "Roundel, integers, the default", "peers-demo"),
        (minutes, "Roundel, --effort", "methods-smollm2-135m"),
    ):
        for _, _, kl, _ in families[ours]:
            assert f"| {kl:.3f}" in tables.TABLES[table]()
    for _, size, _, _ in files["Roundel, --target-size"]:
        assert size * 1e6 in [row["bytes"] for row in tables.load("llama-cpp-equal-bytes-demo")["rows"]]
    for name in figures.FIGURES:
        assert (ROOT / "docs" / "figures" / f"{name}.png").is_file()
