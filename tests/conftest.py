"""Shapes stated in annotations are checked while the tests run; nothing is downloaded."""

import os
import pkgutil
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import pytest

for _pool in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_pool] = "1"  # the tests' models are tiny: threads would only wait for each other
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import jaxtyping  # noqa: E402
from hypothesis import settings  # noqa: E402 (after the environment is set)
from jaxtyping import install_import_hook  # noqa: E402

settings.register_profile("repeatable", derandomize=True)  # a commit passes or fails; new examples are for the developers
if os.environ.get("CI"):
    settings.load_profile("repeatable")

CHECKED = (
    "types",
    "linalg",
    "grids",
    "rotation",
    "rounding",
    "formats.bits",
    "formats.native",
    "models.fuse",
    "models.structure",
    "integration.linear",
)

LONG = ("test_triton.py", "test_work.py", "test_processes.py", "test_prefix_aware.py", "test_auto.py", "test_architectures.py")

_BEGAN = time.monotonic()
F = TypeVar("F", bound=Callable[..., object])
_checked = jaxtyping.jaxtyped


def _unchecked(**_given: object) -> Callable[[F], F]:
    return lambda function: function


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--results FILE`."""
    parser.addoption("--results", help="Where to write how many tests passed, failed and were skipped, as JSON.")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """What `--results` asks for."""
    if file := config.getoption("results"):
        counts = {kind: len(terminalreporter.stats.get(kind, [])) for kind in ("passed", "failed", "error", "skipped")}
        from roundel.stages.report import versions
        from roundel.store import write_json

        seconds = round(time.monotonic() - _BEGAN, 1)
        write_json(Path(file), {"kind": "tests", **counts, "seconds": seconds, "cores": os.cpu_count(), "versions": versions()})


def pytest_configure(config: pytest.Config) -> None:
    """Imports what is checked, whichever tests come first; not in the process of xdist that runs no test."""
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        return
    install_import_hook([f"roundel.{module}" for module in CHECKED], "beartype.beartype")
    for module in CHECKED:
        imported = import_module(f"roundel.{module}")
        for inner in pkgutil.iter_modules(getattr(imported, "__path__", [])):
            import_module(f"roundel.{module}.{inner.name}")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Whole runs and oracles go without: they would take twice as long, and what they call is checked by the tests of its own."""
    whole = not {"e2e", "oracles"}.isdisjoint(item.path.parts)
    jaxtyping.config.update("jaxtyping_disable", whole)
    jaxtyping.jaxtyped = _unchecked if whole else _checked  # what inner functions are decorated with each time they are made


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long and are one unit for xdist come first, so that no process waits for another at the end."""
    items.sort(key=lambda item: item.path.name not in LONG)
