"""vLLM offline: what is asked and taken, with a script in its place; the real one is an acceptance test."""

import json
import sys

import pytest

from serving.benchmark import results as bench_results
from serving.benchmark.sessions import offline as bench_offline
from serving.benchmark.sessions.offline import OfflineSession
from serving.benchmark.sessions.worker_process import EngineFailedError
from serving.benchmark.settings import BenchmarkSettings
from serving.benchmark.side import open_sides
from serving.benchmark.workload import make_workloads
from serving.forecast.device_probe import DevicePeaks
from serving.server.vllm import server as vllm_server
from tests.conftest import make_pico
from tests.serving.benchmark.asking import ask_benchmark
from toolchain.checkpoint.directory import copy_companions
from toolchain.errors import SenteiError

LOAD = {"input_len": 16, "output_len": 4, "concurrency": [2]}
ANSWERS = {
    "throughput": {"elapsed_time": 2.0, "num_requests": 8, "total_num_tokens": 160, "requests_per_second": 4.0,
                   "tokens_per_second": 80.0},
    "latency": {"avg_latency": 0.5, "latencies": [0.4, 0.5, 0.6]},
}  # fmt: skip


@pytest.fixture
def asked(monkeypatch):
    """The commands that were given; ``script`` runs in place of vLLM."""
    record = {"commands": [], "script": ""}

    def command(*arguments):
        record["commands"].append(arguments)
        answer = json.dumps(ANSWERS[arguments[1]])
        file = arguments[arguments.index("--output-json") + 1]
        written = f"open({file!r}, 'w').write({answer!r})"
        return [sys.executable, "-c", record["script"] or f"print('KV cache size: 1,024 tokens'); {written}"]

    monkeypatch.setattr(bench_offline, "launcher_command", command)
    peaks = DevicePeaks(device="cpu", dtype="float32", flops_per_s=1e11, bytes_per_s=1e10)
    monkeypatch.setattr(bench_results, "probe_device", lambda device, dtype: peaks)  # that takes seconds
    monkeypatch.setattr(vllm_server, "has_cxx_compiler", lambda: True)
    return record


def session(directory, out, **chosen):
    """A session, both sides, and the load."""
    settings = BenchmarkSettings(
        engine="vllm-offline", workloads=make_workloads(engine="vllm-offline", **LOAD), **chosen
    )
    sides = open_sides(directory, directory, settings)
    return OfflineSession(sides, settings, out), sides, settings.workloads[0]


def test_figures_are_vllms_own(pico_model, asked, tmp_path):
    results = ask_benchmark(pico_model, pico_model, engine="vllm-offline", out=tmp_path / "out", repeats=3, **LOAD)
    metrics = results["measurements"][0]["metrics"]
    medians = {name: metric["original"]["median"] for name, metric in metrics.items()}
    assert medians["output_throughput"] == 8 * 4 / 2.0
    assert (medians["total_token_throughput"], medians["request_throughput"]) == (80.0, 4.0)
    assert medians["mean_e2el_ms"] == pytest.approx(500)
    assert medians["mean_ttft_ms"] is medians["mean_tpot_ms"] is None
    assert results["measurements"][0]["percentiles"]["e2el"]["pruned"]["50"] == pytest.approx(500)
    assert results["sizes"]["kv_cache_tokens"]["original"] == 1024
    kept = json.loads((tmp_path / "out" / "vllm" / "pruned-2-throughput.json").read_text())
    assert kept == ANSWERS["throughput"]
    for command in asked["commands"]:  # for 16 tokens in and 4 out, not for the whole context
        assert command[command.index("--max-model-len") + 1] == "36"


def test_both_are_asked_the_same(pico_model, asked, tmp_path):
    running, sides, workload = session(pico_model, tmp_path, engine_options=["--max-model-len", "64"])
    for name, side in sides.items():
        running.measure(side, 1, workload, name=name)
    original, pruned = asked["commands"][:2], asked["commands"][2:]
    assert [[each.replace("original", "pruned") for each in command] for command in original] == list(map(list, pruned))
    throughput, latency = asked["commands"][:2]
    assert throughput[throughput.index("--random-input-len") + 1] == latency[latency.index("--input-len") + 1] == "16"
    assert throughput[throughput.index("--num-prompts") + 1] == "8"
    assert throughput[throughput.index("--num-warmups") + 1] == "2"
    assert throughput[throughput.index("--seed") + 1] == "1"
    assert latency[latency.index("--batch-size") + 1] == "2"
    for command in (throughput, latency):
        assert {"--max-model-len", "--no-enable-prefix-caching", "--dtype"} <= set(command)


def test_a_failure_is_told_with_the_end_of_the_log(pico_model, asked, tmp_path):
    asked["script"] = "import sys; print('out of memory'); sys.exit(1)"
    running, sides, workload = session(pico_model, tmp_path)
    with pytest.raises(
        EngineFailedError, match=r"(?s)throughput of the pruned model failed \(exit code 1\).*out of mem"
    ):
        running.measure(sides["pruned"], 0, workload, name="x")


def test_a_silent_process_is_given_up(pico_model, asked, tmp_path):
    asked["script"] = "import time; print('loading', flush=True); time.sleep(60)"
    running, sides, workload = session(pico_model, tmp_path, stall_timeout_s=2)
    with pytest.raises(EngineFailedError, match=r"(?s)hung with the original model: it wrote nothing for 2 s.*loading"):
        running.measure(sides["original"], 0, workload, name="x")


def test_what_cannot_be_asked_is_refused(pico_model, tmp_path):
    with pytest.raises(SenteiError, match="need a server"):
        make_workloads(engine="vllm-offline", input_len=8, output_len=4, request_rate=[1.0])
    with pytest.raises(SenteiError, match="run code from the checkpoint"):
        session(pico_model, tmp_path, engine_options=["--trust-remote-code"])
    with pytest.raises(SenteiError, match="mean_ttft_ms is undefined with this engine"):
        ask_benchmark(
            pico_model, pico_model, engine="vllm-offline", out=tmp_path / "out", primary="mean_ttft_ms", **LOAD
        )


@pytest.mark.acceptance
@pytest.mark.usefixtures("vllm")
def test_the_real_vllm(pruned_demo, tmp_path):
    options = ["--max-model-len", "128", "--enforce-eager"]
    running, sides, workload = session(pruned_demo, tmp_path, dtype="bfloat16", engine_options=options)
    measured = running.measure(sides["original"], 0, workload, name="original-0")
    assert measured["total_token_throughput"] == pytest.approx(5 * measured["output_throughput"])  # (16 + 4) / 4
    assert measured["completed"] == 8
    assert measured["output_throughput"] == pytest.approx(4 * measured["request_throughput"])
    assert measured["mean_e2el_ms"] > 0
    assert sides["original"].engine_report["kv_cache_tokens"] > 128


@pytest.mark.acceptance
@pytest.mark.usefixtures("vllm")
def test_the_real_vllm_starts_where_the_whole_context_takes_gigabytes(demo_model, tmp_path):
    model = tmp_path / "model"
    make_pico(model, max_position_embeddings=131072, num_key_value_heads=4, head_dim=128)  # 16 KiB a token
    copy_companions(demo_model, model)
    running, sides, workload = session(model, tmp_path, engine_options=["--enforce-eager"])
    assert running.measure(sides["original"], 0, workload, name="original-0")["completed"] == 8
