"""Is a difference between two models more than chance? Intervals and paired tests on the same questions and windows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev
from typing import Literal

from toolchain.errors import MissingDependencyError

CONFIDENCE = 0.95
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


def check_statistics() -> None:
    """Refuses to start what could not be judged in the end.

    Raises:
        MissingDependencyError: scipy is not installed.
    """
    try:
        import scipy.stats  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError("scipy, which judges differences,", "eval") from error


def wilson_interval(num_right: int, num_questions: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927), which stays within 0 and 1 with few questions too."""
    from scipy.stats import binomtest

    interval = binomtest(num_right, num_questions).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def compare_shares(*, lost: int, gained: int, num_questions: int) -> Difference:
    """Of two models on the same questions, from those that only one of them answered rightly.

    The test is McNemar's (1947), exact: under chance alone each such question falls to either side as a coin does. The
    interval is Agresti and Min's (2005, Statistics in Medicine 24:729): Wald's with half a question added to each cell
    of the two-by-two table.

    Args:
        lost: Questions that only the original answered rightly.
        gained: Questions that only the pruned model answered rightly.
        num_questions: All questions; at least one.
    """
    total = num_questions + 2
    center = (gained - lost) / total
    error = math.sqrt((lost + gained + 1) - (gained - lost) ** 2 / total) / total
    margin = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * error
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
    margin = float(t.ppf((1 + CONFIDENCE) / 2, degrees)) * error
    return Difference(
        value=center, low=center - margin, high=center + margin, p_value=float(2 * t.sf(abs(center) / error, degrees))
    )


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
