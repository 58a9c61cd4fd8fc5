"""Numbers of the ONNX server: what was asked is what is counted, and vLLM would call it the same."""

import importlib.util
import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from prometheus_client.parser import text_string_to_metric_families

from serving.server.onnx.api import OnnxApi, ServerLimits
from tests.accidents.processes import wait_for
from tests.serving.server.in_process import Gate, Served, serving, write_pico_onnx

MAX_MODEL_LEN = 256


@pytest.fixture(scope="module")
def served(pico_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    export = write_pico_onnx(pico_model, tmp_path_factory.mktemp("onnx"), context=MAX_MODEL_LEN)
    limits = ServerLimits(max_num_seqs=2, max_model_len=MAX_MODEL_LEN)
    with serving(OnnxApi(export, limits, names=["small"])) as running:
        yield running


def test_what_was_asked_is_counted(served: Served):
    before = served.numbers()
    started = time.monotonic()
    assert served.complete(prompt=[7] * 10, max_tokens=5).status == 200
    assert served.complete(prompt=[7] * 20, max_tokens=1, stream=True).status == 200
    took = time.monotonic() - started
    assert served.complete(prompt=[]).status == 400
    now = served.numbers()
    gained = {name: now[name] - before.get(name, 0) for name in now}
    assert gained["vllm:prompt_tokens_total"] == 30
    assert gained["vllm:generation_tokens_total"] == 6
    assert gained["vllm:time_to_first_token_seconds_count"] == 2
    assert gained["vllm:inter_token_latency_seconds_count"] == 4
    assert gained["vllm:e2e_request_latency_seconds_count"] == 2
    assert gained["vllm:request_success_total:length"] == 2
    assert gained["vllm:request_prompt_tokens_sum"] == 30
    assert gained["vllm:request_generation_tokens_sum"] == 6
    assert gained["vllm:request_params_max_tokens_sum"] == 6
    assert 0 < gained["vllm:time_to_first_token_seconds_sum"] < gained["vllm:e2e_request_latency_seconds_sum"] < took
    assert gained["http_requests_total"] == 4  # with the metrics themselves
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert now[f"vllm:{name}"] == 0


def test_who_runs_and_who_waits(served: Served, monkeypatch: pytest.MonkeyPatch):
    gate = Gate(served.api)
    monkeypatch.setattr(served.api._engine, "step", gate)
    with gate.closed():
        _, threads = served.in_background(max_tokens=60)
        wait_for(lambda: served.numbers()["vllm:num_requests_running"] == 1, 10)
        _, more = served.in_background(2)
        wait_for(lambda: served.numbers()["vllm:num_requests_waiting"] == 2, 10)
        assert served.numbers()["vllm:kv_cache_usage_perc"] == 64 / (2 * MAX_MODEL_LEN)  # 63 tokens, in blocks of 32
    for thread in (*threads, *more):
        thread.join(30)


def test_what_fails_and_who_hangs_up_is_counted(served: Served, monkeypatch: pytest.MonkeyPatch):
    before = served.numbers()
    gate = Gate(served.api)
    monkeypatch.setattr(served.api._engine, "step", gate)
    with gate.closed(), pytest.raises(TimeoutError):
        served.ask("/v1/completions", {"prompt": [5], "max_tokens": 60, "stream": True}, timeout_s=0.3)
    wait_for(
        lambda: served.numbers()["vllm:request_success_total:abort"] > before["vllm:request_success_total:abort"], 10
    )
    monkeypatch.setattr(served.api._engine, "step", lambda *_: 1 / 0)
    assert served.complete().status == 500
    now = served.numbers()
    assert now["vllm:request_success_total:error"] == before["vllm:request_success_total:error"] + 1
    assert now["vllm:e2e_request_latency_seconds_count"] == before["vllm:e2e_request_latency_seconds_count"]


def test_strangers_make_no_labels(served: Served):
    for number in range(50):
        served.ask(f"/no/such/place/{number}")
    text = served.ask("/metrics").content
    assert "/no/such/place" not in text
    assert 'http_requests_total{handler="none",method="GET",status="4xx"} 50.0' in text


def vllm_module(name: str) -> Path:
    package = importlib.util.find_spec("vllm")
    if package is None or not package.submodule_search_locations:
        pytest.skip("vLLM is not installed")
    return Path(package.submodule_search_locations[0], *name.split(".")).with_suffix(".py")


def test_vllm_would_call_it_the_same(served: Served):
    """Names, labels and buckets, as the vLLM that is installed writes them."""
    source = vllm_module("v1.metrics.loggers").read_text()
    assert 'labelnames = ["model_name", "engine"]' in source
    buckets = ModuleType("buckets")
    exec(vllm_module("v1.metrics.buckets").read_text(), buckets.__dict__)  # without all that vLLM imports
    served.complete()
    families = list(text_string_to_metric_families(served.ask("/metrics").content))
    ours = [each for each in families if each.name.startswith("vllm:") and not each.name.endswith("_created")]
    assert len(ours) > 15
    for family in ours:
        theirs = re.search(rf'(\w+)_cls\(\s*name="{family.name}",.*?\n        \)', source, re.DOTALL)
        assert theirs, f"vLLM has no {family.name}"
        assert theirs[1].strip("_") == family.type
        labels = {name for sample in family.samples for name in sample.labels} - {"le"}
        if family.name == "vllm:admission_rejections":
            assert labels == {"model_name", "reason"}
            continue
        assert labels - {"finished_reason"} == {"model_name", "engine"}
        assert ("finished_reason" in labels) == ("finished_reason" in theirs[0])
        if family.type == "histogram":
            kind = re.search(r"buckets=(\w+)_buckets", theirs[0])
            assert kind
            expected = buckets.histogram_buckets(kind[1], max_model_len=MAX_MODEL_LEN)  # type: ignore[attr-defined]
            found = [float(sample.labels["le"]) for sample in family.samples if "le" in sample.labels]
            assert found == [*expected, float("inf")], family.name
