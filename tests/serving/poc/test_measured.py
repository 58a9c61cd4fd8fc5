"""What the files say becomes what is decided on: the metric that buys GPUs, and nothing that was not measured."""

import json

import pytest

from serving.benchmark.results_document import ResultsDocument
from serving.decision.capacity import capacity_rows
from serving.decision.document import CandidateRecord, CapacityInputs
from serving.forecast.model_facts import checkpoint_facts
from serving.poc.answers import Quality
from serving.poc.measured import gain_metric, original_record, with_speed
from tests.families import make_family_pico
from tests.serving.decision.making import ORIGINAL
from tests.serving.poc.world import WRITTEN

BLANK = CandidateRecord(name="25 %", kind="pruned", verified=True)


def results(name: str = "benchmark-vllm", **failed: int) -> ResultsDocument:
    content = json.loads((WRITTEN / name / "results.json").read_text(encoding="utf-8"))
    if failed:
        content["measurements"][0]["failed_requests"] |= failed
        content["measurements"][0]["metrics"]["output_throughput"]["gain"] = None
    return ResultsDocument.model_validate(content)


def test_with_limits_the_rate_within_them_decides_and_is_the_load():
    found = results()
    goodput = found.goodput.metrics.max_request_rate
    measured = with_speed(BLANK, found)
    assert gain_metric([found]) == "max_request_rate"
    assert measured.gain.value == goodput.gain.value != found.measurements[0].metrics["output_throughput"].gain.value
    assert measured.load.goodput
    values = goodput.pruned.values
    assert min(values) <= measured.load.requests_per_s.value <= max(values)


def test_what_vllm_needs_is_its_weights_and_the_kv_cache_of_the_load():
    found = results()
    load, sizes = found.measurements[0].workload, found.sizes
    tokens = load.concurrency * (load.input_len + load.output_len)
    expected = sizes["weight_bytes"].pruned + sizes["kv_bytes_per_token"].pruned * tokens
    measured = with_speed(BLANK, found)
    assert measured.memory_bytes == expected
    assert measured.kv_cache_tokens == sizes["kv_cache_tokens"].pruned


def test_without_limits_throughput_decides_and_memory_is_the_measured_peak():
    found = results("benchmark-onnx")
    measured = with_speed(BLANK, found)
    assert gain_metric([found]) == "output_throughput"
    assert measured.gain.value == found.measurements[0].metrics["output_throughput"].gain.value
    assert measured.memory_bytes == found.sizes["peak_memory_bytes"].pruned
    assert not measured.load.goodput


def test_where_requests_failed_there_is_no_gain_and_no_load():
    found = results("benchmark-onnx", pruned=3)
    measured = with_speed(BLANK, found)
    assert measured.gain is None and measured.load is None
    assert measured.not_measured == "3 requests failed."


def test_the_originals_load_is_that_of_all_benchmarks_together():
    found = results("benchmark-onnx")
    alone, both = (
        original_record(Quality(perplexity={}, questions=[]), [found] * count).load.requests_per_s for count in (1, 2)
    )
    assert both.value == pytest.approx(alone.value)
    assert both.high - both.low < alone.high - alone.low
    assert original_record(Quality(perplexity={}, questions=[]), []).load is None


def test_layers_with_a_window_hold_no_more_than_it_of_each_conversation(tmp_path):
    """By the facts of a Gemma 3: too few conversations, or too much memory, is what counting all tokens would say."""
    make_family_pico(tmp_path / "gemma", "gemma3_text", "alternating", max_position_embeddings=8192)
    facts = checkpoint_facts(tmp_path / "gemma", None)
    content = results().content()
    load = content["measurements"][0]["workload"]
    load |= {"input_len": 1000, "output_len": 96, "concurrency": 3}
    for side in ("original", "pruned"):
        content["models"][side]["window"] = {"tokens": 6, "kv_bytes_per_token": facts.kv_bytes_per_token // 2}
        content["sizes"]["kv_bytes_per_token"][side] = facts.kv_bytes_per_token
        content["sizes"]["weight_bytes"][side] = facts.weight_bytes
        content["sizes"]["kv_cache_tokens"][side] = None
    measured = with_speed(BLANK, ResultsDocument.model_validate(content))
    assert measured.memory_bytes == facts.weight_bytes + 3 * facts.kv_bytes(1096)
    inputs = CapacityInputs(conversation_tokens=5000, memory_gb=0.1)
    [_, row] = capacity_rows(ORIGINAL, [measured], inputs, output_len=96)
    assert row.conversations == (10**8 - facts.weight_bytes) // facts.kv_bytes(5000)
    assert facts.kv_bytes(5000) < 0.6 * 5000 * facts.kv_bytes_per_token
