"""Freed memory is used again."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from roundel import allocator

MEASURED = """
import resource, runpy, sys
import numpy
if sys.argv[1] == "keep":
    assert runpy.run_path(sys.argv[2])["keep_freed_memory"]()
def fill():
    for array in [numpy.ones(2**22, dtype=numpy.int8) for _ in range(16)]:
        del array
for _ in range(5):
    fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    fill()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_memory_that_is_used_again_is_not_asked_for_again() -> None:
    faults = [
        int(subprocess.run([sys.executable, "-c", MEASURED, how, allocator.__file__], capture_output=True, text=True, check=True).stdout)
        for how in ("keep", "")
    ]
    assert faults[0] < 1000
    assert faults[1] > 20 * faults[0]


GIVEN_BACK = """
import runpy, sys
import numpy
own = runpy.run_path(sys.argv[1])
assert own[sys.argv[2]]()
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
arrays = [numpy.ones(2**22, dtype=numpy.int8) for _ in range(32)]
full = resident()
del arrays
freed = resident()
own["give_back_freed_memory"]()
print(full - freed, freed - resident())
"""


def given_back(setting: str) -> list[int]:
    """Bytes of 128 MiB in blocks of 4 that the system has again when they are freed, and when that is asked for."""
    line = [sys.executable, "-c", GIVEN_BACK, allocator.__file__, setting]
    return [int(found) for found in subprocess.run(line, capture_output=True, text=True, check=True).stdout.split()]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc")
def test_freed_memory_is_given_back_when_asked_for_or_at_once() -> None:
    at_once, asked = given_back("keep_freed_memory")
    assert at_once < 2**25 < 2**26 < asked
    at_once, _ = given_back("keep_no_large_blocks")
    assert at_once > 2**26
