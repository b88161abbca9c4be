"""How the C library keeps memory that has been freed.

Activations and gradients of one pass have the sizes of those of the last one. glibc gives tens of MiB back to the kernel as soon as they
are free, and gets them anew, page by page and cleared, in the next pass: a seventh of the CPU time of tuning (`docs/log.md`, 17). Where
memory is tight it is the other way round. Other C libraries and systems are left as they are.
"""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress

__all__ = ["give_back_freed_memory", "keep_freed_memory", "keep_no_large_blocks"]

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
"""Numbers of glibc's parameters (malloc.h)."""


def keep_freed_memory() -> bool:
    """For the whole process, from now on; freed memory is used again, but hardly given back before its end. Whether it could be set."""
    # 32 MiB is the most that glibc takes from the heap instead of the kernel; the heap grows by 64 MiB and shrinks at 2 GiB
    return _set({_MMAP_THRESHOLD: 1 << 25, _TOP_PAD: 1 << 26, _TRIM_THRESHOLD: 2**31 - 1})


def keep_no_large_blocks() -> bool:
    """For the whole process, from now on; what is freed of blocks of a MiB or more is given back at once. Whether it could be set.

    Where memory is tight: weights that come and go, layer after layer, leave holes in the heap between what stays, up to 80 MiB for each
    layer of 13 million weights.
    """
    return _set({_MMAP_THRESHOLD: 1 << 20, _TOP_PAD: 1 << 17, _TRIM_THRESHOLD: 1 << 20})


def _set(values: dict[int, int]) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all(mallopt(name, value) == 1 for name, value in values.items())


def give_back_freed_memory() -> None:
    """What is free now: between stages, whose memory has other sizes."""
    if sys.platform.startswith("linux"):
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
