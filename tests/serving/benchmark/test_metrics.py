import numpy as np
import pytest

from serving.benchmark.metrics import RequestTimes, check_primary, percentile, request_metrics
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


@pytest.mark.parametrize(
    ("primary", "output_len", "message"), [("speed", 8, "not known"), ("mean_tpot_ms", 1, "one token")]
)
def test_a_primary_metric_that_cannot_decide_is_refused(primary, output_len, message):
    with pytest.raises(SenteiError, match=message):
        check_primary(primary, output_len=output_len)
    check_primary("mean_tpot_ms", output_len=2)
