"""Freed memory is used again instead of being asked for anew, and what is free is known."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from toolchain import memory

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


def test_files_that_were_read_do_not_count_as_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    monkeypatch.setattr(memory, "_meminfo", lambda path, key: 10**12)
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    assert memory.available_bytes(torch.device("cpu")) == 100
    (tmp_path / "memory.stat").write_text("anon 300\nfile 600\ninactive_file 450\nactive_file 50\nslab 1\n")
    assert memory.available_bytes(torch.device("cpu")) == 600
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_bytes(torch.device("cpu")) == 10**12
