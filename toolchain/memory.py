"""How much memory may be used: what is free, and less where a container's limit says so."""

import ctypes
import sys
from pathlib import Path

import torch

_CGROUP = Path("/sys/fs/cgroup")
# malloc.h; to set one of them ends glibc's own adjustment of the other, so both are set.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def available_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on a device; on a CPU within the cgroup's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = [_meminfo("/proc/meminfo", "MemAvailable")]
    if (maximum := _read_number(_CGROUP / "memory.max")) is not None:
        used = (_read_number(_CGROUP / "memory.current") or 0) - _page_cache()
        limits.append(maximum - used)
    return max(0, min(limits))


def keep_freed_memory() -> None:
    """Has the C library keep memory that is freed, for the next tensor, instead of giving it back at once.

    A layer's activations are as large as glibc's threshold for giving back, so each layer would ask for them anew, and
    the system would clear every page again: a tenth of a forward pass in float32, a third in bfloat16.
    """
    _set_thresholds(trim=2**31 - 1, mmap=2**30)


def give_back_freed_memory() -> None:
    """Has the C library give back what is free now, and what is freed from now on.

    Kept, the gaps that weights leave between others add up to gigabytes when layers come and go.
    """
    _set_thresholds(trim=2**17, mmap=2**20)
    if glibc := _glibc():
        glibc.malloc_trim(0)


def _set_thresholds(*, trim: int, mmap: int) -> None:
    """Bytes free at the end of the heap before it shrinks, and bytes from which an allocation is outside of it."""
    if glibc := _glibc():
        glibc.mallopt(_M_TRIM_THRESHOLD, trim)
        glibc.mallopt(_M_MMAP_THRESHOLD, mmap)


def _glibc() -> ctypes.CDLL | None:
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "malloc_trim") else None


def _page_cache() -> int:
    """Files that were read lately: they count as used, and give way to whatever is allocated."""
    try:
        lines = (_CGROUP / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(("active_file ", "inactive_file ")))


def _meminfo(path: str, key: str) -> int:
    for line in Path(path).read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def _read_number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
