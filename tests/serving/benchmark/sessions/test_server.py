"""What the benchmark asks of vLLM and takes from it, with a stand-in for the servers; fields as in vLLM 0.32."""

import csv
import importlib.util
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from serving.benchmark import gpu_watch, process_memory
from serving.benchmark import results as bench_results
from serving.benchmark import run as benchmark_module
from serving.benchmark.comparison.runs import compare_results
from serving.benchmark.metrics import PERCENTILES
from serving.benchmark.sessions import server as bench_server
from serving.benchmark.sessions import vllm_options
from serving.benchmark.sessions.worker_process import EngineFailedError
from serving.benchmark.settings import BenchmarkSettings
from serving.benchmark.workload import Slo, make_workloads, read_prompts
from serving.forecast.device_probe import DevicePeaks
from serving.report.render import render_report
from serving.server.process import ServerEndedError
from tests.conftest import make_pico
from tests.families import make_family_pico
from tests.serving.benchmark.asking import ask_benchmark, sides_of
from toolchain.errors import MissingDependencyError, SenteiError

PEAKS = DevicePeaks(device="cpu", dtype="float32", flops_per_s=1e11, bytes_per_s=1e10)
TINY = {"input_len": 8, "output_len": 4, "repeats": 3}


def benchmark(original, pruned, *, engine="vllm", **asked):
    return ask_benchmark(original, pruned, engine=engine, **asked)


@pytest.fixture
def asked(monkeypatch):
    """Records what is asked. Can be set: ``failed`` requests, ``dead`` attempts, starts that are ``unready``, and each
    model's ``limit`` of rate; at 0 not even single requests are within the limits. A start that is unready is an error
    to raise."""
    record = {"servers": [], "loads": [], "failed": 0, "up": 0, "most_up": 0, "dead": [], "unready": [], "limit": {},
              "keys": set(), "patience": {}, "start_timeouts": set()}  # fmt: skip

    @contextmanager
    def running_server(directory, port=None, options=(), log=None, timeout_s=None):
        record["servers"].append((directory, list(options)))
        record["start_timeouts"].add(timeout_s)
        if record["unready"] and (error := record["unready"].pop(0)):
            raise error
        record["up"] += 1
        record["most_up"] = max(record["up"], record["most_up"])
        log.write_text("INFO GPU KV cache size: 55,808 tokens\nINFO Model loading took 0.25 GiB memory\n")
        with log.open("a") as lines:
            lines.write(f"this is {log.name}\n")
        try:
            yield "http://127.0.0.1:1"
        finally:
            record["up"] -= 1

    def bench_serve(base_url, model_dir, options=(), result_file=None, api_key=None, stall_timeout_s=None, client=None):
        warmup = "warmup" in result_file.name
        record["loads"].append((model_dir, list(options), result_file.name))
        record["keys"].add((base_url, api_key))
        record["patience"][result_file.stem] = stall_timeout_s
        if not warmup and record["dead"] and record["dead"].pop(0):
            raise EngineFailedError("The server no longer answers.")
        num_prompts = int(options[options.index("--num-prompts") + 1])
        result = {
            f"{kind}_{name}_ms": 5.0
            for kind in ("mean", *(f"p{p}" for p in PERCENTILES))
            for name in ("ttft", "tpot", "itl", "e2el")
        }
        result |= {"completed": num_prompts - record["failed"], "failed": record["failed"], "duration": 10.0}
        result |= {"output_throughput": 100.0, "total_token_throughput": 300.0, "request_throughput": 16.0}
        result |= {"first_error": None, "total_output_tokens": 400, "client_cpu_cores": 0.1, "request_goodput": None}
        if "--goodput" in options:
            assert "--save-detailed" in options
            rate = float(options[options.index("--request-rate") + 1]) if "--request-rate" in options else 16.0
            limit = record["limit"][str(model_dir)]
            late = limit == 0 or ("--request-rate" in options and rate > limit)
            # Beyond the limit every other request is late, and the server keeps up all the same.
            ttfts = [60.0 if late and number % 2 else 0.005 for number in range(num_prompts)]
            result |= {
                "start_times": [number / rate for number in range(num_prompts)], "ttfts": ttfts,
                "itls": [[0.005] * 3] * num_prompts, "latencies": [each + 0.015 for each in ttfts],
                "output_lens": [4] * num_prompts, "errors": [""] * num_prompts, "request_goodput": 1.0,
                "generated_texts": ["word"] * num_prompts,
            }  # fmt: skip
        result_file.write_text(json.dumps(result))
        return result

    monkeypatch.setattr(bench_server, "running_server", running_server)
    monkeypatch.setattr(bench_server, "bench_serve", bench_serve)
    monkeypatch.setattr(bench_server, "served_model_name", lambda base_url, api_key: f"the model at {base_url}")
    monkeypatch.setattr(bench_results, "probe_device", lambda device, dtype: PEAKS)  # that takes seconds
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    return record


