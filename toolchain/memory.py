"""How much memory may be used: what is free, and less where a container or a user limit says so."""

import resource
from pathlib import Path

import torch

_CGROUP = Path("/sys/fs/cgroup")


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
