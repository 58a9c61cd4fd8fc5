"""Results of other people's tools beside sentei's and each other's; fields as their sources write them."""

import json

import pytest

from serving.benchmark.comparison.tools import compare_files
from tests.command_line import refused, sentei
from tests.serving.report.test_render import write_results
from toolchain.errors import SenteiError


def vllm_file(path, **changes):
    """As vLLM 0.32 writes with ``--save-result`` (vllm/benchmarks/serve.py), but for percentiles."""
    content = {
        "date": "20261129-200000", "endpoint_type": "openai", "backend": "openai", "label": None, "model_id": "m",
        "tokenizer_id": "m", "num_prompts": 4, "request_rate": "inf", "burstiness": 1.0, "max_concurrency": 1,
        "duration": 1.0, "completed": 4, "failed": 0, "total_input_tokens": 256, "total_output_tokens": 32,
        "request_throughput": 4.0, "request_goodput": None, "output_throughput": 120.0,
        "total_token_throughput": 1000.0, "mean_ttft_ms": 20.0, "median_ttft_ms": 20.0, "mean_tpot_ms": 30.0,
        "mean_itl_ms": 30.0, "p99_itl_ms": 40.0, "mean_e2el_ms": 230.0,
    } | changes  # fmt: skip
    path.write_text(json.dumps(content))
    return path


def guidellm_file(path, *, spread=0.0, strategy=None, **metrics):
    """Report version 2 of guidellm 0.8.1 (guidellm/benchmark/schemas), with what is read of it and a little more."""

    def summary(mean, std_dev=0.0):
        return {"successful": {"mean": mean, "median": mean, "std_dev": std_dev, "count": 4}, "errored": {}}

    found = {
        "request_totals": {"successful": 4, "incomplete": 0, "errored": 0, "total": 4},
        "prompt_token_count": summary(64.0), "output_token_count": summary(8.0, spread),
        "request_latency": summary(0.25), "time_to_first_token_ms": summary(25.0),
        "inter_token_latency_ms": summary(33.0), "time_per_output_token_ms": summary(31.0),
        "output_tokens_per_second": summary(99.0),
    } | metrics  # fmt: skip
    benchmark = {
        "type_": "generative_benchmark",
        "config": {"strategy": strategy or {"type_": "concurrent", "streams": 1}},
        "metrics": found,
    }
    report = {"metadata": {"version": 2, "guidellm_version": "0.8.1"}, "config": {"backend": {"model": "m"}}}
    path.write_text(json.dumps({**report, "benchmarks": [benchmark]}))
    return path


def aiperf_file(path, *, phase=None, **changes):
    """``profile_export_aiperf.json`` of schema 1.4 (aiperf/common/models/export_models.py)."""

    def average(unit, avg):
        return {"unit": unit, "avg": avg, "p50": avg}

    content = {
        "schema_version": "1.4", "aiperf_version": "0.13.0",
        "input_config": {"models": {"items": [{"name": "m"}]}, "phases": [
            {"name": "warmup", "kind": "warmup", "type": "concurrency", "concurrency": 1},
            phase or {"name": "profiling", "kind": "profiling", "type": "concurrency", "concurrency": 1},
        ]},
        "request_count": average("requests", 4.0), "request_throughput": average("requests/sec", 4.4),
        "output_token_throughput": average("tokens/sec", 132.0), "request_latency": average("ms", 210.0),
        "time_to_first_token": average("ms", 18.0), "inter_token_latency": average("ms", 27.0),
        "input_sequence_length": average("tokens", 64.0), "output_sequence_length": average("tokens", 8.0),
    } | changes  # fmt: skip
    path.write_text(json.dumps(content))
    return path


WRITERS = {"vllm": vllm_file, "guidellm": guidellm_file, "aiperf": aiperf_file}


@pytest.fixture
def own(tmp_path):
    """64 tokens in, 8 out, one at a time; every metric of the original is about 101."""
    write_results(tmp_path / "own", gains=[1.2, 1.22, 1.21], engine="vllm")
    return tmp_path / "own"