def test_each_repeat_starts_a_server_for_each_and_gives_them_the_same_load(pico_model, asked, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    results = benchmark(pico_model, pico_model, out=tmp_path / "out", concurrency=[2], **TINY)
    options = [
        "--dtype", "float32", "--no-enable-prefix-caching", "--max-model-len", "28", "--kv-cache-memory-bytes",
        str(2**30),
    ]  # fmt: skip
    assert asked["servers"] == [(pico_model, options)] * 6
    assert (asked["up"], asked["most_up"]) == (0, 1)
    warmup, *_ = asked["loads"]
    assert "--ignore-eos" in warmup[1]
    measured = [(name, load) for _, load, name in asked["loads"] if "warmup" not in name]
    assert [name for name, _ in measured] == [
        "original-0.json", "pruned-0.json", "pruned-1.json", "original-1.json", "original-2.json", "pruned-2.json",
    ]  # fmt: skip
    assert dict(measured)["original-1.json"] == dict(measured)["pruned-1.json"] != dict(measured)["pruned-2.json"]
    assert results["measurements"][0]["workload"]["num_prompts"] == 8
    assert results["measurements"][0]["metrics"]["output_throughput"]["verdict"] == "no difference shown"
    assert results["sizes"]["kv_cache_tokens"]["original"] == 55808
    assert "window" not in results["models"]["original"]
    assert results["sizes"]["peak_memory_bytes"]["original"] is None
    assert len(list((tmp_path / "out" / "vllm").iterdir())) == 6


def test_on_a_gpu_each_measurement_has_its_server(pico_model, asked, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    benchmark(
        pico_model, pico_model, out=tmp_path / "out", dtype="bfloat16", engine_options=["--enforce-eager"], **TINY
    )
    assert len(asked["servers"]) == 6
    assert asked["servers"][0][1] == [
        "--enforce-eager", "--dtype", "bfloat16", "--no-enable-prefix-caching", "--max-model-len", "28",
    ]  # fmt: skip


def value_of(name, options):
    return options[options.index(name) + 1]


def test_servers_have_room_for_the_load_and_not_for_the_whole_context(asked, tmp_path, monkeypatch):
    """It wants its cache to hold one request as long as the context: most models would not start on a CPU."""
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    for side, context in (("original", 131072), ("pruned", 65536)):
        make_pico(tmp_path / side, vocab_size=64, max_position_embeddings=context, head_dim=64, num_key_value_heads=4)
    models = (tmp_path / "original", tmp_path / "pruned")
    load = {"input_len": 32, "output_len": 32, "repeats": 3}
    benchmark(*models, out=tmp_path / "short", **load)
    assert {value_of("--max-model-len", options) for _, options in asked["servers"]} == {"80"}
    assert {value_of("--kv-cache-memory-bytes", options) for _, options in asked["servers"]} == {str(2**30)}
    # The cache holds what is in flight together: keys and values of 4 heads of 64 numbers in 4 layers.
    monkeypatch.setattr(vllm_options, "available_bytes", lambda device: 2**40)
    load["input_len"] = 60000
    for concurrency, holds in ((20, 20 * 60048 * 8192), (1, 2**30)):
        asked["servers"].clear()
        benchmark(*models, out=tmp_path / f"long-{concurrency}", concurrency=[concurrency], **load)
        [found] = {int(value_of("--kv-cache-memory-bytes", options)) for _, options in asked["servers"]}
        assert holds <= found < 1.01 * holds
    # What is not free cannot be had, but for one request; what the user says of the context counts.
    monkeypatch.setattr(vllm_options, "available_bytes", lambda device: 2 * 10**9)
    asked["servers"].clear()
    benchmark(*models, out=tmp_path / "full", concurrency=[20], **load)
    assert value_of("--kv-cache-memory-bytes", asked["servers"][0][1]) == str(2**30)
    own = ["--max_model_len=1M"]
    benchmark(*models, out=tmp_path / "own", concurrency=[20], engine_options=own, **load)
    options = asked["servers"][-1][1]
    assert options[0] == own[0] and "--max-model-len" not in options
    assert 2**20 * 8192 <= int(value_of("--kv-cache-memory-bytes", options)) < 1.01 * 2**20 * 8192


@pytest.mark.parametrize(
    ("given", "not_added"),
    [
        (["--enable_prefix_caching"], "--no-enable-prefix-caching"),
        (["--no_enable_prefix_caching"], "--no-enable-prefix-caching"),
        (["--kv_cache_memory_bytes=8G"], "--kv-cache-memory-bytes"),
        (["--kv-cache-memory-bytes", "8G"], "--kv-cache-memory-bytes"),
        (["--gpu-memory-utilization=0.5"], "--kv-cache-memory-bytes"),
        (["--max_model_len=64"], "--max-model-len"),
    ],
)
def test_an_option_that_was_given_is_not_overruled(pico_model, asked, tmp_path, monkeypatch, given, not_added):
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    benchmark(pico_model, pico_model, out=tmp_path / "out", engine_options=given, **TINY)
    options = asked["servers"][0][1]
    assert options[: len(given)] == given
    assert not_added not in options[len(given) :]
    others = {"--no-enable-prefix-caching", "--kv-cache-memory-bytes", "--max-model-len"} - {not_added}
    assert others <= set(options)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_onnx_server_s_memory_is_that_of_its_process(device, pico_model, asked, tmp_path, monkeypatch):
    start = bench_server.running_server

    @contextmanager
    def running_server(directory, *, log, **given):
        with start(directory, log=log, **given) as url:
            with log.open("a") as lines:
                lines.write(f"INFO:     Started server process [{os.getpid()}]\n")
            yield url

    stand_in = SimpleNamespace(running_server=running_server, DEFAULT_MAX_NUM_SEQS=8)
    monkeypatch.setitem(sys.modules, "serving.server.onnx.server", stand_in)
    workloads = make_workloads(engine="onnx-server", input_len=20, output_len=10)
    sides = sides_of(pico_model, export_device=device)
    settings = BenchmarkSettings(engine="onnx-server", workloads=workloads, slo=Slo(ttft=500))
    session = bench_server.ServerSession(sides, settings, tmp_path)
    before = process_memory.peak_resident_bytes()
    try:
        session.measure(sides["pruned"], 0, workloads[0], name="pruned-0")
    finally:
        session.close()
    used = sides["pruned"].engine_report.get("peak_memory_bytes")
    assert used is None if device == "cuda" else before <= used <= process_memory.peak_resident_bytes()


def test_of_a_process_that_is_gone_no_memory_is_known():
    with subprocess.Popen(["true"]) as process:
        pass
    assert process_memory.peak_resident_bytes(process.pid) is None


def test_failed_requests_are_counted_and_nothing_is_compared(pico_model, asked, tmp_path):
    asked["failed"] = 1
    results = benchmark(pico_model, pico_model, out=tmp_path / "out", **TINY)
    (measurement,) = results["measurements"]
    assert measurement["failed_requests"] == {"original": 3, "pruned": 3}
    assert {metric["verdict"] for metric in measurement["metrics"].values()} == {None}
    assert asked["up"] == 0


def test_a_server_that_dies_is_started_again_and_its_requests_are_counted(pico_model, asked, tmp_path):
    asked["dead"] = [False, False, True]
    results = benchmark(pico_model, pico_model, out=tmp_path / "out", **TINY)
    (failure,) = results["failed_attempts"]
    assert (failure["side"], failure["repeat"], failure["failed"]) == ("pruned", 1, 4)
    assert "The end of the pruned server's log:" in failure["error"]
    assert "55,808 tokens" in failure["error"]
    assert len(asked["servers"]) == 7
    assert (tmp_path / "out" / "pruned-1-start2.log").is_file()


def test_a_benchmark_does_not_go_on_on_another_machine(pico_model, asked, tmp_path, monkeypatch):
    asked["dead"] = [False, True, True]
    with pytest.raises(SenteiError, match="failed twice"):
        benchmark(pico_model, pico_model, out=tmp_path / "out", **TINY)
    with monkeypatch.context() as context:
        context.setattr(benchmark_module, "machine", lambda: {"cpu": "another"})
        with pytest.raises(SenteiError, match=r"begun with another machine.cpu: .* then, 'another' now"):
            benchmark(pico_model, pico_model, out=tmp_path / "out", resume=True, **TINY)
    assert len(benchmark(pico_model, pico_model, out=tmp_path / "out", resume=True, **TINY)["failed_attempts"]) == 2


def test_the_log_of_the_server_that_died_is_quoted(pico_model, asked, tmp_path):
    asked["dead"] = [False] * 20 + [True]
    results = benchmark(pico_model, pico_model, out=tmp_path / "out", **{**TINY, "repeats": 11})
    (failure,) = results["failed_attempts"]
    said = failure["error"].partition("server's log:")[2]
    assert f"this is {failure['side']}-10.log" in said
    assert said.count("this is") == 1


def test_a_server_that_does_not_start_again_is_tried_once_more(pico_model, asked, tmp_path):
    asked["unready"] = [None, None, SenteiError("The vLLM server was not ready after 900 s.")]
    results = benchmark(pico_model, pico_model, out=tmp_path / "out", **TINY)
    (failure,) = results["failed_attempts"]
    assert (failure["side"], failure["repeat"]) == ("pruned", 1)
    assert "was not ready" in failure["error"]
    assert asked["start_timeouts"] == {900}


def test_a_first_start_that_ended_is_tried_once_more_and_one_that_was_refused_is_not(pico_model, asked, tmp_path):
    ended = ServerEndedError("The vLLM server ended with exit code 1 before it was ready.")
    asked["unready"] = [ended]
    results = benchmark(pico_model, pico_model, out=tmp_path / "out", start_timeout_s=60, **TINY)
    (failure,) = results["failed_attempts"]
    assert (failure["side"], failure["repeat"], len(asked["servers"])) == ("original", 0, 7)
    assert asked["start_timeouts"] == {60}
    asked["unready"] = [ended, ended]
    with pytest.raises(SenteiError, match=r"failed twice.*before it was ready"):
        benchmark(pico_model, pico_model, out=tmp_path / "twice", **TINY)
    assert len(asked["servers"]) == 9
    asked["unready"] = [
        SenteiError("The vLLM server ended with exit code 1 before it was ready: gate_proj is missing.")
    ]
    with pytest.raises(SenteiError, match="gate_proj") as told:
        benchmark(pico_model, pico_model, out=tmp_path / "refused", **TINY)
    assert not isinstance(told.value, EngineFailedError)
    assert len(asked["servers"]) == 10


def test_a_server_waits_for_the_memory_that_the_one_before_it_held(pico_model, asked, tmp_path, monkeypatch):
    looks_until_free, at_start, start = [0], [], bench_server.running_server

    def used_memory_bytes():
        looks_until_free[0] = max(0, looks_until_free[0] - 1)
        return [60 * 10**9 if looks_until_free[0] else 10**9]

    @contextmanager
    def running_server(*args, **kwargs):
        at_start.append(looks_until_free[0])
        with start(*args, **kwargs) as url:
            yield url
        looks_until_free[0] = 4

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr(gpu_watch, "used_memory_bytes", used_memory_bytes)
    monkeypatch.setattr(gpu_watch, "_FREED_POLL_S", 0.0)
    monkeypatch.setattr(bench_server, "running_server", running_server)
    benchmark(pico_model, pico_model, out=tmp_path / "out", dtype="bfloat16", **TINY)
    assert at_start == [0] * 6


def test_a_sweep_is_asked_of_both_with_a_warm_up_as_wide_as_the_widest_load(pico_model, asked, tmp_path):
    out = tmp_path / "out"
    results = benchmark(pico_model, pico_model, out=out, concurrency=[1, 6], request_rate=[0.5], **TINY)
    assert [each["workload"]["request_rate"] for each in results["measurements"]] == [None, None, 0.5]
    warmups = [options for _, options, name in asked["loads"] if "warmup" in name]
    assert [options[options.index("--num-prompts") + 1] for options in warmups] == ["20"] * 6
    poisson = {name: options for _, options, name in asked["loads"]}["pruned-2-load2.json"]
    assert poisson[poisson.index("--request-rate") + 1] == "0.5"
    assert "--max-concurrency" not in poisson


def test_the_highest_rate_that_meets_the_limits_is_found_for_each_model(pico_model, wide_model, asked, tmp_path):
    asked["limit"] = {str(wide_model): 3.0, str(pico_model): 9.0}
    results = benchmark(wide_model, pico_model, out=tmp_path / "out", slo=Slo(ttft=500, tpot=50), **TINY)
    metric = results["goodput"]["metrics"]["max_request_rate"]
    for side, limit in (("original", 3.0), ("pruned", 9.0)):
        assert limit / 2 ** (1 / 16) < metric[side]["median"] <= limit
    (kept,) = (tmp_path / "out" / "vllm").glob("original-0-slo-1-capacity.json")
    # What each of thousands of requests came to, a hundred times over, would fill the disk.
    assert not {"itls", "generated_texts", "start_times"} & json.loads(kept.read_text()).keys()
    assert metric["verdict"] == "better"
    searched = next(options for _, options, name in asked["loads"] if name.startswith("original-0-slo"))
    assert searched[searched.index("--goodput") + 1 :][:2] == ["ttft:500", "tpot:50"]
    assert results["goodput"]["slo_ms"] == {"ttft": 500, "tpot": 50}
    rows = list(csv.DictReader((tmp_path / "out" / "results.csv").open()))
    found = next(row for row in rows if row["metric"] == "max_request_rate")
    assert float(found["pruned"]) == metric["pruned"]["median"]
    assert (found["role"], found["verdict"]) == ("primary", "better")
    assert "| highest load with ttft 500 ms, tpot 50 ms | max_request_rate |" in (
        tmp_path / "out" / "results.md"
    ).read_text(encoding="utf-8")


def test_models_in_the_wrong_order_are_refused(pico_model, wide_model, asked, tmp_path):
    with pytest.raises(SenteiError, match="Are they swapped"):
        benchmark(pico_model, wide_model, out=tmp_path / "out", **TINY)
    assert not list(tmp_path.iterdir())


def test_limits_that_no_load_meets_give_no_ratio(pico_model, asked, tmp_path):
    asked["limit"] = {str(pico_model): 0.0}
    results = benchmark(pico_model, pico_model, out=tmp_path / "out", slo=Slo(e2el=1), **TINY)
    assert results["goodput"]["metrics"]["max_request_rate"]["gain"] is None
    assert results["goodput"]["runs"][0]["original"]["max_request_rate"] == 0
    searched = [name for _, _, name in asked["loads"] if name.startswith("original-0-slo")]
    assert searched == ["original-0-slo-0-alone.json", "original-0-slo-1-capacity.json"]
    render_report([tmp_path / "out"], tmp_path / "report.html")
    assert "Not even the lowest rate tried met them" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_no_two_loads_of_a_repeat_begin_with_the_same_prompts(pico_model, asked, tmp_path):
    """A running server may keep prefixes."""
    urls = ["http://127.0.0.1:8001", "http://127.0.0.1:8002"]
    asked["limit"] = {str(pico_model): 9.0}
    benchmark(pico_model, pico_model, out=tmp_path / "out", urls=urls, concurrency=[1, 4], slo=Slo(ttft=500), **TINY)
    seeds = {name.removesuffix(".json"): options[options.index("--seed") + 1] for _, options, name in asked["loads"]}
    assert len(set(seeds.values())) == len(seeds) / 2
    for name, seed in seeds.items():
        assert seeds[name.replace("original", "pruned")] == seed


def test_a_pause_between_arrivals_is_not_a_hung_server(pico_model, asked, tmp_path):
    benchmark(pico_model, pico_model, out=tmp_path / "out", request_rate=[0.01], concurrency=[1], **TINY)
    assert asked["patience"]["original-0-load0"] == 600
    assert asked["patience"]["original-0-load1"] == 600 + 20 * 100


def test_own_prompts_are_asked_as_they_stand(pico_model, asked, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "one two three", "output_tokens": 5}\n\n{"prompt": "four", "output_tokens": 9}\n')
    prompts = read_prompts(file, output_len=None, tokenizer=pico_model)
    results = benchmark(pico_model, pico_model, out=tmp_path / "out", prompts=prompts, repeats=3)
    _, options, _ = asked["loads"][1]
    assert options[options.index("--dataset-path") + 1].endswith("prompts.jsonl")
    assert {"--skip-chat-template", "--disable-shuffle"} <= set(options)
    assert (tmp_path / "out" / "prompts.jsonl").read_text().count("\n") == 2
    workload = results["measurements"][0]["workload"]
    assert (workload["output_len"], workload["num_prompts"]) == (7, 2)
    assert prompts.sha256 in workload["prompts"]


def test_the_first_prompts_are_a_sample_of_all(pico_model, asked, tmp_path):
    """A search for the highest rate asks a few of them in each probe, and a file may be sorted by length."""
    file = tmp_path / "prompts.jsonl"
    texts = [f"one {number}" for number in range(100)] + [f"two {number} " * 20 for number in range(100)]
    file.write_text("".join(json.dumps({"prompt": text, "output_tokens": 4}) + "\n" for text in texts))
    prompts = read_prompts(file, output_len=None, tokenizer=pico_model)
    asked["limit"] = {str(pico_model): 3.0}
    benchmark(pico_model, pico_model, out=tmp_path / "out", prompts=prompts, slo=Slo(ttft=500), repeats=3)
    lines = (tmp_path / "out" / "prompts.jsonl").read_text().splitlines()
    assert sorted(lines) == sorted(prompts.lines)
    first = [json.loads(line)["prompt"] for line in lines[:40]]
    assert 10 <= sum(text.startswith("one") for text in first) <= 30
    for side in ("original", "pruned"):
        measured = {name: options for _, options, name in asked["loads"] if name.startswith(f"{side}-0")}
        assert value_of("--num-prompts", measured[f"{side}-0.json"]) == "200"
        probes = [int(value_of("--num-prompts", options)) for name, options in measured.items() if "slo" in name]
        assert min(probes) < 100
    benchmark(pico_model, pico_model, out=tmp_path / "again", prompts=prompts, repeats=3)
    assert (tmp_path / "again" / "prompts.jsonl").read_text().splitlines() == lines


def test_prompts_need_what_their_reader_needs(pico_model, asked, tmp_path, monkeypatch):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "one", "output_tokens": 4}\n')
    prompts = read_prompts(file, output_len=None, tokenizer=pico_model)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *more: None if name == "pandas" else find_spec(name, *more)
    )
    with pytest.raises(MissingDependencyError, match=r"pandas is not installed.*sentei\[vllm\]"):
        benchmark(pico_model, pico_model, out=tmp_path / "out", prompts=prompts, repeats=3)
    assert not asked["servers"]
    benchmark(pico_model, pico_model, out=tmp_path / "out", **TINY)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 is not readable JSON"),
        ('{"prompt": "x"}', "output_tokens"),
        ('{"prompt": 3, "output_tokens": 1}', "a text"),
        ("", "holds no prompts"),
    ],
)
def test_bad_prompts_are_refused(pico_model, tmp_path, line, message):
    (tmp_path / "p.jsonl").write_text(line)
    with pytest.raises(SenteiError, match=message):
        read_prompts(tmp_path / "p.jsonl", output_len=None, tokenizer=pico_model)


