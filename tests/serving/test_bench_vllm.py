"""What the benchmark asks of vLLM and takes from it, with a stand-in for the servers; fields as in vLLM 0.32."""

import sys
from contextlib import contextmanager
from types import ModuleType

import pytest

from serving.benchmark import benchmark
from toolchain.errors import SenteiError

TINY = {"input_len": 8, "output_len": 4, "repeats": 3, "engine": "vllm"}


@pytest.fixture
def asked(monkeypatch):
    """Records what is asked; ``failed`` requests can be set on it."""
    record = {"servers": [], "loads": [], "failed": 0, "up": 0}

    @contextmanager
    def running_server(directory, port=None, options=(), log=None):
        record["servers"].append((directory, list(options)))
        record["up"] += 1
        log.write_text("INFO GPU KV cache size: 55,808 tokens\nINFO Model loading took 0.25 GiB memory\n")
        try:
            yield "http://127.0.0.1:1"
        finally:
            record["up"] -= 1

    def bench_serve(base_url, model_dir, options=(), result_file=None):
        record["loads"].append((model_dir, list(options), result_file.name))
        num_prompts = int(options[options.index("--num-prompts") + 1])
        result = {f"{kind}_{name}_ms": 5.0 for kind in ("mean", "p99") for name in ("ttft", "tpot", "itl", "e2el")}
        result |= {"completed": num_prompts - record["failed"], "failed": record["failed"]}
        result |= {"output_throughput": 100.0, "total_token_throughput": 300.0, "request_throughput": 25.0}
        result_file.write_text("{}")
        return result

    fake = ModuleType("serving.vllm_server")
    fake.running_server, fake.bench_serve = running_server, bench_serve
    monkeypatch.setitem(sys.modules, "serving.vllm_server", fake)
    monkeypatch.delitem(sys.modules, "serving.bench_vllm", raising=False)
    yield record
    sys.modules.pop("serving.bench_vllm", None)


def test_both_servers_stay_up_and_get_the_same_load(pico_model, asked, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    results = benchmark(pico_model, pico_model, out=tmp_path / "out", concurrency=2, **TINY)
    options = ["--dtype", "float32", "--no-enable-prefix-caching", "--kv-cache-memory-bytes", "1G"]
    assert asked["servers"] == [(pico_model, options), (pico_model, options)]
    assert asked["up"] == 0
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
    assert results["sizes"]["peak_memory_bytes"]["original"] is None
    assert len(list((tmp_path / "out" / "vllm").iterdir())) == 6


def test_on_a_gpu_each_measurement_has_its_server(pico_model, asked, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    benchmark(
        pico_model, pico_model, out=tmp_path / "out", dtype="bfloat16", engine_options=["--enforce-eager"], **TINY
    )
    assert len(asked["servers"]) == 6
    assert asked["servers"][0][1] == ["--enforce-eager", "--dtype", "bfloat16", "--no-enable-prefix-caching"]


def test_failed_requests_are_not_averaged_away(pico_model, asked, tmp_path, monkeypatch):
    asked["failed"] = 1
    with pytest.raises(SenteiError, match="1 of 4 requests to the original model failed"):
        benchmark(pico_model, pico_model, out=tmp_path / "out", **TINY)
    assert asked["up"] == 0
    assert not list(tmp_path.iterdir())
