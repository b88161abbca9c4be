"""The program `roundel`. Results go to standard output, progress and errors to standard error.

Exit codes: 0 done; 2 something given cannot work; 3 numbers beyond repair; 4 the disk refused; 130 interrupted; 143
terminated; 1 anything unforeseen.
"""

from __future__ import annotations

import importlib.metadata
import signal
import sys
import warnings
from typing import Annotated, Any

import typer

from roundel.allocator import keep_freed_memory
from roundel.commands.line.demo import demo
from roundel.commands.line.factors import collect, imatrix, inspect, merge
from roundel.commands.line.measure import bench, compare, evaluate
from roundel.commands.line.plan import plan
from roundel.commands.line.quantize import export, quantize, tune
from roundel.errors import RoundelError

__all__ = ["app", "main"]

app = typer.Typer(
    help="Shrink a language model to 2-8 bits per weight and keep its output distribution.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

for command in (quantize, plan, tune, export, collect, merge, imatrix, inspect, evaluate, compare, bench, demo):
    app.command()(command)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if version:
        print(f"roundel {importlib.metadata.version('roundel')}")
        raise typer.Exit


def main() -> None:
    """The console script: one clear line for each foreseen error, and an exit code for it."""

    def terminated(_signal: int, _frame: Any) -> None:
        raise SystemExit(143)  # unwinds, so that half-written output is removed

    signal.signal(signal.SIGTERM, terminated)
    keep_freed_memory()
    # torch 2.11 on a GPU, in the thread of a backward pass; it then does what it should
    warnings.filterwarnings("ignore", "Attempting to run cuBLAS", UserWarning)
    try:
        app()  # ends in SystemExit: 0, 2 for wrong usage, 130 for Ctrl-C
    except RoundelError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except SystemExit as ended:
        if ended.code == 130:
            print("interrupted; nothing was left behind", file=sys.stderr)
        raise
