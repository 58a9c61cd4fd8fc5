"""Intervals and tests, against numbers that can be computed by hand or are published."""

import math
import random
from statistics import fmean

import pytest

from toolchain.evaluate.significance import compare_means, compare_shares, holm, verdict, wilson_interval


def test_mcnemar_counts_only_questions_that_one_model_alone_answered():
    # Nine of ten such questions lost: 2 * (C(10, 0) + C(10, 1)) / 2^10.
    for num_questions in (10, 1000):
        found = compare_shares(lost=9, gained=1, num_questions=num_questions)
        assert found.p_value == pytest.approx(2 * 11 / 1024)
    assert found.value == -8 / 1000


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
