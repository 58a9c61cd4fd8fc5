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


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The place of a hierarchy without limits, of which this process is the root, on a machine with a terabyte."""
    root, own = tmp_path / "cgroup", tmp_path / "own"
    root.mkdir()
    own.write_text("0::/\n")
    monkeypatch.setattr(memory, "_CGROUP", root)
    monkeypatch.setattr(memory, "_OWN_CGROUPS", own)
    monkeypatch.setattr(memory, "_meminfo", lambda path, key: 10**12)
    return root


def test_files_that_were_read_do_not_count_as_used(cgroups: Path):
    tmp_path = cgroups
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    assert memory.available_bytes(torch.device("cpu")) == 100
    (tmp_path / "memory.stat").write_text("anon 300\nfile 600\ninactive_file 450\nactive_file 50\nslab 1\n")
    assert memory.available_bytes(torch.device("cpu")) == 600
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_bytes(torch.device("cpu")) == 10**12


@pytest.mark.parametrize(
    ("own", "where", "files"),
    [
        ("0::/job/step", "job/step", ("memory.max", "memory.current")),
        ("0::/job/step", "job", ("memory.max", "memory.current")),
        ("12:cpu:/x\n5:memory:/slurm/job", "memory/slurm/job", ("memory.limit_in_bytes", "memory.usage_in_bytes")),
        ("12:cpu:/x\n5:memory,hugetlb:/slurm/job", "memory/slurm", ("memory.limit_in_bytes", "memory.usage_in_bytes")),
        # A container's own hierarchy: the path is what the machine calls it.
        ("5:memory:/docker/4f2a", "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")),
        ("0::/../other", "", ("memory.max", "memory.current")),
    ],
)
def test_a_limit_of_a_job_a_service_or_a_container_counts(cgroups: Path, own: str, where: str, files: tuple[str, str]):
    (cgroups.parent / "own").write_text(own + "\n")
    (cgroups / where).mkdir(parents=True, exist_ok=True)
    for name, value in zip(files, (64_000, 1_000), strict=True):
        (cgroups / where / name).write_text(f"{value}\n")
    assert memory.available_bytes(torch.device("cpu")) == 63_000


def test_a_neighbours_limit_does_not(cgroups: Path):
    (cgroups.parent / "own").write_text("0::/job/step\n")
    (cgroups / "job" / "other").mkdir(parents=True)
    (cgroups / "job" / "other" / "memory.max").write_text("64000\n")
    assert memory.available_bytes(torch.device("cpu")) == 10**12
