"""Processes of the command, one or several of one job without torchrun's own start: forked from a server that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import tempfile
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch", "transformers", "roundel.commands.app", "roundel.stages.quantize", "roundel.tuning"])
LONGEST = 300.0


class Rank(NamedTuple):
    """What one process did."""

    code: int
    out: str
    err: str


def start(*arguments: object) -> BaseProcess:
    """`roundel ARGUMENTS` in a process of its own, to be waited for or killed."""
    process = SERVER.Process(target=_command, args=([str(part) for part in arguments],))
    process.start()
    return process


def run(count: int, *arguments: object, exact: bool = False, step_tokens: int | None = None) -> list[Rank]:
    """`roundel ARGUMENTS` in so many processes.

    `exact`: without products in bfloat16; `step_tokens`: of a natural-gradient step.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as scratch:
        processes = [
            SERVER.Process(target=_one, args=(rank, count, port, [str(part) for part in arguments], scratch, exact, step_tokens))
            for rank in range(count)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(LONGEST)
            if process.is_alive():
                process.kill()
                process.join()
        found = []
        for rank, process in enumerate(processes):
            out, err = (Path(scratch, f"{kind}-{rank}").read_text(encoding="utf-8") for kind in ("out", "err"))
            found.append(Rank(process.exitcode or 0, out, err))
        return found


def _one(rank: int, count: int, port: int, arguments: list[str], scratch: str, exact: bool, step_tokens: int | None) -> None:
    for place, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(os.path.join(scratch, f"{kind}-{rank}"), os.O_WRONLY | os.O_CREAT), place)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    from roundel.linalg import fast

    if step_tokens is not None:
        from roundel.stages.rounding import natural

        natural.STEP_TOKENS = step_tokens
    if exact:
        fast._has_units = lambda: False  # type: ignore[assignment]
    _command(arguments)


def _command(arguments: list[str]) -> None:
    import torch

    from roundel.commands.app import main

    torch.set_num_threads(1)
    sys.argv = ["roundel", *arguments]
    main()
