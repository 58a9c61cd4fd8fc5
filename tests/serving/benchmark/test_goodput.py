"""The highest rate is what the user buys GPUs by: it is tried on queues whose capacity is known from theory."""

import math
from statistics import median

import pytest

from serving.benchmark.goodput import (
    ATTAINMENT,
    AskedRequest,
    Probe,
    Share,
    alone_prompts,
    find_highest_rate,
    probe_prompts,
    read_probe,
)
from serving.benchmark.settings import BenchmarkSettings, check_settings
from serving.benchmark.workload import make_workloads
from tests.serving.benchmark.queue_simulation import SERVICES, simulate
from toolchain.errors import SenteiError

REPEATS = 5


def search(*, limit_s=math.inf, start, attainment=ATTAINMENT, seed=0, client_rate=math.inf, **queue):
    """One search over a simulated queue; the objective is a limit on the time of the whole request."""
    seeds = iter(range(1000 * seed, 1000 * (seed + 1)))

    def probe(rate, num_requests):
        served = simulate(rate=min(rate, client_rate), num_requests=num_requests, seed=next(seeds), **queue)
        asked = [
            AskedRequest(sent_s=each.arrived_s, ended_s=each.ended_s, met=each.ended_s - each.arrived_s <= limit_s)
            for each in served
        ]
        return read_probe(asked, rate=rate)

    return find_highest_rate(start, probe, alone_met=1.0, alone_s=queue["mean_s"], attainment=attainment)


def median_rate(**asked):
    return median(search(seed=seed, **asked)["max_request_rate"] for seed in range(REPEATS))


@pytest.mark.parametrize(
    "service, num_servers, mean_s",
    [
        ("deterministic", 8, 0.5),
        ("exponential", 1, 1 / 12),
        ("two lengths", 1, 1 / 12),
        *(pytest.param(service, 8, 0.5, marks=pytest.mark.acceptance) for service in SERVICES),
    ],
)
def test_under_limits_that_nobody_misses_the_rate_is_what_the_servers_can_do(service, num_servers, mean_s):
    capacity = num_servers / mean_s
    found = median_rate(service=service, num_servers=num_servers, mean_s=mean_s, start=capacity / 3)
    assert found == pytest.approx(capacity, rel=0.05)


def test_a_limit_on_the_time_of_a_request_is_found_where_theory_has_it():
    # M/M/1: a request takes longer than t with probability exp(-(capacity - rate) t) (Kleinrock, 1975).
    capacity, limit_s = 12.0, 20 / 12
    rates = []
    for attainment in (0.8, 0.95):
        expected = capacity - math.log(1 / (1 - attainment)) / limit_s
        found = median_rate(
            limit_s=limit_s, attainment=attainment, start=5.0, service="exponential", num_servers=1, mean_s=1 / capacity
        )
        assert found == pytest.approx(expected, rel=0.07)
        rates.append(found)
    assert rates[0] > rates[1]


def test_a_server_that_answers_half_of_what_arrives_does_not_hold():
    served = simulate(
        rate=24.0, num_requests=1000, num_servers=1, service="deterministic", mean_s=1 / 12, seed=0
    )  # fmt: skip
    probe = read_probe([AskedRequest(sent_s=s.arrived_s, ended_s=s.ended_s, met=True) for s in served], rate=24.0)
    assert probe.answered.value == pytest.approx(0.5, abs=0.02)
    assert probe.answered.high < 0.95
    assert probe.met.value == 1.0


def test_what_the_load_generator_could_not_send_was_not_answered():
    # The servers can do 100 a second, and the client sends 20 at most.
    found = search(client_rate=20.0, start=10.0, service="uniform", num_servers=10, mean_s=0.1)
    assert found["max_request_rate"] == pytest.approx(20.0, rel=0.05)


def test_failed_requests_are_not_answered():
    asked = [AskedRequest(sent_s=i / 10, ended_s=None if i % 5 else i / 10 + 0.5, met=not i % 5) for i in range(400)]
    probe = read_probe(asked, rate=10.0)
    assert probe.answered.value == pytest.approx(0.2, abs=0.01)
    assert probe.met.value == pytest.approx(0.2, abs=0.01)


