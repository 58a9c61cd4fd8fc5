"""Is a difference between two models more than chance? Every 95 % interval and every test of sentei, on scipy.stats.

``serving/gate/intervals.py`` has the one-sided intervals of ``sentei gate``, whose probability depends on its checks.

What needs scipy calls :func:`check_statistics` before it begins: where pip was told to leave dependencies out, it is
not there.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev, variance
from typing import Literal

from toolchain.errors import MissingDependencyError

CONFIDENCE = 0.95
# How a message names scipy, by the extra that brings it to the command.
_SCIPY = {"demo": "scipy", "eval": "scipy, which judges differences,"}
Verdict = Literal["better", "worse", "no difference shown"]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A difference, pruned minus original, of things measured in pairs.

    Attributes:
        value: The mean difference.
        low: Lower end of the 95 % interval; ``None`` where there are too few pairs for one.
        high: Its upper end.
        p_value: Two-sided; of the same or a larger difference by chance alone. ``None`` likewise.
    """

    value: float
    low: float | None
    high: float | None
    p_value: float | None


def check_statistics(extra: Literal["demo", "eval"]) -> None:
    """Refuses to start what could not be judged in the end.

    Args:
        extra: The extra that brings scipy to the command that asks.

    Raises:
        MissingDependencyError: scipy is not installed.
    """
    try:
        import scipy.stats  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(_SCIPY[extra], extra) from error


