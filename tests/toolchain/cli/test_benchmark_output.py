"""What ``sentei benchmark`` prints of its results."""

from pathlib import Path

import pytest
from rich.console import Console

from serving.benchmark.goodput import GOODPUT_METRICS
from serving.benchmark.metrics import METRICS
from serving.benchmark.ratios import compare_repeats
from tests.command_line import sentei
from toolchain.cli.commands.benchmark import show_results


def printed(rates=None, *, failed=0, sides=("original", "pruned")):
    """The output for metrics of 100 each, and for what highest rates each side found."""
    runs = [{side: {metric.name: 100.0 for metric in METRICS} for side in sides} for _ in range(3)]
    load = {"input_len": 8, "output_len": 4, "concurrency": 1, "request_rate": None}
    measurement = {
        "workload": load,
        "metrics": compare_repeats(runs),
        "failed_requests": {"original": failed},
        "cost": None,
    }
    goodput = None
    if rates:
        found = [dict(zip(sides, pair, strict=True)) for pair in zip(*rates, strict=True)]
        searches = [
            {side: {"max_request_rate": rate, "request_goodput": rate} for side, rate in each.items()} for each in found
        ]
        metrics = compare_repeats(searches, primary="max_request_rate", metrics=GOODPUT_METRICS)
        goodput = {"slo_ms": {"ttft": 500.0}, "attainment": 0.9, "metrics": metrics}
    console = Console(width=200)
    with console.capture() as captured:
        show_results(console, Path("out"), {"engine": "vllm", "measurements": [measurement], "goodput": goodput})
    return captured.get()


def test_a_rate_that_was_not_found_is_said():
    text = printed([[2.0, 2.0, 2.0], [0.0, 3.0, 0.0]])
    assert "Highest load at which 90% of requests meet ttft 500 ms:\n  original: 2 requests/s\n" in text
    assert "  pruned: not met in 2 of 3 repeats\n" in text


def test_of_one_server_too():
    assert "original: not met in 3 of 3 repeats" in printed([[0.0, 0.0, 0.0]], sides=("original",))


def test_rates_that_were_found_are_compared():
    text = printed([[2.0, 2.0, 2.0], [3.0, 3.0, 3.0]])
    assert "1.50x" in text
    assert "not met" not in text


@pytest.mark.parametrize("command", ["benchmark", "estimate"])
def test_speed_is_of_the_checkpoints_own_dtype_and_the_help_says_so(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    said = sentei(command, "--help").stdout
    assert "auto (the checkpoint's own)" in said
    assert "float32 on a CPU" not in said


@pytest.mark.parametrize("sides", [("original",), ("original", "pruned")])
def test_where_requests_failed_no_figure_is_printed(sides):
    text = printed(failed=3, sides=sides)
    assert "original: 3 requests failed, so nothing is claimed." in text
    assert "output_throughput" not in text
    assert "output_throughput" in printed(sides=sides)
