"""What the benchmark asks of its workers, with a stand-in for them."""

import json
import sys
import time
from contextlib import contextmanager
from types import SimpleNamespace

import onnx
import pytest
import torch

from serving.benchmark.sessions import local as bench_local
from serving.benchmark.sessions.local import LocalSession
from serving.benchmark.sessions.worker import load_onnx, peak_memory_bytes
from serving.benchmark.settings import BenchmarkSettings
from serving.benchmark.side import check_one_device
from serving.benchmark.workload import make_workloads
from serving.forecast import device_probe
from serving.forecast.device_probe import measure_peaks
from serving.onnx_export.files import read_settings
from tests.serving.benchmark.asking import sides_of
from toolchain.errors import SenteiError


@pytest.fixture
def workers(monkeypatch):
    """Every worker's log, and what it was asked."""
    record = SimpleNamespace(logs=[], asked=[])

    def ask(command, *, timeout_s, **arguments):
        record.asked.append({"command": command, **arguments})
        if command == "load":
            return {"device": "cpu"}
        now = time.perf_counter()
        return {"peak_memory_bytes": 1, "requests": [{"start_s": now, "token_times_s": [now + 1, now + 2]}]}

    @contextmanager
    def running_worker(side, log):
        record.logs.append(log.name)
        log.write_text("its last words")
        yield SimpleNamespace(name=side, ask=ask)

    monkeypatch.setattr(bench_local, "running_worker", running_worker)
    return record


@pytest.fixture
def session(tmp_path):
    workloads = make_workloads(engine="onnx", concurrency=[1, 4], num_prompts=40)
    sides = sides_of(tmp_path)
    return (
        LocalSession(sides, BenchmarkSettings(engine="onnx", workloads=workloads), tmp_path),
        workloads,
        sides["pruned"],
    )


def test_a_warm_up_is_one_batch_as_wide_as_the_widest_load(workers, session):
    local, workloads, pruned = session
    local.measure(pruned, 0, workloads[1], name="pruned-0")
    _, warmup, measured = workers.asked
    assert (warmup["num_prompts"], warmup["batch_size"]) == (4, 4)
    assert (measured["num_prompts"], measured["batch_size"]) == (40, 4)


def test_a_second_attempt_keeps_the_log_of_the_worker_that_died(workers, session):
    local, workloads, pruned = session
    local.measure(pruned, 0, workloads[1], name="pruned-0")
    local.drop(pruned)
    local.measure(pruned, 0, workloads[1], name="pruned-0")
    assert workers.logs == ["pruned-0.log", "pruned-0-start2.log"]


def test_energy_is_that_of_the_device_that_the_worker_runs_on(workers, session, monkeypatch):
    watched, watch = [], bench_local.watched_gpus
    monkeypatch.setattr(bench_local, "watched_gpus", lambda device: (watched.append(device), watch(None))[1])
    local, workloads, pruned = session
    local.measure(pruned, 0, workloads[0], name="pruned-0")
    assert watched == ["cpu"]


def write_export(directory, device):
    """What an export says of itself, and a graph of nothing."""
    directory.mkdir()
    options = [{"cuda": {}}] if device == "cuda" else []
    decoder = {"filename": "model.onnx", "head_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2,
               "session_options": {"provider_options": options}}  # fmt: skip
    model = {"decoder": decoder, "eos_token_id": 0, "context_length": 64, "vocab_size": 100}
    (directory / "genai_config.json").write_text(json.dumps({"model": model}))
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], [])), directory / "model.onnx")
    return directory


@pytest.fixture
def runtime(monkeypatch):
    """A stand-in for onnxruntime-genai that finds a CUDA device, and what it was told to run on."""
    told = []
    config = SimpleNamespace(
        clear_providers=lambda: told.clear(),
        append_provider=told.append,
        set_provider_option=lambda *option: told.append(option),
    )
    module = SimpleNamespace(is_cuda_available=lambda: True, Config=lambda path: config, Model=lambda config: None)
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", module)
    return told


@pytest.mark.parametrize(
    ("exported_for", "asked_for", "device", "providers"),
    [
        ("cpu", "auto", "cpu", []),
        ("cuda", "auto", "cuda", ["cuda"]),
        ("cuda", "cpu", "cpu", []),
        ("cuda", "cuda:1", "cuda:1", ["cuda", ("cuda", "device_id", "1")]),
    ],
)
def test_an_export_runs_on_its_own_device_or_the_one_named(
    tmp_path, runtime, exported_for, asked_for, device, providers
):
    _, told = load_onnx(write_export(tmp_path / "export", exported_for), asked_for, None)
    assert (told["device"], runtime) == (device, providers)


def test_exports_for_unlike_devices_are_not_compared(tmp_path):
    exports = {name: read_settings(write_export(tmp_path / name, name)).device for name in ("cuda", "cpu")}
    original, pruned = (sides_of(tmp_path, export_device=exports[name])["original"] for name in ("cuda", "cpu"))
    with pytest.raises(SenteiError, match="original is exported for cuda and the pruned model for cpu"):
        check_one_device({"original": original, "pruned": pruned})
    check_one_device({"original": pruned, "pruned": pruned})


def test_of_many_gpus_the_one_that_is_used_is_asked(monkeypatch):
    asked = []
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", {"cuda:1": 3}.get)
    monkeypatch.setattr("torch.cuda.synchronize", asked.append)
    monkeypatch.setattr("torch.cuda.get_device_name", {"cuda:1": "the second"}.get)
    small = torch.ones(4, 4)
    monkeypatch.setattr(torch, "randn", lambda *shape, device: small)
    monkeypatch.setattr(device_probe, "_MIN_SECONDS", 0.001)
    assert peak_memory_bytes("cuda:1") == 3
    assert measure_peaks("cuda:1", torch.float32).device == "the second"
    assert set(asked) == {"cuda:1"}