def test_a_prompt_may_hold_a_line_separator(pico_model, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "one\u2028two", "output_tokens": 5}\r\n', encoding="utf-8")
    (line,) = read_prompts(tmp_path / "p.jsonl", output_len=None, tokenizer=pico_model).lines
    assert json.loads(line)["prompt"] == "one\u2028two"


def test_prompts_for_a_model_without_a_tokenizer_are_refused(tmp_path):
    make_pico(tmp_path / "model")
    (tmp_path / "p.jsonl").write_text('{"prompt": "one", "output_tokens": 5}')
    with pytest.raises(SenteiError, match="has no usable tokenizer"):
        read_prompts(tmp_path / "p.jsonl", output_len=None, tokenizer=tmp_path / "model")


def test_running_servers_are_measured_and_not_started(pico_model, asked, tmp_path):
    urls = ["http://127.0.0.1:8001/", "http://127.0.0.1:8002"]
    results = benchmark(pico_model, pico_model, out=tmp_path / "out", urls=urls, api_key="secret", **TINY)
    assert not asked["servers"]
    assert asked["keys"] == {("http://127.0.0.1:8001", "secret"), ("http://127.0.0.1:8002", "secret")}
    assert "secret" not in "".join(path.read_text() for path in (tmp_path / "out").rglob("*.json"))
    assert results["sizes"]["kv_cache_tokens"]["original"] is None
    with pytest.raises(SenteiError, match="one server for each model"):
        benchmark(pico_model, pico_model, out=tmp_path / "other", urls=urls[:1], **TINY)
    with pytest.raises(SenteiError, match="8002 is given for both"):
        benchmark(pico_model, pico_model, out=tmp_path / "other", urls=["http://x:8002", "http://x:8002/"], **TINY)
    with pytest.raises(SenteiError, match="localhost:1 is given for both"):
        benchmark(
            pico_model, pico_model, out=tmp_path / "other", urls=["http://localhost:1", "http://127.0.0.1:1"], **TINY
        )
    with pytest.raises(SenteiError, match=r"80a0 is not a URL"):
        benchmark(pico_model, None, out=tmp_path / "other", urls=["http://127.0.0.1:80a0"], **TINY)


