"""The program `roundel`. Results go to standard output, progress and errors to standard error.

Exit codes: 0 done; 2 something given cannot work; 3 numbers beyond repair; 4 the disk refused; 5 another process of the job has ended;
6 not enough memory; 130 interrupted; 143 terminated; 1 anything unforeseen.
"""

from __future__ import annotations

import importlib.metadata
import os
import signal
import sys
import traceback
import warnings
from typing import Annotated, Any, TextIO

import typer

from roundel.allocator import keep_freed_memory
from roundel.commands.line.demo import demo
from roundel.commands.line.factors import collect, imatrix, inspect, merge
from roundel.commands.line.measure import bench, compare, evaluate, serve_check
from roundel.commands.line.plan import plan
from roundel.commands.line.quantize import export, quantize, tune
from roundel.commands.line.refine import refine
from roundel.commands.line.upload import upload
from roundel.errors import MemoryLimitError, RoundelError, SchemeError, is_out_of_memory

__all__ = ["app", "main"]

app = typer.Typer(
    help="Shrink a language model to 2-8 bits per weight and keep its output distribution.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

for command in (
    quantize,
    refine,
    plan,
    tune,
    export,
    collect,
    merge,
    imatrix,
    inspect,
    evaluate,
    compare,
    bench,
    serve_check,
    upload,
    demo,
):
    app.command()(command)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if version:
        print(f"roundel {importlib.metadata.version('roundel')}")
        raise typer.Exit


SEVERAL = ("quantize", "collect", "evaluate", "tune")
"""Commands that several processes can share."""


def main() -> None:
    """The console script: one clear line for each foreseen error, and an exit code for it; of several processes the first that stops."""

    def terminated(_signal: int, _frame: Any) -> None:
        raise SystemExit(143)  # unwinds, so that half-written output is removed

    signal.signal(signal.SIGTERM, terminated)
    keep_freed_memory()
    # torch 2.11 on a GPU, in the thread of a backward pass; it then does what it should
    warnings.filterwarnings("ignore", "Attempting to run cuBLAS", UserWarning)
    several, errors = int(os.environ.get("WORLD_SIZE", "1")) > 1, sys.stderr
    if several and os.environ.get("RANK") != "0":
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (as long as the process lives)
    try:
        if several and sys.argv[1:2] and not sys.argv[1].startswith("-") and sys.argv[1] not in SEVERAL:
            raise SchemeError(f"{sys.argv[1]} runs in one process; torchrun is for {', '.join(SEVERAL)}")
        app()  # ends in SystemExit: 0, 2 for wrong usage, 130 for Ctrl-C
    except RoundelError as error:
        _say(f"error: {error}", errors)
        sys.exit(error.exit_code)
    except SystemExit as ended:
        if ended.code == 130:
            _say("interrupted; nothing was left behind", errors)
        elif ended.code == 143 and several:
            _say("error: told to stop: another process of this job has ended, or the job was; --work goes on from what is finished", errors)
        raise
    except Exception as error:
        if is_out_of_memory(error):
            _say(f"error: {MemoryLimitError(error)}", errors)
            sys.exit(MemoryLimitError.exit_code)
        if not several:
            raise
        _say(traceback.format_exc(), errors)
        sys.exit(1)


def _say(message: str, stream: TextIO) -> None:
    """Tells why this process ends, which nothing interrupts from here on."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from roundel.processes import first_to_say

        if not first_to_say():
            return
    print(message, file=stream, flush=True)
