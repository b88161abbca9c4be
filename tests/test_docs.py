"""The pages say what is: links lead somewhere, `roundel` command lines name commands and options that exist, examples run.

The site itself is built by `make docs`, which needs tools that the tests do not; what it would refuse is checked here as well.
"""

import ast
import importlib
import importlib.util
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer.main
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer

import roundel
from e2e import tiny
from laws import test_grids, test_sketches
from roundel import grids
from roundel.commands.app import app
from roundel.curvature import sketches

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub and MkDocs both make them."""
    prose = re.sub(r"^```.*?^```", "", text_of(page), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text_of(page), re.DOTALL | re.MULTILINE)


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


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_anchors_are_headings(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)\s.]+)\)", text_of(page)):
        if "://" not in target:
            assert anchor in anchors(page.parent / target if target else page), f"{page.name} links to {target}#{anchor}"


def leaves(entries: list[Any]) -> list[str]:
    """The pages of a navigation."""
    values = [next(iter(entry.values())) for entry in entries]
    return [page for value in values for page in (leaves(value) if isinstance(value, list) else [value])]


def test_the_navigation_has_every_page_once() -> None:
    docs = ROOT / "docs"
    assert sorted(leaves(SITE["nav"])) == sorted(page.relative_to(docs).as_posix() for page in docs.rglob("*.md"))


def test_the_site_links_to_nothing_outside_of_it() -> None:
    """Links from one page to another stay within `docs/`, or the site would not have what they lead to."""
    docs = (ROOT / "docs").resolve()
    for page in docs.rglob("*.md"):
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text_of(page)):
            assert "://" in target or (page.parent / target).resolve().is_relative_to(docs), f"{page.name} links to {target}"


def test_the_site_needs_no_network() -> None:
    assert SITE["theme"]["font"] is False
    assert not {"extra_javascript", "repo_url"} & set(SITE)
    assert "offline" in [name if isinstance(name, str) else next(iter(name)) for name in SITE["plugins"]]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_tables_stand_by_themselves(page: Path) -> None:
    """Without an empty line MkDocs takes what follows a table for its next row, where GitHub does not."""
    prose = re.sub(r"^```.*?^```", "", text_of(page), flags=re.DOTALL | re.MULTILINE)
    assert re.findall(r"^\|.*\n(?!\||\n|\Z).*", prose, re.MULTILINE) == []


def test_the_table_for_choosing_is_that_of_the_results() -> None:
    choosing, results = (text_of(ROOT / "docs" / name) for name in ("choosing.md", "results.md"))
    rows = re.findall(r"^\| \w\S* \| [0-9.]+ \| [^|]+ ± [^|]+ \| [0-9.]+ % \|", choosing, re.MULTILINE)
    assert len(rows) == 20
    for row in rows:
        assert row in results


def test_the_reference_names_what_exists() -> None:
    found = re.findall(r"^::: (\S+)$", text_of(ROOT / "docs" / "api.md"), re.MULTILINE)
    for path in found:
        module, _, name = path.rpartition(".")
        assert hasattr(importlib.import_module(module), name) or importlib.util.find_spec(path)
    assert {f"roundel.{name}" for name in roundel.__all__ if not name.startswith("__")} <= {
        path if path.count(".") == 1 else f"roundel.{path.rpartition('.')[2]}" for path in found
    }


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """One of scripts/."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module(name)


def test_the_command_line_is_that_of_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    writer = script("write_command_line", monkeypatch)
    assert text_of(writer.PAGE) == writer.page(), "run python scripts/write_command_line.py"


