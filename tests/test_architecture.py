"""A module imports only from lower ranks: the one-way flow of docs/conventions.md, checked on the syntax tree."""

import ast
import importlib
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "src" / "roundel"
RANKS = [
    ("errors", 0),
    ("settings", 0),
    ("allocator", 0),
    ("processes", 1),
    ("linalg", 1),
    ("kernels", 2),
    ("types", 2),
    ("demo", 2),
    ("grids", 3),
    ("rotation", 3),
    ("store", 3),
    ("progress", 3),
    ("sweeps", 4),
    ("calibration", 4),
    ("formats", 4),
    ("models", 5),
    ("curvature", 5),
    ("rounding", 5),
    ("engines", 5),
    ("evaluate", 6),
    ("integration", 6),
    ("recipes", 6),
    ("registration", 7),
    ("artifacts", 7),
    ("tuning", 8),
    ("given", 8),
    ("stages", 9),
    ("commands", 10),
    ("__main__", 12),
    ("__init__", 12),
]
STAGES = [
    ("__init__", 0),
    ("notes", 0),
    ("passes", 0),
    ("linears", 0),
    ("drafts", 1),
    ("inputs", 1),
    ("judge", 1),
    ("ends", 2),
    ("readers", 1),
    ("opening", 1),
    ("text", 2),
    ("sequences", 3),
    ("space", 3),
    ("curvature", 3),
    ("collecting", 4),
    ("rounding", 4),
    ("tuning", 5),
    ("writing", 6),
    ("size", 7),
    ("evaluation", 7),
    ("timing", 8),
    ("plan", 9),
    ("report", 8),
    ("finish", 9),
    ("quantize", 10),
    ("refine", 10),
    ("tune", 10),
    ("export", 10),
]
"""In `stages`: a stage imports none that follows it."""
LONGEST = 500
"""Lines of a file; a longer one says in its docstring's first lines why."""


def rank(module: str) -> int:
    top = module.split(".")[1] if "." in module else "__init__"
    return dict(RANKS)[top]


def stage(module: str) -> int:
    return dict(STAGES)[(*module.split("."), "__init__")[2]]


def imports(path: Path) -> set[str]:
    """Modules of Roundel that a file imports; `from package import name` where that is a module, too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names} if is_package(node.module) else set[str]()
            modules = {name for name in inner if is_module(name)}
            found |= modules or {node.module}
    return {name for name in found if name.split(".")[0] == "roundel"}


def is_package(module: str) -> bool:
    return ROOT.parent.joinpath(*module.split(".")).is_dir()


def is_module(module: str) -> bool:
    return ROOT.parent.joinpath(*module.split(".")).with_suffix(".py").exists() or is_package(module)


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_only_from_lower_ranks(path: Path) -> None:
    own = ".".join(("roundel", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
    package = own.split(".")[:2]
    for name in imports(path):
        inside = name.split(".")[:2] == package and own != "roundel"
        assert inside or rank(name) < rank(own), f"{own} imports {name}"


@pytest.mark.parametrize("path", sorted((ROOT / "stages").rglob("*.py")), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_a_stage_imports_only_from_earlier_ones(path: Path) -> None:
    own = ".".join(("roundel", *path.relative_to(ROOT).with_suffix("").parts))
    for name in imports(path):
        if name.startswith("roundel.stages."):
            inside = name.split(".")[:3] == own.split(".")[:3]
            assert inside or stage(name) < stage(own), f"{own} imports {name}"


def test_every_module_has_a_rank() -> None:
    for folder, ranks in ((ROOT, RANKS), (ROOT / "stages", STAGES)):
        tops = {p.relative_to(folder).parts[0].removesuffix(".py") for p in folder.rglob("*.py")}
        assert tops == {name for name, _ in ranks}


def test_no_file_is_long() -> None:
    lengths = {p.relative_to(ROOT).as_posix(): len(p.read_text(encoding="utf-8").splitlines()) for p in ROOT.rglob("*.py")}
    assert {name for name, length in lengths.items() if length > LONGEST} <= set()


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
