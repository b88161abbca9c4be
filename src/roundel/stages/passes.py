"""Passes of as many sequences as memory holds: a stage that runs out of it is entered again with half as many.

A batch size never changes a result (`sweeps.safe_batch_size`), and a stage that is entered again finds what it has finished in the job's
directory, so all that is lost is a group of layers under way.

Not done: steps of tuning, whose sums are those of their parts; jobs of several processes, where others would wait for the one that starts
again. Those end with one error, and `--work` goes on.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from roundel import processes
from roundel.errors import MemoryLimitError, is_out_of_memory

__all__ = ["as_many_as_fit"]

T = TypeVar("T")


def as_many_as_fit(
    stage: Callable[[int], T],
    size: int,
    *,
    safe: Callable[[int], int],
    warn: Callable[[str], object],
    again: Callable[[], bool] = lambda: True,
) -> tuple[T, int]:
    """What a stage gives with passes of `size` sequences or, where memory ends, of fewer; and how many those were.

    Args:
        stage: Given the number, which must not change what it returns.
        size: To begin with.
        safe: The largest number up to another that changes no bit.
        warn: Told of each halving.
        again: Whether the stage can be entered a second time.

    Raises:
        MemoryLimitError: one sequence is too much, the stage cannot be entered again, or the job has several processes.
    """
    while True:
        try:
            return stage(size), size
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if size == 1 or processes.world() > 1 or not again():
                raise MemoryLimitError(error) from error
        gc.collect()  # the frames that the error came through, and what they held
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        fewer = safe(size // 2)
        warn(f"out of memory with {size} sequences in a pass: the stage goes on with {fewer}")
        size = fewer
