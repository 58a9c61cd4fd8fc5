"""What the files say becomes what is decided on: the metric that buys GPUs, and nothing that was not measured."""

import json

import pytest

from serving.benchmark.results_document import ResultsDocument
from serving.decision.document import CandidateRecord
from serving.poc.answers import Quality
from serving.poc.measured import gain_metric, original_record, with_speed
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
