"""Clocks, temperature, throttling, energy and used memory of NVIDIA GPUs, from NVML."""

import importlib
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import takewhile
from statistics import fmean
from typing import Any

from serving.benchmark.metrics import ENERGY

_INTERVAL_S = 0.25
# nvml.h, nvmlClocksEventReason*: those that mean a slower GPU than it could be.
_REASONS = {
    0x04: "power cap", 0x08: "hardware slowdown", 0x20: "temperature", 0x40: "hardware temperature",
    0x80: "power brake",
}  # fmt: skip
_FREED_TIMEOUT_S = 60.0
_FREED_POLL_S = 0.5
# More may be in use than before and still count as nothing: what the driver and other programs take goes up and down.
_FREED_SLACK_BYTES = 512 * 1024**2
NOT_RECORDED = "not recorded: no engine ran on an NVIDIA GPU of this machine, or nvidia-ml-py is not installed"
RECORDED = "recorded from NVML, of the GPUs that CUDA_VISIBLE_DEVICES names, all of them if it is not set"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One look at one GPU.

    Attributes:
        at_s: On the monotonic clock.
        sm_clock_mhz: Of the streaming multiprocessors.
        temperature_c: Of the chip.
        power_w: Drawn now.
        energy_j: Since the driver was loaded; ``None`` before Volta.
        reasons: Bits of what slows it down.
    """

    at_s: float
    sm_clock_mhz: int
    temperature_c: int
    power_w: float
    energy_j: float | None
    reasons: int


class GpuWatch:
    """Looks at each GPU four times a second until it is closed. Without NVML it sees nothing."""

    def __init__(self, nvml: Any | None) -> None:
        """Starts looking.

        Args:
            nvml: The initialised module ``pynvml``; ``None`` where there is none.
        """
        self._nvml, self._stopped = nvml, threading.Event()
        self._handles = _visible(nvml) if nvml else []
        self._samples: list[list[Sample]] = [[] for _ in self._handles]
        self._thread = threading.Thread(target=self._look_until_stopped, daemon=True)
        if self._handles:
            self._thread.start()

    def close(self) -> None:
        """Stops looking."""
        self._stopped.set()
        if self._handles:
            self._thread.join()

    def last(self, duration_s: float) -> dict[str, Any] | None:
        """What was seen in the last ``duration_s`` seconds: a load generator's start-up is no part of the load.

        Returns:
            ``energy_j`` (of all GPUs; ``None`` where one does not count it), ``mean_power_w`` (of all), the lowest and
            mean ``sm_clock_mhz``, the highest ``temperature_c`` and ``throttled`` (why, if ever). ``None`` where
            nothing was seen.
        """
        seen = [_since(samples, duration_s) for samples in self._samples]
        if not seen or not all(seen):
            return None
        clocks = [sample.sm_clock_mhz for samples in seen for sample in samples]
        energies = [_energy_j(samples) for samples in seen]
        bits = [sample.reasons for samples in seen for sample in samples]
        return {
            "energy_j": None if None in energies else sum(filter(None, energies)),
            "mean_power_w": sum(fmean(sample.power_w for sample in samples) for samples in seen),
            "sm_clock_mhz": {"min": min(clocks), "mean": fmean(clocks)},
            "temperature_c": max(sample.temperature_c for samples in seen for sample in samples),
            "throttled": [name for bit, name in _REASONS.items() if any(reasons & bit for reasons in bits)],
        }

    def _look_until_stopped(self) -> None:
        while True:
            for handle, samples in zip(self._handles, self._samples, strict=True):
                with suppress(self._nvml.NVMLError):  # type: ignore[union-attr]
                    samples.append(_look(self._nvml, handle))
            if self._stopped.wait(_INTERVAL_S):
                return


@contextmanager
def watched_gpus(device: str | None) -> Iterator[GpuWatch]:
    """Watches the GPUs while the context lasts.

    Args:
        device: What the engine runs on. Beside a CPU, or a server elsewhere (``None``), the GPUs here are idle: their
            clocks and energy say nothing of it, and nothing is seen.
    """
    nvml = _nvml() if device and device.startswith("cuda") else None
    watch = GpuWatch(nvml)
    try:
        yield watch
    finally:
        watch.close()
        if nvml:
            nvml.nvmlShutdown()


def used_memory_bytes() -> list[int] | None:
    """Bytes in use, by anyone, on each GPU that CUDA sees; ``None`` without NVML."""
    if (nvml := _nvml()) is None:
        return None
    try:
        return [int(nvml.nvmlDeviceGetMemoryInfo(handle).used) for handle in _visible(nvml)] or None
    except nvml.NVMLError:
        return None
    finally:
        nvml.nvmlShutdown()


class MemoryBefore:
    """How much of the GPUs was in use before an engine was started, so that the next one finds as much free.

    The driver gives a process's memory back some time after the process has ended.
    """

    def __init__(self, device: str) -> None:
        """Looks.

        Args:
            device: What the engine runs on; nothing is looked at beside a CPU.
        """
        self._used = used_memory_bytes() if device.startswith("cuda") else None

    def wait(self) -> bool:
        """Waits, for a minute at most, until no more is in use than before; whether it came to that."""
        deadline = time.monotonic() + _FREED_TIMEOUT_S
        while self._used is not None and (now := used_memory_bytes()) is not None:
            if all(each <= before + _FREED_SLACK_BYTES for each, before in zip(now, self._used, strict=True)):
                # What ran before the benchmark may have ended meanwhile.
                self._used = [min(pair) for pair in zip(now, self._used, strict=True)]
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(_FREED_POLL_S)
        return True


def energy(seen: Mapping[str, Any] | None, num_output_tokens: int) -> dict[str, Any]:
    """What a measurement keeps: ``gpu`` as :meth:`GpuWatch.last` tells it, and the energy of an output token."""
    energy_j = seen["energy_j"] if seen else None
    per_token = energy_j / num_output_tokens if energy_j is not None and num_output_tokens else None
    return {"gpu": seen, ENERGY.name: per_token}


def _nvml() -> Any | None:
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    return nvml


def _visible(nvml: Any) -> list[Any]:
    """The GPUs that CUDA sees; none where NVML does not know one of them, since the energy would lack its share."""
    try:
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        if named is None:
            return [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        names = (name.strip() for name in named.split(",") if name.strip())
        return [
            nvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdecimal() else nvml.nvmlDeviceGetHandleByUUID(name)
            for name in takewhile(lambda name: not name.startswith("-"), names)  # CUDA stops at the first such
        ]
    except nvml.NVMLError:
        return []


def _look(nvml: Any, handle: Any) -> Sample:
    try:
        energy_j: float | None = nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
    except nvml.NVMLError:
        energy_j = None
    return Sample(
        at_s=time.monotonic(),
        sm_clock_mhz=nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
        temperature_c=nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
        power_w=nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        energy_j=energy_j,
        reasons=nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle),
    )


def _since(samples: Sequence[Sample], duration_s: float) -> list[Sample]:
    """The samples of the last seconds, with the one before them: energy is a difference."""
    if not samples:
        return []
    begin_s = samples[-1].at_s - duration_s
    first = max((i for i, sample in enumerate(samples) if sample.at_s <= begin_s), default=0)
    return list(samples[first:])


def _energy_j(samples: Sequence[Sample]) -> float | None:
    """The counter's difference: it is exact where power is a moving average."""
    first, last = samples[0].energy_j, samples[-1].energy_j
    return None if len(samples) < 2 or first is None or last is None else last - first
