import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.benchmark.statistics import (
    RequestTimes,
    check_primary,
    compare,
    percentile,
    ratio_interval,
    request_metrics,
)
from toolchain.errors import SenteiError


def test_metrics_of_hand_written_timestamps():
    requests = [
        RequestTimes(start_s=10.0, token_times_s=(10.5, 10.6, 10.8)),
        RequestTimes(start_s=10.0, token_times_s=(11.0, 11.5, 12.0)),
    ]
    assert request_metrics(requests, input_len=7) == pytest.approx(
        {
            "output_throughput": 6 / 2.0,
            "total_token_throughput": (6 + 14) / 2.0,
            "request_throughput": 2 / 2.0,
            "mean_ttft_ms": (500 + 1000) / 2,
            "mean_tpot_ms": (300 / 2 + 1000 / 2) / 2,
            "mean_itl_ms": (100 + 200 + 500 + 500) / 4,
            "p99_itl_ms": 500.0,
            "mean_e2el_ms": (800 + 2000) / 2,
        }
    )


def test_one_output_token_has_no_gaps():
    metrics = request_metrics([RequestTimes(start_s=0.0, token_times_s=(2.0,))], input_len=10)
    assert (metrics["mean_tpot_ms"], metrics["mean_itl_ms"], metrics["p99_itl_ms"]) == (None, None, None)
    assert metrics["mean_ttft_ms"] == metrics["mean_e2el_ms"] == 2000
    assert metrics["output_throughput"] == 0.5


@pytest.mark.parametrize("percent", [0, 37, 50, 99, 100])
def test_percentile_is_numpys(percent):
    values = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0]
    assert percentile(values, percent) == pytest.approx(np.percentile(values, percent))


def test_interval_against_a_textbook_t_table():
    # ln ratios 0.1, 0.2, 0.3: mean 0.2, standard error 0.1 / sqrt(3), t(0.975, 2) = 4.30265
    interval = ratio_interval([1.0, 1.0, 1.0], [math.exp(0.1), math.exp(0.2), math.exp(0.3)])
    margin = 4.30265 * 0.1 / math.sqrt(3)
    assert interval["value"] == pytest.approx(math.exp(0.2))
    assert interval["low"] == pytest.approx(math.exp(0.2 - margin), rel=1e-5)
    assert interval["high"] == pytest.approx(math.exp(0.2 + margin), rel=1e-5)


def test_interval_pairs_the_repeats():
    drifting = [1.0, 2.0, 4.0]
    interval = ratio_interval(drifting, [2 * value for value in drifting])
    assert (interval["low"], interval["high"]) == pytest.approx((2.0, 2.0))


def test_nineteen_of_twenty_intervals_hold_the_truth():
    # Models that differ by 10 %, repeats with 3 % noise of their own and 20 % that both share.
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        shared = generator.normal(0, 0.2, 5)
        original, pruned = (100 * np.exp(shared + generator.normal(0, 0.03, 5)) for _ in range(2))
        interval = ratio_interval(list(original), list(1.1 * pruned))
        held += interval["low"] <= 1.1 <= interval["high"]
    assert held / 2000 == pytest.approx(0.95, abs=0.015)


def _runs(original, pruned, metric):
    return [{"original": {metric: a}, "pruned": {metric: b}} for a, b in zip(original, pruned, strict=True)]


def test_gain_is_above_one_where_the_pruned_model_is_better():
    faster = compare(_runs([100, 101, 99], [80, 81, 79], "mean_tpot_ms"))["mean_tpot_ms"]
    assert faster["verdict"] == "better"
    assert faster["ratio"]["value"] == pytest.approx(0.8, rel=1e-3)
    assert faster["gain"]["value"] == pytest.approx(1.25, rel=1e-3)
    assert faster["gain"]["low"] == pytest.approx(1 / faster["ratio"]["high"])
    more = compare(_runs([100, 101, 99], [125, 126, 124], "output_throughput"))["output_throughput"]
    assert more["verdict"] == "better"
    assert more["gain"] == more["ratio"]
    assert more["original"] == {"median": 100, "values": [100, 101, 99]}


def test_verdicts():
    assert (
        compare(_runs([10, 11, 12], [12, 10, 11], "mean_ttft_ms"))["mean_ttft_ms"]["verdict"] == "no difference shown"
    )
    assert compare(_runs([10, 10, 10], [12, 12.1, 12], "mean_ttft_ms"))["mean_ttft_ms"]["verdict"] == "worse"
    undefined = compare(_runs([None] * 3, [None] * 3, "mean_tpot_ms"))["mean_tpot_ms"]
    assert (undefined["ratio"], undefined["gain"], undefined["verdict"]) == (None, None, None)


def test_one_metric_decides_and_the_others_are_exploratory():
    metrics = compare(_runs([10, 11, 12], [12, 10, 11], "mean_ttft_ms"), primary="mean_ttft_ms")
    assert [name for name, metric in metrics.items() if metric["role"] == "primary"] == ["mean_ttft_ms"]
    assert {metric["role"] for name, metric in metrics.items() if name != "mean_ttft_ms"} == {"exploratory"}


@pytest.mark.parametrize(
    ("primary", "output_len", "message"), [("speed", 8, "not known"), ("mean_tpot_ms", 1, "one token")]
)
def test_a_primary_metric_that_cannot_decide_is_refused(primary, output_len, message):
    with pytest.raises(SenteiError, match=message):
        check_primary(primary, output_len=output_len)
    check_primary("mean_tpot_ms", output_len=2)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(*[st.floats(0.1, 1e4)] * 2), min_size=3, max_size=8), st.floats(0.2, 5))
def test_the_interval_holds_the_ratio_and_turns_with_it(pairs, factor):
    original, pruned = map(list, zip(*pairs, strict=True))
    one, other = ratio_interval(original, pruned), ratio_interval(pruned, original)
    assert one["low"] <= one["value"] * (1 + 1e-9)
    assert one["value"] <= one["high"] * (1 + 1e-9)
    assert other["low"] == pytest.approx(1 / one["high"], rel=1e-6)
    slowed = ratio_interval(original, [value * factor for value in pruned])
    assert slowed["value"] == pytest.approx(one["value"] * factor, rel=1e-6)