def test_requests_that_are_late_together_count_for_less_than_as_many_alone():
    times = {"sent_s": 0.0, "ended_s": 1.0}
    apart = [AskedRequest(**times | {"sent_s": i / 10}, met=i % 5 > 0) for i in range(400)]
    together = [AskedRequest(**times | {"sent_s": i / 10}, met=i % 100 < 80) for i in range(400)]
    widths = [each.met.high - each.met.low for each in (read_probe(asked, rate=10.0) for asked in (apart, together))]
    assert widths[1] > 2 * widths[0]


def server(*, limit, undecided=()):
    """A server whose requests meet every objective up to ``limit``; near ``undecided`` rates short probes are vague."""
    sent = []

    def probe(rate, num_requests):
        met = 1.0 if rate <= limit else 0.5
        vague = any(abs(rate / each - 1) < 0.05 for each in undecided) and num_requests < 1000
        sent.append((rate, num_requests))
        spread = 0.6 if vague else 0.01
        return Probe(met=Share(value=met, low=met - spread, high=min(1.0, met + spread)),
                     answered=Share(value=1.0, low=1.0, high=1.0), num_requests=num_requests)  # fmt: skip

    return probe, sent


@pytest.mark.parametrize("limit", [0.9, 7.0, 10.0, 11.0, 300.0])
def test_the_limit_is_found_from_below_and_from_above(limit):
    probe, _ = server(limit=limit)
    found = find_highest_rate(10.0, probe, alone_met=1.0, alone_s=0.1)
    assert limit / 2 ** (1 / 32) < found["max_request_rate"] <= limit
    assert found["request_goodput"] == found["max_request_rate"]


def test_a_start_far_below_what_a_batch_can_do_is_left_behind():
    # 40 requests at once do not fill a large accelerator: their rate is no bound.
    probe, _ = server(limit=100.0)
    assert find_highest_rate(1.0, probe, alone_met=1.0, alone_s=0.1)["max_request_rate"] > 90


def test_a_probe_that_leaves_it_open_is_made_again_longer():
    probe, sent = server(limit=11.0, undecided=[10.0])
    tried = find_highest_rate(10.0, probe, alone_met=1.0, alone_s=0.1)["tried"]
    assert [num for rate, num in sent if rate == 10.0] == [300, 1200]
    assert [each["holds"] for each in tried if each["request_rate"] == 10.0] == [None, True]


@pytest.mark.parametrize(
    "rate, alone_s, lengths",
    [
        (10.0, 0.5, [300, 1200, 3000]),
        (100.0, 0.5, [3000]),
        (0.2, 1.0, [40, 60]),
        # A request of 20 s: a probe of 30 s would end before the first requests of a busy server do.
        (2.0, 20.0, [320, 600]),
    ],
)
def test_probes_are_long_enough_for_requests_and_short_enough_for_people(rate, alone_s, lengths):
    assert probe_prompts(rate, alone_s) == lengths


def test_nothing_that_meets_them_is_nought():
    probe, sent = server(limit=0.01)
    found = find_highest_rate(10.0, probe, alone_met=1.0, alone_s=0.1)
    assert (found["max_request_rate"], found["request_goodput"], len({rate for rate, _ in sent})) == (0.0, 0.0, 8)


def test_limits_that_requests_miss_one_at_a_time_are_not_searched_for():
    found = find_highest_rate(
        10.0, lambda rate, num: pytest.fail("nothing is left to measure"), alone_met=0.85, alone_s=0.1
    )
    assert found == {"max_request_rate": 0.0, "request_goodput": 0.0, "tried": []}


@pytest.mark.parametrize("attainment, num_prompts", [(0.9, 20), (0.95, 40), (0.99, 200)])
def test_one_request_that_is_late_by_chance_does_not_end_the_search(attainment, num_prompts):
    assert alone_prompts(attainment) == num_prompts
    assert (num_prompts - 1) / num_prompts >= attainment


@pytest.mark.parametrize("attainment", [0.4, 1.0, 90.0, math.nan])
def test_a_share_that_is_none_is_refused(attainment):
    settings = BenchmarkSettings(engine="vllm", workloads=make_workloads(engine="vllm"), attainment=attainment)
    with pytest.raises(SenteiError, match=r"attainment is .* from 0\.5 to 0\.995"):
        check_settings(settings, num_models=2)
