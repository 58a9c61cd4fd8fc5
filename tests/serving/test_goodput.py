import math

import pytest

from serving.goodput import Probe, find_highest_rate

STEP = 2 ** (1 / 16)


def server(*, limit, sustained=math.inf):
    """A server whose requests meet every objective up to ``limit``, and that answers ``sustained`` a second at most."""

    def probe(rate):
        met = 1.0 if rate <= limit else 0.5
        return Probe(met=met, request_goodput=met * rate, request_throughput=min(rate, sustained))

    return probe


@pytest.mark.parametrize("limit", [0.9, 7.0, 10.0, 11.0, 300.0])
def test_the_limit_is_found_from_below_and_from_above(limit):
    found = find_highest_rate(10.0, server(limit=limit))
    assert limit / STEP < found["max_request_rate"] <= limit
    assert found["request_goodput"] == found["max_request_rate"]


def test_a_start_far_below_what_a_batch_can_do_is_left_behind():
    # 20 requests at once do not fill a large accelerator: their rate is no bound.
    found = find_highest_rate(1.0, server(limit=100.0))
    assert found["max_request_rate"] > 90


def test_wide_limits_do_not_make_a_server_faster():
    found = find_highest_rate(10.0, server(limit=math.inf, sustained=12.0))
    assert found["max_request_rate"] <= 24.0


def test_nothing_that_meets_them_is_nought():
    found = find_highest_rate(10.0, server(limit=0.01))
    assert (found["max_request_rate"], found["request_goodput"], len(found["tried"])) == (0.0, 0.0, 8)
