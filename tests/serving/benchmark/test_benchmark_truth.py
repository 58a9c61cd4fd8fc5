"""Does the benchmark tell the truth? The same model twice, one slowed by a known factor, and vLLM's client by hand.

Long, and on a machine that does nothing else: with vLLM each repeat starts two servers. Where the statistics of a
benchmark change, ten runs tell more: ``SENTEI_RUNS=10`` (3) and ``SENTEI_REPEATS`` (6).
"""

import json
import os
import subprocess
from pathlib import Path

import pytest

from serving.benchmark.metrics import METRICS
from serving.benchmark.sessions import server as bench_server
from serving.server.vllm.server import launcher_command, launcher_environment, running_server
from tests.serving.benchmark.asking import ask_benchmark
from tests.serving.slow_server import FACTOR

pytestmark = [
    pytest.mark.acceptance,
    pytest.mark.alone,
    pytest.mark.timeout(4 * 3600),
    pytest.mark.usefixtures("vllm"),
]
RUNS, REPEATS = (int(os.environ.get(f"SENTEI_{name}", default)) for name, default in (("RUNS", "3"), ("REPEATS", "6")))
OPTIONS = ["--enforce-eager", "--max-model-len", "256", "--kv-cache-memory-bytes", "1G", "--no-enable-prefix-caching"]
SHAPE = {"input_len": 32, "output_len": 32, "concurrency": [1], "num_prompts": 8}
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def server(demo_model, tmp_path):
    with running_server(demo_model, options=[*OPTIONS, "--dtype", "bfloat16"], log=tmp_path / "server.log") as url:
        yield url


@pytest.fixture
def slow_model(demo_model, tmp_path, monkeypatch):
    """The same model, whose vLLM servers slow down."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])))
    slow = tmp_path / "slow"
    slow.symlink_to(demo_model)
    plain = bench_server.engine_options_for

    def options_for(side, *rest):
        return plain(side, *rest) + (["--middleware", "tests.serving.slow_server.SlowDown"] * (side.directory == slow))

    monkeypatch.setattr(bench_server, "engine_options_for", options_for)
    return slow


def measure(original, pruned, out, *, engine="vllm", **settings):
    """One run; its primary metric."""
    results = ask_benchmark(original, pruned, engine=engine, repeats=REPEATS, out=out, **SHAPE, **settings)
    metric = results["measurements"][0]["metrics"]["output_throughput"]
    gain = metric["gain"]
    print(f"{gain['value']:.4f} ({gain['low']:.4f} to {gain['high']:.4f}), {metric['verdict']}", flush=True)
    return metric


@pytest.mark.parametrize("engine, model", [("onnx", "demo_onnx"), ("vllm", "demo_model")])
def test_the_same_model_twice_shows_no_difference(engine, model, tmp_path, request):
    directory = request.getfixturevalue(model)
    settings = {"dtype": "bfloat16", "engine_options": OPTIONS} if engine == "vllm" else {}
    verdicts = [
        measure(directory, directory, tmp_path / str(run), engine=engine, **settings)["verdict"] for run in range(RUNS)
    ]
    assert len(verdicts) - verdicts.count("no difference shown") <= max(1, RUNS // 10)


def test_a_known_slow_down_is_found(demo_model, slow_model, tmp_path):
    runs = min(RUNS, 3)
    settings = {"dtype": "bfloat16", "engine_options": OPTIONS}
    metrics = [measure(demo_model, slow_model, tmp_path / str(run), **settings) for run in range(runs)]
    assert [metric["verdict"] for metric in metrics] == ["worse"] * runs
    # An interval at 95 % misses once in twenty.
    inside = [metric["gain"]["low"] <= 1 / FACTOR <= metric["gain"]["high"] for metric in metrics]
    assert inside.count(True) >= runs - 1


def test_figures_are_those_of_vllms_client_by_hand(demo_model, server, tmp_path):
    results = ask_benchmark(demo_model, None, engine="vllm", urls=[server], out=tmp_path / "out", **SHAPE)
    for run in results["measurements"][0]["runs"]:
        written = json.loads((tmp_path / "out" / "vllm" / f"original-{run['repeat']}.json").read_text())
        assert {m.name: run["original"][m.name] for m in METRICS} == {m.name: written[m.name] for m in METRICS}
    file = tmp_path / "by-hand.json"
    command = launcher_command(
        "bench", "serve", "--base-url", server, "--model", str(demo_model), "--served-model-name", demo_model.name,
        "--dataset-name", "random",
        "--random-input-len", "32", "--random-output-len", "32", "--num-prompts", "8", "--max-concurrency", "1",
        "--seed", "0", "--ignore-eos", "--save-result", "--result-dir", str(tmp_path), "--result-filename", file.name,
    )  # fmt: skip
    subprocess.run(command, check=True, env=launcher_environment(), capture_output=True)
    by_hand = json.loads(file.read_text())
    # The one just before: machines get faster and slower within minutes.
    last = results["measurements"][0]["runs"][-1]["original"]
    for name in ("output_throughput", "mean_ttft_ms", "mean_tpot_ms"):
        print(f"{name}: {last[name]:.4g}, by hand {by_hand[name]:.4g}", flush=True)
        assert last[name] == pytest.approx(by_hand[name], rel=0.25)
