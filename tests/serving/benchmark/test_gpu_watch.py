"""What is made of NVML's answers, with a stand-in for the library."""

import sys
import time
from types import SimpleNamespace

import pytest

from serving.benchmark import gpu_watch as gpu_state
from serving.benchmark.gpu_watch import GpuWatch, MemoryBefore, energy, watched_gpus


class FakeNVMLError(Exception):
    pass


@pytest.fixture
def nvml(monkeypatch):
    """Two GPUs that each draw 100 W; ``reasons`` and whether energy is counted can be set."""
    started = time.monotonic()
    state = SimpleNamespace(reasons=0, counts=True, open=0, asked=set(), broken=False, used=[[0, 0]])

    def memory(handle):
        """Each look at the last GPU is one of ``used``; the last of them stays."""
        looks = state.used
        used = looks[0][handle]
        if handle == 1 and len(looks) > 1:
            looks.pop(0)
        return SimpleNamespace(used=used)

    def joules(handle):
        if not state.counts:
            raise FakeNVMLError
        return 1000 * (5_000_000 + 100 * (time.monotonic() - started))  # in mJ, since the driver was loaded

    def by_uuid(uuid):
        if not uuid.startswith("GPU-"):
            raise FakeNVMLError
        return uuid

    def clock(handle, kind):
        state.asked.add(handle)
        if state.broken:
            raise FakeNVMLError
        return 1980 if handle == 0 else 1400

    fake = SimpleNamespace(
        NVMLError=FakeNVMLError, NVML_CLOCK_SM=1, NVML_TEMPERATURE_GPU=0,
        nvmlInit=lambda: setattr(state, "open", state.open + 1),
        nvmlShutdown=lambda: setattr(state, "open", state.open - 1),
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetHandleByUUID=by_uuid,
        nvmlDeviceGetTotalEnergyConsumption=joules,
        nvmlDeviceGetClockInfo=clock,
        nvmlDeviceGetMemoryInfo=memory,
        nvmlDeviceGetTemperature=lambda handle, sensor: 60 + 5 * bool(handle),
        nvmlDeviceGetPowerUsage=lambda handle: 100_000,
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: state.reasons,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(gpu_state, "_INTERVAL_S", 0.02)
    return state


def test_energy_is_of_the_load_and_not_of_the_clients_start(nvml):
    with watched_gpus("cuda") as gpus:
        time.sleep(0.6)
    seen = gpus.last(0.3)
    assert seen["energy_j"] == pytest.approx(2 * 100 * 0.3, rel=0.35)
    assert seen["mean_power_w"] == 200
    assert seen["sm_clock_mhz"] == {"min": 1400, "mean": pytest.approx(1690, rel=0.02)}
    assert (seen["temperature_c"], seen["throttled"]) == (65, [])
    assert energy(seen, 100)["energy_per_output_token_j"] == seen["energy_j"] / 100
    assert nvml.open == 0


def test_throttling_is_named(nvml):
    nvml.reasons = 0x04 | 0x40 | 0x01  # power cap, hardware temperature; 1 is an idle GPU, which is no fault
    with watched_gpus("cuda") as gpus:
        time.sleep(0.1)
    assert gpus.last(0.05)["throttled"] == ["power cap", "hardware temperature"]


def test_a_gpu_that_does_not_count_its_energy_has_none(nvml):
    nvml.counts = False
    with watched_gpus("cuda") as gpus:
        time.sleep(0.1)
    assert energy(gpus.last(0.05), 10) == {"gpu": gpus.last(0.05), "energy_per_output_token_j": None}
    assert gpus.last(0.05)["energy_j"] is None


def test_only_the_gpus_that_cuda_sees_are_watched(nvml, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,GPU-abc")
    with watched_gpus("cuda"):
        time.sleep(0.1)
    assert nvml.asked == {1, "GPU-abc"}


@pytest.mark.parametrize(
    ("named", "watched"), [("-1", set()), ("1,-1,0", {1}), ("0,unknown", set()), ("", set()), (" 0 , 1", {0, 1})]
)
def test_what_cuda_does_not_see_or_nvml_does_not_know_is_not_watched(nvml, monkeypatch, named, watched):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    with watched_gpus("cuda") as gpus:
        time.sleep(0.1)
    assert nvml.asked == watched
    assert (gpus.last(1.0) is None) == (not watched)


@pytest.mark.parametrize(("device", "seen"), [("cpu", False), (None, False), ("cuda", True), ("cuda:1", True)])
def test_gpus_beside_an_engine_that_does_not_run_on_them_are_not_watched(nvml, device, seen):
    with watched_gpus(device) as gpus:
        time.sleep(0.1)
    assert (gpus.last(1.0) is not None) == seen


def test_a_gpu_that_stops_answering_leaves_nothing(nvml):
    nvml.broken = True
    with watched_gpus("cuda") as gpus:
        time.sleep(0.1)
    assert gpus.last(1.0) is None


def test_without_nvml_nothing_is_seen(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with watched_gpus("cuda") as gpus:
        pass
    assert energy(gpus.last(1.0), 10) == {"gpu": None, "energy_per_output_token_j": None}
    assert GpuWatch(None).last(1.0) is None


def test_what_was_in_use_before_is_waited_for_until_the_time_is_over(nvml, monkeypatch):
    gib = 1024**3
    monkeypatch.setattr(gpu_state, "_FREED_POLL_S", 0.0)
    nvml.used = [[10 * gib, 0]]
    before = MemoryBefore("cuda")
    nvml.used = [[70 * gib, 0], [10 * gib, 60 * gib], [4 * gib, 0]]
    assert before.wait()
    assert not nvml.used[1:]
    monkeypatch.setattr(gpu_state, "_FREED_TIMEOUT_S", 0.05)
    nvml.used = [[10 * gib, 0]]  # since the last wait, 4 GiB are what others have
    assert not before.wait()
    assert MemoryBefore("cpu").wait()
    assert nvml.open == 0
