"""Intervals hold the truth as often as they say, where requests come in clusters too, and are not needlessly wide."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from serving.gate.intervals import LEAST_BLOCKS, level_increase, mean_ratio, share_increase

BLOCKS, ERROR, RUNS = 20, 0.025, 800


def missed(low: int, high: int) -> bool:
    return max(low, high) > binom.ppf(1 - 1e-4, RUNS, 1.3 * ERROR)  # approximate methods: within a third


@pytest.mark.parametrize(("number", "shares"), [(30, (0.01, 0.05)), (400, (0.002, 0.02)), (400, (0.3, 0.5))])
def test_a_share_s_increase(number, shares):
    rng = np.random.default_rng(0)
    low = high = 0
    for _ in range(RUNS):
        trials = [rng.multinomial(number, np.full(BLOCKS, 1 / BLOCKS)).astype(float) for _ in shares]
        events = [
            rng.binomial(each.astype(int), share).astype(float) for each, share in zip(trials, shares, strict=True)
        ]
        found = share_increase(tuple(events), tuple(trials), error=ERROR, in_clusters=False)
        low += found.low > shares[1] - shares[0]
        high += found.high < shares[1] - shares[0]
    assert not missed(low, high)


def test_a_share_in_clusters_needs_the_design_effect():
    """Some blocks are slow as a whole. Without clusters the interval misses far too often."""
    rng = np.random.default_rng(0)
    misses = {True: [0, 0], False: [0, 0]}
    trials = (np.full(BLOCKS, 100.0), np.full(BLOCKS, 100.0))
    for _ in range(RUNS):
        events = tuple(rng.binomial(100, rng.beta(2, 6, BLOCKS)).astype(float) for _ in trials)
        for in_clusters, counted in misses.items():
            found = share_increase(events, trials, error=ERROR, in_clusters=in_clusters)
            counted[0] += found.low > 0
            counted[1] += found.high < 0
    assert not missed(*misses[True])
    assert missed(*misses[False])


def test_a_ratio_of_means_where_load_swings():
    rng = np.random.default_rng(0)
    low = high = 0
    widths = []
    for _ in range(RUNS):
        swing = np.exp(0.5 * rng.standard_normal(BLOCKS))  # of the traffic, so of both sides
        sums, counts = [], []
        for scale in (1.0, 1.2):
            number = rng.poisson(100 * swing).astype(float)
            sums.append(number * scale * swing * np.exp(0.1 * rng.standard_normal(BLOCKS)))
            counts.append(number)
        found = mean_ratio(tuple(sums), tuple(counts), error=ERROR)
        low, high = low + (found.low > 1.2), high + (found.high < 1.2)
        widths.append(found.high - found.low)
    assert not missed(low, high)
    # Were the sides not paired in time, the swing of the load alone would make it about 1.2 wide.
    assert np.median(widths) < 0.4


def test_a_level():
    rng = np.random.default_rng(0)
    low = high = 0
    for _ in range(RUNS):
        shared = 3 * rng.random(BLOCKS)
        levels = tuple(shared + add + rng.random(BLOCKS) for add in (0.0, 0.4))
        found = level_increase(levels, error=ERROR)
        low, high = low + (found.low > 0.4), high + (found.high < 0.4)
    assert not missed(low, high)


def test_too_little_has_no_interval():
    few, many = np.zeros(BLOCKS), np.ones(BLOCKS)
    few[: LEAST_BLOCKS - 1] = 1
    assert mean_ratio((few, many), (few, many), error=ERROR) is None
    assert mean_ratio((0 * many, many), (many, many), error=ERROR) is None
    assert level_increase((np.where(few > 0, few, np.nan), many), error=ERROR) is None
    assert share_increase((0 * few, 0 * few), (0 * few, many), error=ERROR, in_clusters=True) is None


counts = st.lists(st.integers(0, 10**7), min_size=BLOCKS, max_size=BLOCKS).map(lambda each: np.array(each, float))


@given(counts, counts, st.booleans(), st.sampled_from([0.05, 1e-4, 1e-9]))
def test_whatever_is_counted_an_interval_holds_its_value(events, more, in_clusters, error):
    trials = events + more
    for sides in (((events, more), (trials, trials)), ((events, events), (trials, events))):
        found = share_increase(*sides, error=error, in_clusters=in_clusters)
        assert (
            found is None
            or -1.0001 <= found.low <= found.value <= found.high <= 1.0001
            or np.isclose(found.low, found.value)
        )
    found = mean_ratio((events * 0.01, more * 0.02), (trials, trials), error=error)
    assert found is None or 0 <= found.low <= found.value <= found.high
