"""A module imports only from lower ranks: the one-way flow of docs/conventions.md, checked on the syntax tree."""

import ast
import importlib
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "src" / "roundel"
RANKS = [
    ("errors", 0),
    ("allocator", 0),
    ("linalg", 1),
    ("kernels", 2),
    ("types", 2),
    ("grids", 3),
    ("rotation", 3),
    ("demo", 2),
    ("models", 4),
    ("curvature", 4),
    ("rounding", 5),
    ("formats", 4),
    ("store", 4),
    ("calibration", 4),
    ("progress", 4),
    ("evaluate", 5),
    ("nn", 5),
    ("hf", 6),
    ("error_aware", 6),
    ("recipes", 6),
    ("factors", 7),
    ("source", 7),
    ("round_model", 8),
    ("checkpoints", 8),
    ("tuning", 8),
    ("pipeline", 9),
    ("measure", 10),
    ("bench", 10),
    ("compare", 10),
    ("inspect", 10),
    ("cli", 11),
    ("__main__", 12),
    ("__init__", 12),
]


def rank(module: str) -> int:
    top = module.split(".")[1] if "." in module else "__init__"
    return dict(RANKS)[top]


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return {name for name in found if name.split(".")[0] == "roundel"}


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_only_from_lower_ranks(path: Path) -> None:
    own = ".".join(("roundel", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
    package = own.split(".")[:2]
    for name in imports(path):
        inside = name.split(".")[:2] == package and own != "roundel"
        assert inside or rank(name) < rank(own), f"{own} imports {name}"


def test_every_module_has_a_rank() -> None:
    tops = {p.relative_to(ROOT).parts[0].removesuffix(".py") for p in ROOT.rglob("*.py")}
    assert tops == {name for name, _ in RANKS}


@pytest.mark.parametrize(
    "path",
    sorted(path for folder in ("studies", "benchmarks", "scripts") for path in (ROOT.parent.parent / folder).rglob("*.py")),
    ids=lambda p: p.name,
)
def test_scripts_import_what_exists(path: Path) -> None:
    """Scripts are run by hand, and rarely."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "roundel":
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name) or importlib.util.find_spec(f"{node.module}.{alias.name}"), (path.name, alias.name)
