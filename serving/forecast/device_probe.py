"""What this device can do, measured in seconds.

``python -m serving.forecast.device_probe DEVICE DTYPE`` prints one JSON line. It is a process of its own, so that a
GPU is free again when the servers start.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch

from toolchain.checkpoint.directory import dtype_name
from toolchain.errors import SenteiError
from toolchain.lifetime import own_environment

_MIN_SECONDS, _ROUNDS = 0.2, 3
_TIMEOUT_S = 300


@dataclass(frozen=True, kw_only=True)
class DevicePeaks:
    """The highest rates reached by torch's own kernels on this device.

    Attributes:
        device: ``cpu``, or the GPU's name.
        dtype: What was multiplied.
        flops_per_s: Of a square matrix product in that dtype; a multiply and an add count as two.
        bytes_per_s: Read by a float32 matrix-vector product far larger than any cache, which is what decoding does.
    """

    device: str
    dtype: str
    flops_per_s: float
    bytes_per_s: float


def probe_device(device: str, dtype: str) -> DevicePeaks:
    """Measures this device in a fresh process.

    Args:
        device: ``cpu``, ``cuda`` or ``cuda:1``.
        dtype: ``float32``, ``bfloat16`` or ``float16``.

    Raises:
        SenteiError: It cannot be measured; the message holds why.
    """
    command = [sys.executable, "-P", "-m", "serving.forecast.device_probe", device, dtype]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, env=own_environment())
        return DevicePeaks(**json.loads(done.stdout.splitlines()[-1]))
    except subprocess.TimeoutExpired as error:
        raise SenteiError(f"Measuring {device} took longer than {_TIMEOUT_S} s.") from error
    except (IndexError, ValueError, TypeError) as error:
        raise SenteiError(f"{device} cannot be measured: {done.stderr.strip()[-300:]}") from error


def measure_peaks(device: str, dtype: torch.dtype) -> DevicePeaks:
    """Measures in this process; takes a few seconds."""
    on_gpu = device != "cpu"
    wait = partial(torch.cuda.synchronize, device) if on_gpu else lambda: None
    side = 8192 if on_gpu else 1024
    one, other = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    flops = 2 * side**3 / _best_seconds(lambda: one @ other, wait)
    # A quarter of a GiB on a CPU, one on a GPU.
    rows = 16384 if on_gpu else 4096
    matrix, vector = torch.randn(rows, 16384, device=device), torch.randn(16384, device=device)
    read = matrix.numel() * 4 / _best_seconds(lambda: matrix @ vector, wait)
    name = torch.cuda.get_device_name(device) if on_gpu else "cpu"
    return DevicePeaks(
        device=name, dtype=dtype_name(dtype), flops_per_s=flops, bytes_per_s=read
    )  # fmt: skip


def _best_seconds(run: Callable[[], torch.Tensor], wait: Callable[[], None]) -> float:
    """Seconds a call, the best of a few rounds: what the device can do, not what it did on average."""
    best = float("inf")
    run()
    for _ in range(_ROUNDS):
        count, start_s = 0, _now(wait)
        while (elapsed_s := _now(wait) - start_s) < _MIN_SECONDS:
            run()
            count += 1
        best = min(best, elapsed_s / count)
    return best


def _now(wait: Callable[[], None]) -> float:
    wait()
    return time.perf_counter()


if __name__ == "__main__":
    print(json.dumps(asdict(measure_peaks(sys.argv[1], getattr(torch, sys.argv[2])))))