def test_settings_that_would_not_be_recorded_or_not_be_heeded_are_refused(pico_model, asked, tmp_path):
    for options in (["--dtype=float16"], ["--dtype", "float16"]):
        with pytest.raises(SenteiError, match=r"--dtype would hide .* Use --dtype"):
            benchmark(pico_model, pico_model, out=tmp_path / "out", engine_options=options, **TINY)
    for engine in ("vllm", "vllm-offline", "onnx-server"):
        with pytest.raises(SenteiError, match=f"Engine {engine} takes no --device"):
            benchmark(pico_model, pico_model, engine=engine, out=tmp_path / "out", device="cpu", **TINY)
    assert not list(tmp_path.iterdir())


def test_one_running_server_is_measured_alone(pico_model, asked, tmp_path):
    with pytest.raises(SenteiError, match="nothing to compare with"):
        benchmark(pico_model, None, out=tmp_path / "out", **TINY)
    out, urls = tmp_path / "out", ["http://127.0.0.1:8001"]
    asked["limit"] = {str(pico_model): 3.0}
    results = benchmark(
        pico_model, None, out=out, urls=urls, concurrency=[1, 4], slo=Slo(ttft=500), price_per_hour=3.6, **TINY
    )
    metrics = results["measurements"][0]["metrics"]
    assert metrics["output_throughput"]["original"] == {"median": 100.0, "values": [100.0] * 3}
    assert {metric["gain"] for metric in metrics.values()} == {None}
    assert results["measurements"][0]["cost"]["per_million_output_tokens"]["original"] == pytest.approx(10.0)
    assert list(results["models"]) == ["original"]
    assert 2.5 < results["goodput"]["metrics"]["max_request_rate"]["original"]["median"] <= 3.0
    assert "| 100 |" in (out / "results.md").read_text()
    for name in ("report.html", "report.md"):
        render_report([out], tmp_path / name)
        assert "100 tokens/s" in (tmp_path / name).read_text(encoding="utf-8")
    again = tmp_path / "again"
    benchmark(pico_model, None, out=again, urls=urls, concurrency=[1, 4], **TINY)
    compared = compare_results(out, again)["loads"][0]["metrics"]["output_throughput"]
    assert (compared["original"]["verdict"], compared["pruned"]) == ("no difference shown", None)


