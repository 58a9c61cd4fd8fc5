"""Freed memory is used again instead of being asked for anew."""

import subprocess
import sys

import pytest

_COUNT_PAGE_FAULTS = """
import resource, sys, torch
from toolchain.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def touch():
    layer = [torch.empty(9_000_000).fill_(1.0) for _ in range(4)]  # activations of 36 MB
for _ in range(10):
    touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's settings")
def test_freed_memory_is_kept():
    def page_faults(how: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", _COUNT_PAGE_FAULTS, how], capture_output=True, text=True, check=True
        )
        return int(done.stdout)

    assert page_faults("keep") < page_faults("give back") / 10
