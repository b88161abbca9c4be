"""Processes of the command, one or several of one job without torchrun's own start: forked from a server that has imported everything."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import shutil
import socket
import sys
import tempfile
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


class Job:
    """`roundel ARGUMENTS` in so many processes, under way.

    `exact`: without products in bfloat16; `step_tokens`: of a natural-gradient step.
    """

    def __init__(self, count: int, *arguments: object, exact: bool = False, step_tokens: int | None = None) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._scratch = tempfile.mkdtemp()
        for rank, kind in itertools.product(range(count), ("out", "err")):
            Path(self._scratch, f"{kind}-{rank}").touch()
        given = [str(part) for part in arguments]
        self.processes = [
            SERVER.Process(target=_one, args=(rank, count, port, given, self._scratch, exact, step_tokens)) for rank in range(count)
        ]
        for process in self.processes:
            process.start()

    def wait(self) -> list[Rank]:
        """For all of them."""
        for process in self.processes:
            process.join(LONGEST)
            if process.is_alive():
                process.kill()
                process.join()
        found = []
        for rank, process in enumerate(self.processes):
            out, err = (Path(self._scratch, f"{kind}-{rank}").read_text(encoding="utf-8") for kind in ("out", "err"))
            found.append(Rank(process.exitcode or 0, out, err))
        shutil.rmtree(self._scratch)
        return found


def run(count: int, *arguments: object, exact: bool = False, step_tokens: int | None = None) -> list[Rank]:
    """A job from its beginning to its end."""
    return Job(count, *arguments, exact=exact, step_tokens=step_tokens).wait()


def _one(rank: int, count: int, port: int, arguments: list[str], scratch: str, exact: bool, step_tokens: int | None) -> None:
    for place, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(os.path.join(scratch, f"{kind}-{rank}"), os.O_WRONLY), place)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    import torch

    from roundel.commands.app import main
    from roundel.linalg import fast

    torch.set_num_threads(1)
    if step_tokens is not None:
        from roundel.stages.rounding import natural

        natural.STEP_TOKENS = step_tokens
    if exact:
        fast._has_units = lambda: False  # type: ignore[assignment]
    sys.argv = ["roundel", *arguments]
    main()
