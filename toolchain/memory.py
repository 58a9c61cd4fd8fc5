"""How much memory may be used: what is free, and less where a container or a user limit says so."""

import ctypes
import resource
import sys
from pathlib import Path

import torch

_CGROUP = Path("/sys/fs/cgroup")
# malloc.h; to set one of them ends glibc's own adjustment of the other, so both are set.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def available_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on a device; on a CPU within the cgroup's and the process's limits."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = [_meminfo("/proc/meminfo", "MemAvailable")]
    if (maximum := _read_number(_CGROUP / "memory.max")) is not None:
        limits.append(maximum - (_read_number(_CGROUP / "memory.current") or 0))
    data_limit = resource.getrlimit(resource.RLIMIT_DATA)[0]
    if data_limit != resource.RLIM_INFINITY:
        limits.append(data_limit - _meminfo("/proc/self/status", "VmData"))
    return max(0, min(limits))


def keep_freed_memory() -> None:
    """Has the C library keep memory that is freed, for the next tensor, instead of giving it back at once.

    A layer's activations are as large as glibc's threshold for giving back, so each layer would ask for them anew, and
    the system would clear every page again: a tenth of a forward pass in float32, a third in bfloat16.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_MMAP_THRESHOLD, 2**30)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that an allocation failed, on a GPU or on a CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


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
