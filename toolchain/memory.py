"""How much memory may be used: what is free, and less where a container, a batch job or a service has a limit."""

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

_CGROUP = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")
# Limit, use, and what of it are files that were read lately; in the unified hierarchy, and in that of memory before it.
_UNIFIED = ("memory.max", "memory.current", ("active_file ", "inactive_file "))
_SEPARATE = ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file ", "total_inactive_file "))
# malloc.h; to set one of them ends glibc's own adjustment of the other, so both are set.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def available_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on a device; on a CPU within the limits of this process's cgroups."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return max(0, min([_meminfo("/proc/meminfo", "MemAvailable"), *_left_in_cgroups()]))


def _left_in_cgroups() -> Iterator[int]:
    """What each limit that holds for this process leaves: its own cgroup's and those of all around it."""
    # In a container the whole hierarchy may be its own, whatever its path is called outside.
    for root, path, (limit, use, cache) in [(_CGROUP, "/", _UNIFIED), *_own_cgroups()]:
        own = root / path.strip("/")
        for directory in (own, *own.parents):
            if not directory.is_relative_to(root):
                break
            if (maximum := _read_number(directory / limit)) is not None:
                yield maximum - (_read_number(directory / use) or 0) + _page_cache(directory, cache)


def _own_cgroups() -> Iterator[tuple[Path, str, tuple[str, str, tuple[str, str]]]]:
    """Where the hierarchies that count memory lie, and this process's place in each (cgroups(7))."""
    try:
        lines = _OWN_CGROUPS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            yield _CGROUP, path, _UNIFIED
        elif "memory" in controllers.split(","):
            yield _CGROUP / "memory", path, _SEPARATE


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


def _page_cache(directory: Path, keys: tuple[str, str]) -> int:
    """Files that were read lately: they count as used, and give way to whatever is allocated."""
    try:
        lines = (directory / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(keys))


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