def wilson_interval(num_right: int, num_questions: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927), which stays within 0 and 1 with few questions too."""
    from scipy.stats import binomtest

    interval = binomtest(num_right, num_questions).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def compare_shares(*, lost: int, gained: int, num_questions: int) -> Difference:
    """Of two models on the same questions, from those that only one of them answered correctly.

    The test is McNemar's (1947), exact: under chance alone each such question falls to either side as a coin does. The
    interval is Agresti and Min's (2005, Statistics in Medicine 24:729): Wald's with half a question added to each cell
    of the two-by-two table.

    Args:
        lost: Questions that only the original answered correctly.
        gained: Questions that only the pruned model answered correctly.
        num_questions: All questions; at least one.
    """
    total = num_questions + 2
    center = (gained - lost) / total
    error = math.sqrt((lost + gained + 1) - (gained - lost) ** 2 / total) / total
    margin = normal_margin(error)
    return Difference(
        value=(gained - lost) / num_questions,
        low=max(-1.0, center - margin),
        high=min(1.0, center + margin),
        p_value=mcnemar(lost=lost, gained=gained),
    )


def mcnemar(*, lost: int, gained: int) -> float:
    """The two-sided p-value of the exact test in :func:`compare_shares`."""
    from scipy.stats import binomtest

    return float(binomtest(lost, lost + gained, 0.5).pvalue) if lost + gained else 1.0


def mcnemar_power(difference: float, *, num_questions: int, discordant: float) -> float:
    """How probable it is that the exact test of :func:`compare_shares` finds a true difference at 5 %.

    Summed over all outcomes: the number of discordant questions, which only one of the models answers rightly, is
    binomial, and so is, given it, the number of those that fall to the worse model.

    Args:
        difference: Between the models' true shares of right answers; at most ``discordant``.
        num_questions: All questions.
        discordant: The true share of discordant questions, above 0.
    """
    import numpy as np
    from scipy.stats import binom

    count = np.arange(num_questions + 1)
    # The largest number on the rarer side whose two-sided p-value is still below 5 %; -1 where there is none.
    most = binom.ppf((1 - CONFIDENCE) / 2, count, 0.5) - 1
    of_better = (1 + abs(difference) / discordant) / 2
    found = binom.cdf(most, count, of_better) + binom.sf(count - most - 1, count, of_better)
    return float((binom.pmf(count, num_questions, discordant) * found).sum())


def smallest_difference(*, num_questions: int, discordant: float, power: float) -> float | None:
    """The smallest true difference of two shares that :func:`mcnemar` finds at 5 % with this power.

    Args:
        num_questions: As for :func:`mcnemar_power`.
        discordant: Likewise.
        power: The probability to find it, above 0.05.

    Returns:
        A difference up to ``discordant``; ``None`` where not even that is found so often.
    """
    from scipy.optimize import brentq

    def missing(difference: float) -> float:
        return mcnemar_power(difference, num_questions=num_questions, discordant=discordant) - power

    return None if missing(discordant) < 0 else float(brentq(missing, 0.0, discordant, xtol=1e-6))


def compare_means(differences: Sequence[float]) -> Difference:
    """Of paired measurements: Student's paired t-test (1908) and the t-interval of the mean difference.

    Args:
        differences: Pruned minus original, one a pair; at least one. One pair alone has no interval.
    """
    from scipy.stats import t

    center, degrees = fmean(differences), len(differences) - 1
    if degrees < 1:
        return Difference(value=center, low=None, high=None, p_value=None)
    error = stdev(differences) / math.sqrt(len(differences))
    if error == 0:
        return Difference(value=center, low=center, high=center, p_value=1.0 if center == 0 else 0.0)
    margin = t_margin(error, degrees)
    return Difference(
        value=center, low=center - margin, high=center + margin, p_value=float(2 * t.sf(abs(center) / error, degrees))
    )


def compare_mean_of_means(value: float, differences: Sequence[Sequence[float]]) -> Difference:
    """The mean of independent mean differences, with the normal interval of their standard errors.

    Args:
        value: The mean over the groups of each group's mean difference.
        differences: Pruned minus original, one a pair, for each group. A group with one pair has no interval.
    """
    if not all(len(each) > 1 for each in differences):
        return Difference(value=value, low=None, high=None, p_value=None)
    error = math.sqrt(sum(stdev(each) ** 2 / len(each) for each in differences)) / len(differences)
    margin = normal_margin(error)
    p_value = 2 * NormalDist().cdf(-abs(value) / error) if error else float(value == 0)
    return Difference(value=value, low=value - margin, high=value + margin, p_value=p_value)


def ratio_interval(original: Sequence[float], pruned: Sequence[float]) -> dict[str, float]:
    """The ratio pruned/original and its t-interval, from paired repeats.

    Args:
        original: One positive value a repeat.
        pruned: The values measured beside them.

    Returns:
        ``value`` (geometric mean of the pairs' ratios), ``low``, ``high`` and ``confidence``.
    """
    logs = [math.log(after / before) for before, after in zip(original, pruned, strict=True)]
    center, count = fmean(logs), len(logs)
    # Not statistics.stdev, which differs in the last digit from what earlier results hold.
    error = math.sqrt(sum((log - center) ** 2 for log in logs) / (count - 1) / count)
    return _ratio(center, t_margin(error, count - 1))


def welch_interval(one: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """The ratio other/one of geometric means, and its t-interval (Welch, 1947) on logarithms.

    Args:
        one: Positive values, two at least.
        other: Likewise, not paired with them.

    Returns:
        As :func:`ratio_interval` does.
    """
    logs = [[math.log(value) for value in values] for values in (one, other)]
    parts = [variance(each) / len(each) for each in logs]
    margin = 0.0
    if sum(parts) > 0:
        degrees = sum(parts) ** 2 / sum(p**2 / (len(each) - 1) for p, each in zip(parts, logs, strict=True))
        margin = t_margin(math.sqrt(sum(parts)), degrees)
    return _ratio(fmean(logs[1]) - fmean(logs[0]), margin)


def _ratio(center: float, margin: float) -> dict[str, float]:
    """An interval of a logarithm as one of the ratio."""
    low, high = math.exp(center - margin), math.exp(center + margin)
    return {"value": math.exp(center), "low": low, "high": high, "confidence": CONFIDENCE}


def t_margin(error: float, degrees: float) -> float:
    """Half the width of Student's interval, from a standard error and its degrees of freedom."""
    from scipy.stats import t

    return float(t.ppf((1 + CONFIDENCE) / 2, degrees)) * error


def normal_margin(error: float) -> float:
    """Half the width of the normal interval, from a standard error."""
    return NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * error


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusts p-values of several tests looked at together (Holm 1979): all below 0.05 hold together at 5 %."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, position in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[position]))
        adjusted[position] = largest
    return adjusted


def verdict(difference: Difference, *, higher_is_better: bool) -> Verdict:
    """Whether the pruned model is better or worse at 5 %; without a test no difference is shown."""
    if difference.p_value is None or difference.p_value >= 1 - CONFIDENCE:
        return "no difference shown"
    return "better" if (difference.value > 0) == higher_is_better else "worse"