def test_the_tutorial_runs_as_printed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All its lines, in order, files before what reads them; the model under the id that the page names."""
    runner = script("run_tutorial", monkeypatch)
    page = text_of(runner.PAGE)
    lines = runner.script(page).splitlines()
    printed = [line for block in re.findall(r"^```sh\n(.*?)^```", page, re.DOTALL | re.MULTILINE) for line in block.splitlines()]
    assert [line for line in lines if line in printed] == printed
    assert lines.index("cat > ask.py <<'END_OF_FILE'") < lines.index("python ask.py")
    assert f"roundel quantize {runner.MODEL} " in page
    runner.link_model(tiny.save_model(tmp_path / "model", "llama"), tmp_path / runner.MODEL)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / runner.MODEL)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Alo?"}], tokenize=False).strip() == "Alo?"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_examples_parse(page: Path) -> None:
    for block in python_blocks(page):
        ast.parse(block)


# --- the examples of docs/extending.md

EXTENDING = ROOT / "docs" / "extending.md"


def example_module(name: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The file `name` of the page, imported as the module that it would be."""
    (source,) = re.findall(rf"The file, `src/{re.escape(name)}`:\n\n```python\n(.*?)^```", text_of(EXTENDING), re.DOTALL | re.MULTILINE)
    path = directory / Path(name).name
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name.removesuffix(".py").replace("/", "."), path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def entry(name: str) -> str:
    """What the page tells to write into the file `name`."""
    (line,) = re.findall(rf"The entry, in `src/{re.escape(name)}`:\n\n```python\n(.*?)\n```", text_of(EXTENDING), re.DOTALL)
    return line


@pytest.fixture
def extended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Roundel with the page's grid and estimator."""
    ternary = example_module("roundel/grids/ternary.py", tmp_path, monkeypatch)
    shrunk = example_module("roundel/curvature/sketches/shrunk.py", tmp_path, monkeypatch)
    families: dict[str, Any] = {**vars(grids), "ternary": ternary}
    exec(entry("roundel/grids/__init__.py"), families)
    assert families["_FAMILIES"] == (*grids._FAMILIES, ternary.parse)  # the line is that of the source, and one more
    monkeypatch.setattr(grids, "_FAMILIES", families["_FAMILIES"])
    table = dict(sketches.ESTIMATORS)
    exec(entry("roundel/curvature/sketches/__init__.py"), {"ESTIMATORS": table, "Shrunk": shrunk.Shrunk})
    monkeypatch.setitem(sketches.ESTIMATORS, "shrunk", table["shrunk"])
    yield
    grids.parse_scheme.cache_clear()


def test_the_examples_quantize_a_model(extended: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(tiny.make_text(5000), encoding="utf-8")
    names = {"MODEL": tiny.save_model(tmp_path / "model", "llama"), "TEXT": "text.txt"}
    (example,) = [block for block in python_blocks(EXTENDING) if "roundel.quantize" in block]
    exec(example, names)
    report = names["result"].details
    assert report["bits_per_weight"]["quantized"] == pytest.approx(1.6 + 16 / 32, rel=0.05)
    assert {row["scheme"] for row in report["layers"].values()} == {"ternary-g32"}
    assert report["curvature"] == "shrunk:keep=0.7"
    assert 0 < report["evaluation"]["kl"]["mean"] < 10
    assert not report["skipped"]
    weight = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    for group in weight.unflatten(1, (-1, 32)).flatten(0, 1):
        assert len(group.abs().unique()) <= 2


def test_the_example_grid_conforms(extended: None) -> None:
    name = "ternary-g32"
    test_grids.test_the_name_is_read_back(name)
    test_grids.test_encode_finds_the_nearest_of_all_codes(name=name)
    test_grids.test_rounding_twice_is_rounding_once(name=name)
    test_grids.test_dequantize_is_decode_of_steps_and_offsets(name)
    test_grids.test_the_weight_is_linear_in_the_scales_of_its_parts(name)
    test_grids.test_any_wanted_scale_has_a_stored_form(name, test_grids.torch.float16)
    test_grids.test_scales_are_always_usable(name, test_grids.torch.float16)
    test_grids.test_the_search_is_about_as_good_as_brute_force(name, 1.0)


def test_the_example_estimator_conforms(extended: None) -> None:
    for name in ("shrunk", "shrunk:keep=0", "shrunk:keep=1"):
        test_sketches.test_factors_are_positive_with_mean_diagonal_one(name=name)
        test_sketches.test_merging_equals_one_pass(name, 2)
    x, g = test_sketches.stream(4, 10)
    for name, same in (("shrunk:keep=0", "activation"), ("shrunk:keep=1", "kfac")):
        ours, theirs = (test_sketches.filled(sketches.parse_curvature(each), x, g, batch=2).factors() for each in (name, same))
        test_sketches.assert_same(ours, theirs)