def test_of_a_server_that_failed_requests_nothing_is_claimed(pico_model, asked, tmp_path):
    asked["failed"] = 3
    out, urls = tmp_path / "out", ["http://127.0.0.1:8001"]
    results = benchmark(pico_model, None, out=out, urls=urls, concurrency=[8], price_per_hour=3.6, **TINY)
    assert results["measurements"][0]["cost"] is None
    render_report([out], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert '<p class="figure">Not comparable</p>' in page
    assert "Requests failed; nothing is claimed of those that got through." in page
    assert '<p class="figure">100 tokens/s</p>' not in page


def test_onnx_servers_have_room_for_the_widest_load(pico_model, asked, tmp_path, monkeypatch):
    # The module stands in for itself: what it starts is what the fixture starts.
    stand_in = SimpleNamespace(running_server=bench_server.running_server, DEFAULT_MAX_NUM_SEQS=8)
    monkeypatch.setitem(sys.modules, "serving.server.onnx.server", stand_in)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    workloads = make_workloads(engine="onnx-server", input_len=20, output_len=10, concurrency=[1, 6])
    sides = sides_of(pico_model, max_len=256, export_device="cpu")
    settings = BenchmarkSettings(engine="onnx-server", workloads=workloads, engine_options=["--max-model-len=100"])
    session = bench_server.ServerSession(sides, settings, tmp_path)
    try:
        assert session.measure(sides["pruned"], 0, workloads[1], name="pruned-0")["completed"] == 24
    finally:
        session.close()
    options = ["--max-model-len=100", "--max-num-seqs", "6"]
    assert [each for _, each in asked["servers"]] == [options]
    assert sides["pruned"].engine_report["device"] == "cpu"
    settings = BenchmarkSettings(engine="onnx-server", workloads=workloads[:1], slo=Slo(ttft=500))
    session = bench_server.ServerSession(sides, settings, tmp_path)
    try:
        session.measure(sides["pruned"], 1, workloads[0], name="pruned-1")
    finally:
        session.close()
    queued = ["--max-num-queued-reqs", "100000"]  # whoever waits is not turned away
    assert asked["servers"][-1][1] == ["--max-num-seqs", "8", "--max-model-len", "46", *queued]


def test_onnx_servers_are_asked_for_no_more_than_one_rotary_table_holds(pico_model, tmp_path):
    """Phi-3's long factors begin at 32 tokens here: a server that were to take 46 would not start."""
    workloads = make_workloads(engine="onnx-server", input_len=20, output_len=10, concurrency=[1])
    sides = sides_of(pico_model, max_len=256, served_len=32, export_device="cpu")
    settings = BenchmarkSettings(engine="onnx-server", workloads=workloads)
    session = bench_server.ServerSession(sides, settings, tmp_path)
    try:
        options, _ = session._server(sides["pruned"])
    finally:
        session.close()
    assert options == ["--max-num-seqs", "1", "--max-model-len", "32"]


def test_of_layers_with_a_window_the_results_say_what_they_hold(asked, tmp_path):
    make_family_pico(tmp_path / "gemma", "gemma3_text", "alternating")
    results = benchmark(tmp_path / "gemma", tmp_path / "gemma", out=tmp_path / "out", **TINY)
    # Two of four layers slide over 6 tokens; keys and values of 2 heads of 16 numbers.
    assert results["models"]["pruned"]["window"] == {"tokens": 6, "kv_bytes_per_token": 2 * 2 * 2 * 16 * 4}
    assert results["sizes"]["kv_cache_tokens"]["pruned"] is None


def test_lengths_may_vary(pico_model, asked, tmp_path):
    lengths = {"input_len": 100, "output_len": 20, "range_ratio": 0.5}
    assert make_workloads(engine="vllm", **lengths)[0].longest == 180
    benchmark(pico_model, pico_model, out=tmp_path / "out", repeats=3, **lengths)
    for _, options, _ in asked["loads"]:
        assert options[options.index("--random-range-ratio") + 1] == "0.5"
    with pytest.raises(SenteiError, match="need a server"):
        make_workloads(engine="onnx", range_ratio=0.5)
    with pytest.raises(SenteiError, match="below 1"):
        make_workloads(engine="vllm", range_ratio=1.0)
    with pytest.raises(SenteiError, match="do not fit"):
        benchmark(pico_model, pico_model, out=tmp_path / "x", **(lengths | {"input_len": 200}))


def test_why_kernels_are_not_compiled_is_told_without_the_logs_own_marks():
    line = "(APIServer pid=4028) WARNING 11-25 13:33:01 [vllm.py:1703] Enforce eager set, disabling torch.compile."
    assert bench_server.engine_facts(f"INFO begins\n{line}\nINFO ends")["not_compiled"] == line.partition("] ")[2]
    assert bench_server.engine_facts("Falling back to eager")["not_compiled"] == "Falling back to eager"
    assert bench_server.engine_facts("INFO 11-25 [vllm.py:1] all is compiled")["not_compiled"] is None
