import pytest

from serving.benchmark.ratios import compare_repeats


def _runs(original, pruned, metric):
    return [{"original": {metric: a}, "pruned": {metric: b}} for a, b in zip(original, pruned, strict=True)]


def test_gain_is_above_one_where_the_pruned_model_is_better():
    faster = compare_repeats(_runs([100, 101, 99], [80, 81, 79], "mean_tpot_ms"))["mean_tpot_ms"]
    assert faster["verdict"] == "better"
    assert faster["ratio"]["value"] == pytest.approx(0.8, rel=1e-3)
    assert faster["gain"]["value"] == pytest.approx(1.25, rel=1e-3)
    assert faster["gain"]["low"] == pytest.approx(1 / faster["ratio"]["high"])
    more = compare_repeats(_runs([100, 101, 99], [125, 126, 124], "output_throughput"))["output_throughput"]
    assert more["verdict"] == "better"
    assert more["gain"] == more["ratio"]
    assert more["original"] == {"median": 100, "values": [100, 101, 99]}


def test_verdicts():
    assert (
        compare_repeats(_runs([10, 11, 12], [12, 10, 11], "mean_ttft_ms"))["mean_ttft_ms"]["verdict"]
        == "no difference shown"
    )
    assert compare_repeats(_runs([10, 10, 10], [12, 12.1, 12], "mean_ttft_ms"))["mean_ttft_ms"]["verdict"] == "worse"
    undefined = compare_repeats(_runs([None] * 3, [None] * 3, "mean_tpot_ms"))["mean_tpot_ms"]
    assert (undefined["ratio"], undefined["gain"], undefined["verdict"]) == (None, None, None)


def test_one_metric_decides_and_the_others_are_exploratory():
    metrics = compare_repeats(_runs([10, 11, 12], [12, 10, 11], "mean_ttft_ms"), primary="mean_ttft_ms")
    assert [name for name, metric in metrics.items() if metric["role"] == "primary"] == ["mean_ttft_ms"]
    assert {metric["role"] for name, metric in metrics.items() if name != "mean_ttft_ms"} == {"exploratory"}
