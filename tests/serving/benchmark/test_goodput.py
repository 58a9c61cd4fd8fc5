import math

import pytest

from serving.benchmark.goodput import Probe, find_highest_rate

STEP = 2 ** (1 / 16)
ALONE = Probe(met=1.0, request_goodput=0.5, request_throughput=0.5)


def server(*, limit, sustained=math.inf):
    """A server whose requests meet every objective up to ``limit``, and that answers ``sustained`` a second at most."""

    def probe(rate):
        met = 1.0 if rate <= limit else 0.5
        return Probe(met=met, request_goodput=met * rate, request_throughput=min(rate, sustained))

    return probe


@pytest.mark.parametrize("limit", [0.9, 7.0, 10.0, 11.0, 300.0])
def test_the_limit_is_found_from_below_and_from_above(limit):
    found = find_highest_rate(10.0, server(limit=limit), alone=ALONE)
    assert limit / STEP < found["max_request_rate"] <= limit
    assert found["request_goodput"] == found["max_request_rate"]


def test_a_start_far_below_what_a_batch_can_do_is_left_behind():
    # 20 requests at once do not fill a large accelerator: their rate is no bound.
    found = find_highest_rate(1.0, server(limit=100.0), alone=ALONE)
    assert found["max_request_rate"] > 90


def test_wide_limits_do_not_make_a_server_faster():
    found = find_highest_rate(10.0, server(limit=math.inf, sustained=12.0), alone=ALONE)
    assert found["max_request_rate"] <= 24.0


def test_nothing_that_meets_them_is_nought():
    found = find_highest_rate(10.0, server(limit=0.01), alone=ALONE)
    assert (found["max_request_rate"], found["request_goodput"], len(found["tried"])) == (0.0, 0.0, 8)


def test_limits_that_requests_miss_one_at_a_time_are_not_searched_for():
    alone = Probe(met=0.85, request_goodput=0.4, request_throughput=0.5)
    found = find_highest_rate(10.0, lambda rate: pytest.fail("nothing is left to measure"), alone=alone)
    assert (found["max_request_rate"], found["request_goodput"]) == (0.0, 0.0)
    assert found["tried"] == [{"request_rate": 0.5, "met": 0.85, "request_goodput": 0.4, "request_throughput": 0.5}]
