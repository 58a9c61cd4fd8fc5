"""The gate's answers, from what a wrong one costs: users of a worse model, or a good roll-out that is stopped."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binom

from serving.gate.counts import BLOCKS
from serving.gate.decide import FALSE_ALARMS, Decision, decide
from tests.serving.gate.world import Truth, asked, cut, pair

EQUAL = Truth()
# The candidate is worse than gate.yaml's defaults allow, in one way; and by how much it is at the limit.
WORSE = {
    "ttft": Truth(ttft_s=0.12 * 1.6),
    "tpot": Truth(tpot_s=0.03 * 1.3),
    "error_answers": Truth(errors=0.03),
    "queue": Truth(waiting=3.0),
    "kv_cache": Truth(kv_cache=0.8),
}
AT_LIMIT = {
    "ttft": Truth(ttft_s=0.12 * 1.1),
    "tpot": Truth(tpot_s=0.03 * 1.1),
    "error_answers": Truth(errors=0.001 + 0.005),
    "queue": Truth(waiting=0.3 + 1.0),
}


def answers(candidate: Truth, *, runs: int, seed: int = 0, **how: object) -> tuple[Counter[str], list[Decision]]:
    rng = np.random.default_rng(seed)
    made = [decide(*pair(rng, EQUAL, candidate, **how), asked()) for _ in range(runs)]
    return Counter(each.answer for each in made), made


def at_most(share: float, runs: int) -> int:
    """So many of so many runs are exceeded once in 10,000 times, if ``share`` is true."""
    return int(binom.ppf(1 - 1e-4, runs, share))


def test_an_equal_candidate_is_promoted_and_hardly_ever_rolled_back():
    for requests, promoted in (((8000, 8000), 45), ((20000, 2200), 10)):
        found, _ = answers(EQUAL, runs=60, requests=requests)
        assert found["promote"] >= promoted
        assert found["roll back"] <= at_most(FALSE_ALARMS, 60)


def test_a_faster_candidate_is_promoted_after_less_traffic():
    found, _ = answers(Truth(ttft_s=0.12 * 0.8, tpot_s=0.03 * 0.8), runs=25, requests=(12000, 4000))
    assert found["promote"] >= 20


@pytest.mark.parametrize("kind", WORSE)
def test_a_candidate_that_is_clearly_worse_is_rolled_back_for_what_is_worse(kind):
    found, made = answers(WORSE[kind], runs=20)
    assert found["promote"] == 0
    assert found["roll back"] >= 18
    for decision in made:
        worse = {check.name for check in decision.checks if check.state == "worse"}
        assert worse <= {kind, f"{kind}_slow", "unfinished"}


@pytest.mark.parametrize("kind", AT_LIMIT)
def test_at_the_limit_neither_answer_is_given_more_often_than_stated(kind):
    """The hardest truth: a hair better is a false roll-back, a hair worse a false promotion."""
    runs = 120
    found, made = answers(AT_LIMIT[kind], runs=runs)
    of_a_check = FALSE_ALARMS / len(made[0].checks)
    assert found["promote"] <= at_most(of_a_check, runs)
    assert found["roll back"] <= at_most(FALSE_ALARMS, runs)
    states = Counter(check.state for each in made for check in each.checks if check.name == kind)
    assert states["worse"] <= at_most(of_a_check, runs) and states["fine"] <= at_most(of_a_check, runs)


def test_asking_again_and_again_does_not_roll_back_more_often_than_stated():
    looks, runs, rolled_back = 10, 30, 0
    settings = asked(looks=looks)
    rng = np.random.default_rng(3)
    for _ in range(runs):
        long = pair(rng, EQUAL, AT_LIMIT["tpot"], blocks=BLOCKS + looks, requests=(1500, 1500))
        rolled_back += any(
            decide(*(cut(each, begin) for each in long), settings).answer == "roll back" for begin in range(looks)
        )
    assert rolled_back <= at_most(FALSE_ALARMS, runs)


@pytest.mark.parametrize("requests", [(20, 3), (300, 20), (5000, 60)])
def test_rare_errors_in_little_traffic_roll_nothing_back(requests):
    """A single failure among a candidate's first requests is a large share, and says nearly nothing."""
    often = Truth(errors=0.003)
    runs = 200
    rng = np.random.default_rng(1)
    found = Counter(decide(*pair(rng, often, often, requests=requests), asked()).answer for _ in range(runs))
    assert found["roll back"] <= at_most(FALSE_ALARMS, runs)
    assert found["promote"] == 0


def test_a_candidate_that_fails_everything_is_rolled_back_before_there_is_much_traffic():
    found, made = answers(Truth(errors=1.0), runs=10, requests=(300, 20))
    assert found["roll back"] == 10
    assert min(made[0].requests) < asked().min_requests


def test_with_too_little_traffic_it_waits_whatever_the_times_are():
    """Also where all intervals would be narrow enough."""
    sides = pair(np.random.default_rng(0), EQUAL, Truth(ttft_s=0.06, tpot_s=0.015))
    assert decide(*sides, asked()).answer == "promote"
    assert decide(*sides, asked(min_requests=9000)).answer == "wait"
    sides = pair(np.random.default_rng(0), EQUAL, WORSE["tpot"])
    assert decide(*sides, asked()).answer == "roll back"
    assert decide(*sides, asked(min_requests=9000)).answer == "wait"


def test_one_slow_server_for_a_moment_is_no_reason_but_slow_all_along_is():
    rng = np.random.default_rng(5)
    original, candidate = pair(rng, EQUAL, EQUAL)
    moment, always = np.ones(BLOCKS), np.full(BLOCKS, 2.0)
    moment[7] = 5.0
    made = {}
    for name, factor in (("moment", moment), ("always", always)):
        slow = replace(candidate, tpot=replace(candidate.tpot, sums_s=candidate.tpot.sums_s * factor))
        made[name] = decide(original, slow, asked()).answer
    assert made == {"moment": "wait", "always": "roll back"}


@pytest.mark.parametrize(
    ("original", "candidate", "answer", "said"),
    [
        ({"servers": 0, "servers_now": 0}, {}, "wait", "no server of the original"),
        ({}, {"servers": 0, "servers_now": 0}, "wait", "no server of the candidate"),
        ({}, {"servers_now": 0}, "roll back", "are gone"),
        ({"servers_now": 0}, {"servers_now": 0}, "wait", "nothing to compare with"),
        ({}, {"restarts": 1}, "roll back", "restarted once, the original's never"),
        ({"restarts": 1}, {"restarts": 1}, "promote", ""),
    ],
)
def test_servers_that_are_not_there(original, candidate, answer, said):
    sides = pair(np.random.default_rng(0), EQUAL, EQUAL)
    found = decide(replace(sides[0], **original), replace(sides[1], **candidate), asked())
    assert found.answer == answer
    assert said in found.reason


def test_what_is_slow_is_by_a_bucket_that_both_have():
    original, candidate = pair(np.random.default_rng(0), EQUAL, EQUAL)

    def titles(**limits):
        found = decide(original, candidate, asked(ttft=limits))
        return next(check for check in found.checks if check.name == "ttft_slow")

    assert "longer than 0.5 s" in titles(slow_s=0.7).title
    assert "longer than 0.25 s" in titles().title or "longer than 0.5 s" in titles().title
    nothing = titles(slow_s=0.0001)
    assert (nothing.interval, nothing.state) == (None, "open")
