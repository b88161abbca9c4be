"""How the C library keeps memory that has been freed.

Activations and gradients of one pass have the sizes of those of the last one. glibc gives tens of MiB back to the kernel as soon as they
are free, and gets them anew, page by page and cleared, in the next pass: a seventh of the CPU time of tuning (`docs/log.md`, 17). Other C
libraries and systems are left as they are.
"""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress

__all__ = ["give_back_freed_memory", "keep_freed_memory"]

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
"""Numbers of glibc's parameters (malloc.h)."""


def keep_freed_memory() -> bool:
    """For the whole process, from now on; freed memory is used again, but hardly given back before its end. Whether it could be set."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    # 32 MiB is the most that glibc takes from the heap instead of the kernel; the heap grows by 64 MiB and shrinks at 2 GiB
    return all(mallopt(name, value) == 1 for name, value in ((_MMAP_THRESHOLD, 1 << 25), (_TOP_PAD, 1 << 26), (_TRIM_THRESHOLD, 2**31 - 1)))


def give_back_freed_memory() -> None:
    """What is free now: between stages, whose memory has other sizes."""
    if sys.platform.startswith("linux"):
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