@pytest.mark.parametrize("tool", WRITERS)
def test_another_tools_file_is_set_beside_both_models_and_no_verdict_is_given(own, tmp_path, tool):
    result = compare_files(own, WRITERS[tool](tmp_path / "theirs.json"))
    assert [pair["a"]["model"].split()[0] for pair in result["pairs"]] == ["original", "pruned"]
    ttft = result["pairs"][0]["metrics"]["mean_ttft_ms"]
    assert ttft["b"] == {"vllm": 20.0, "guidellm": 25.0, "aiperf": 18.0}[tool]
    # One run says nothing of chance.
    assert {each["verdict"] for pair in result["pairs"] for each in pair["metrics"].values()} == {None}
    assert "single run has no interval" in result["note"]


def test_the_same_word_for_another_thing_is_not_compared(tmp_path):
    result = compare_files(vllm_file(tmp_path / "v.json"), guidellm_file(tmp_path / "g.json"))
    (pair,) = result["pairs"]
    # guidellm's inter_token_latency_ms is TPOT here, and its time_per_output_token_ms is nothing here.
    assert (pair["metrics"]["mean_tpot_ms"]["a"], pair["metrics"]["mean_tpot_ms"]["b"]) == (30.0, 33.0)
    assert pair["metrics"]["mean_e2el_ms"]["b"] == 250.0
    assert not {"output_throughput", "mean_itl_ms"} & pair["metrics"].keys()
    why = dict(result["not_compared"])
    assert "first included" in why["guidellm: time_per_output_token_ms"]
    assert "window" in why["guidellm: output_tokens_per_second"]
    assert "guidellm does not have it" in why["output_throughput"]


def test_answers_of_unlike_lengths_leave_guidellms_mean_out(tmp_path):
    result = compare_files(vllm_file(tmp_path / "v.json"), guidellm_file(tmp_path / "g.json", spread=2.0))
    assert "mean_tpot_ms" not in result["pairs"][0]["metrics"]
    assert "weighs long ones more" in dict(result["not_compared"])["guidellm: inter_token_latency_ms"]


@pytest.mark.parametrize(
    "theirs, message",
    [
        (lambda path: vllm_file(path, total_output_tokens=64), "8 tokens out in A and 16 in B"),
        (lambda path: vllm_file(path, max_concurrency=4), "1 requests at a time in A and 4 in B"),
        (lambda path: vllm_file(path, max_concurrency=None), "'closed' in A and 'at once' in B"),
        (lambda path: guidellm_file(path, strategy={"type_": "constant", "rate": 2.0}), "'closed' in A and 'constant'"),
        (lambda path: aiperf_file(path, phase={"type": "poisson", "rate": 2.0}), "'closed' in A and 'poisson' in B"),
    ],
)
def test_unlike_loads_are_not_compared_and_why_is_said(tmp_path, theirs, message):
    with pytest.raises(SenteiError, match=message):
        compare_files(vllm_file(tmp_path / "a.json"), theirs(tmp_path / "b.json"))


def test_requests_that_failed_void_a_comparison(tmp_path):
    (pair,) = compare_files(vllm_file(tmp_path / "a.json"), vllm_file(tmp_path / "b.json", completed=3,
                            total_input_tokens=192, total_output_tokens=24))["pairs"]  # fmt: skip
    assert (pair["metrics"], pair["failed_requests"]) == ({}, {"a": 0, "b": 1})


@pytest.mark.parametrize(
    "write, message",
    [
        (lambda path: path.write_text('{"a": 1}'), "not a benchmark that is known here"),
        (lambda path: vllm_file(path, mean_ttft_ms="fast"), "mean_ttft_ms"),
        (lambda path: vllm_file(path, completed=0), "no request was answered"),
        (lambda path: aiperf_file(path, is_complete=False), "was not finished"),
        (lambda path: aiperf_file(path, request_latency={"unit": "sec", "avg": 1.0}), "request_latency is in 'sec'"),
        (lambda path: guidellm_file(path, request_latency={}), "request_latency"),
    ],
)
def test_files_that_are_none_are_one_sentence(tmp_path, write, message):
    write(tmp_path / "b.json")
    with pytest.raises(SenteiError, match=message):
        compare_files(vllm_file(tmp_path / "a.json"), tmp_path / "b.json")


def test_the_command(own, tmp_path):
    done = sentei("compare", own, aiperf_file(tmp_path / "theirs.json"))
    assert done.returncode == 0, done.stderr
    assert "B: aiperf, m: 64 tokens in, 8 out, 1 at a time" in done.stdout
    (tmp_path / "bad.json").write_text("{}")
    refused(sentei("compare", own, tmp_path / "bad.json"), "not a benchmark that is known here")
