"""Intervals and tests, against numbers that can be computed by hand or are published."""

import math
import random
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ttest_ind

from toolchain.significance import (
    compare_mean_of_means,
    compare_means,
    compare_shares,
    holm,
    mcnemar,
    mcnemar_power,
    ratio_interval,
    smallest_difference,
    verdict,
    welch_interval,
    wilson_interval,
)


def test_mcnemar_counts_only_questions_that_one_model_alone_answered():
    # Nine of ten such questions lost: 2 * (C(10, 0) + C(10, 1)) / 2^10.
    for num_questions in (10, 1000):
        found = compare_shares(lost=9, gained=1, num_questions=num_questions)
        assert found.p_value == pytest.approx(2 * 11 / 1024)
    assert found.value == -8 / 1000


def test_power_of_mcnemar_by_hand():
    # Six discordant questions show something only if all fall to one side: 2 / 2^6 = 0.03. Five never do: 2 / 2^5.
    assert mcnemar(lost=6, gained=0) < 0.05 < mcnemar(lost=5, gained=0)
    assert mcnemar_power(1, num_questions=6, discordant=1) == pytest.approx(1)
    assert mcnemar_power(1, num_questions=5, discordant=1) == 0
    # Each falls to the better model in three of four cases.
    assert mcnemar_power(0.5, num_questions=6, discordant=1) == pytest.approx(0.75**6 + 0.25**6)
    assert mcnemar_power(-0.5, num_questions=6, discordant=1) == pytest.approx(0.75**6 + 0.25**6)
    # Half of the questions are discordant, all to one side: all six must be.
    assert mcnemar_power(0.5, num_questions=6, discordant=0.5) == pytest.approx(0.5**6)
    # Without a difference it is what chance alone shows, which the exact test keeps below 5 %.
    assert mcnemar_power(0, num_questions=6, discordant=1) == pytest.approx(2 / 2**6)
    assert 0.03 < mcnemar_power(0, num_questions=5000, discordant=0.25) < 0.05


def test_smallest_difference_that_would_be_found():
    assert smallest_difference(num_questions=5, discordant=1, power=0.8) is None
    # x^6 + (1 - x)^6 = 0.8 for the share x that falls to the better model, and a difference of 2 x - 1.
    found = smallest_difference(num_questions=6, discordant=1, power=0.8)
    share = (1 + found) / 2
    assert share**6 + (1 - share) ** 6 == pytest.approx(0.8, abs=1e-4)
    # Many questions: n = (z(0.975) sqrt(p) + z(0.8) sqrt(p - d^2))^2 / d^2 (Connor 1987, Biometrics 43:207).
    for num_questions in (1000, 8000):
        found = smallest_difference(num_questions=num_questions, discordant=0.25, power=0.8)
        needed = (1.959964 * 0.5 + 0.841621 * math.sqrt(0.25 - found**2)) ** 2 / found**2
        assert needed == pytest.approx(num_questions, rel=0.06)


def test_a_difference_is_found_as_often_as_its_power_says():
    difference = smallest_difference(num_questions=150, discordant=0.25, power=0.8)
    lost, gained = (0.25 + difference) / 2, (0.25 - difference) / 2
    draws = np.random.default_rng(0).multinomial(150, [lost, gained, 0.75], size=800)
    found = [mcnemar(lost=int(draw[0]), gained=int(draw[1])) < 0.05 for draw in draws]
    assert fmean(found) == pytest.approx(0.8, abs=0.045)


def test_shares_that_do_not_differ_are_not_different():
    found = compare_shares(lost=0, gained=0, num_questions=50)
    assert (found.value, found.p_value) == (0, 1)
    assert found.low < 0 < found.high


def test_interval_of_a_difference_is_agresti_and_mins():
    # 100 questions, 20 lost, 10 gained; each of the four cells gets a half.
    found = compare_shares(lost=20, gained=10, num_questions=100)
    error = math.sqrt(31 / 102 - (10 / 102) ** 2) / math.sqrt(102)
    assert found.low == pytest.approx(-10 / 102 - 1.959964 * error, rel=1e-6)
    assert found.high == pytest.approx(-10 / 102 + 1.959964 * error, rel=1e-6)


def test_intervals_cover_as_often_as_they_say():
    generator, covered = random.Random(0), 0
    for _ in range(400):
        draws = generator.choices(("lost", "gained", "same"), weights=(20, 10, 70), k=150)
        found = compare_shares(lost=draws.count("lost"), gained=draws.count("gained"), num_questions=150)
        covered += found.low <= -0.1 <= found.high
    assert 0.92 <= covered / 400 <= 0.98


def test_wilson_interval():
    # Wilson's formula by hand for 8 of 10.
    z = 1.959964
    center, spread = (0.8 + z**2 / 20) / (1 + z**2 / 10), z * math.sqrt(0.016 + z**2 / 400) / (1 + z**2 / 10)
    assert wilson_interval(8, 10) == pytest.approx((center - spread, center + spread), rel=1e-6)
    assert wilson_interval(0, 10)[0] == 0


def test_paired_t():
    # Student's own data (1908), hours of sleep gained with two drugs: t = 4.0621, p = 0.00283.
    differences = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
    found = compare_means(differences)
    assert found.p_value == pytest.approx(0.002833, abs=1e-6)
    assert found.value == pytest.approx(fmean(differences))
    assert (found.low, found.high) == pytest.approx((0.7001, 2.4599), abs=1e-4)


def test_one_pair_shows_nothing():
    found = compare_means([3.0])
    assert (found.value, found.low, found.p_value) == (3.0, None, None)
    assert verdict(found, higher_is_better=False) == "no difference shown"


def test_pairs_without_spread():
    assert compare_means([0.0, 0.0]).p_value == 1
    assert compare_means([0.5, 0.5]).p_value == 0


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_verdict_knows_which_way_is_better():
    found = compare_means([1.0, 1.1, 0.9, 1.0])
    assert verdict(found, higher_is_better=True) == "better"
    assert verdict(found, higher_is_better=False) == "worse"


def test_mean_of_means_is_normal():
    # Two groups with standard errors 0.1 / sqrt(3) and 0.3 / sqrt(3); the mean's error is half the root of their sum.
    found = compare_mean_of_means(0.3, [[0.1, 0.2, 0.3], [0.1, 0.4, 0.7]])
    margin = 1.959964 * math.sqrt(0.01 / 3 + 0.09 / 3) / 2
    assert (found.low, found.high) == pytest.approx((0.3 - margin, 0.3 + margin), rel=1e-6)
    assert found.p_value == pytest.approx(math.erfc(0.3 / margin * 1.959964 / math.sqrt(2)), rel=1e-6)
    assert compare_mean_of_means(0.3, [[0.1, 0.2], [0.3]]).p_value is None


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


def test_the_interval_is_welchs():
    one, other = [1.0, 1.1, 1.3, 1.2], [2.0, 2.3, 2.1]
    expected = ttest_ind(np.log(other), np.log(one), equal_var=False).confidence_interval()
    interval = welch_interval(one, other)
    assert (interval["low"], interval["high"]) == pytest.approx((np.exp(expected.low), np.exp(expected.high)))
    assert welch_interval([2.0, 2.0], [3.0, 3.0])["low"] == pytest.approx(1.5)
