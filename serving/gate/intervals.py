"""Intervals of how much worse a candidate is, from counts in blocks of time.

The window is cut into equal blocks, since requests that are served together are slow together: treating them as
independent would make the intervals too narrow. What is compared within a block also had the same traffic.

Every interval here has an ``error``: the probability that the truth lies below its low end, and as much for the high
end. It is one-sided because a gate asks one-sided questions.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import betainccinv, betaincinv, ndtr, stdtrit

Blocks = NDArray[np.float64]
# With fewer, the variance between them says too little.
LEAST_BLOCKS = 8


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A value with its interval.

    Attributes:
        original: What was measured of the original.
        candidate: What was measured of the candidate.
        value: The candidate's minus the original's, or divided by it.
        low: The truth is at least this.
        high: The truth is at most this.
    """

    original: float
    candidate: float
    value: float
    low: float
    high: float


def share_increase(
    events: tuple[Blocks, Blocks], trials: tuple[Blocks, Blocks], *, error: float, in_clusters: bool
) -> Interval | None:
    """The increase of a share: of requests that fail, or are slow.

    The limits of each share are Clopper and Pearson's (1934), which hold with few events too; those of the difference
    are put together from them by MOVER (Zou and Donner 2008, Statistics in Medicine 27:1693, equation 3; with Wilson's
    limits it is Newcombe's method 10). With ``in_clusters`` the counts are first divided by a design effect, as Rao and
    Scott (1992, Biometrics 48:577) do; see :func:`design_effect`.

    Args:
        events: The original's and the candidate's, float64 [blocks].
        trials: Likewise; no smaller than the events.
        error: See the module.
        in_clusters: Whether events of one side come together by chance. A slow answer holds up the next one; errors
            that only one side has are its own fault, and those of a common cause are dealt out by the router.

    Returns:
        Shares between 0 and 1; ``None`` where one side has no trials.
    """
    if not all(each.sum() for each in trials):
        return None
    shrunk = design_effect(events, trials) if in_clusters else 1.0
    if shrunk > 1:  # estimated, so the tails are Student's
        error = float(ndtr(-_quantile(error, len(events[0]))))
    shares, lows, highs = [], [], []
    for happened, all_ in zip(events, trials, strict=True):
        count, total = happened.sum() / shrunk, all_.sum() / shrunk
        shares.append(float(count / total))
        lows.append(float(betaincinv(count, total - count + 1, error)) if count > 0 else 0.0)
        highs.append(float(betainccinv(count + 1, total - count, error)) if count < total else 1.0)
    value = shares[1] - shares[0]
    return Interval(
        original=shares[0],
        candidate=shares[1],
        value=value,
        low=value - math.hypot(shares[1] - lows[1], highs[0] - shares[0]),
        high=value + math.hypot(highs[1] - shares[1], shares[0] - lows[0]),
    )


def design_effect(events: tuple[Blocks, Blocks], trials: tuple[Blocks, Blocks]) -> float:
    """How many times the variance of a difference of shares is what it were without clusters; at least 1.

    Rao and Scott's ratio estimator, of the difference instead of one share: what both sides have in common in a block,
    such as its load, drops out.

    Args:
        events: As for :func:`share_increase`.
        trials: Likewise; not all 0.
    """
    blocks = len(events[0])
    deviation, alone = np.zeros(blocks), 0.0
    for sign, happened, all_ in zip((-1, 1), events, trials, strict=True):
        total = all_.sum()
        share = happened.sum() / total
        deviation += sign * (happened - all_ * share) / total
        alone += share * (1 - share) / total
    variance = blocks / (blocks - 1) * (deviation**2).sum()
    return max(1.0, float(variance / alone)) if alone > 0 else 1.0


def mean_ratio(sums: tuple[Blocks, Blocks], counts: tuple[Blocks, Blocks], *, error: float) -> Interval | None:
    """The candidate's mean divided by the original's.

    A mean of requests is a ratio of two sums over blocks. The logarithm of the ratio of both means is linearised (Deng,
    Knoblich and Lu 2018, "Applying the Delta Method in Metric Analytics", section 3, with blocks as the unit that is
    randomised), and each block's share in it is taken from both sides together. Student's t with blocks minus one
    degrees of freedom.

    Args:
        sums: Of the values, such as seconds: the original's and the candidate's, float64 [blocks].
        counts: Of the values.
        error: See the module.

    Returns:
        ``None`` where fewer than :data:`LEAST_BLOCKS` have values of both sides, or one side's are all 0.
    """
    used = (counts[0] > 0) & (counts[1] > 0)
    blocks = int(used.sum())
    if blocks < LEAST_BLOCKS or not all(each.sum() > 0 for each in sums):
        return None
    means = [float(total.sum() / count.sum()) for total, count in zip(sums, counts, strict=True)]
    parts = [
        (total - mean * count) / total.sum() for total, count, mean in zip(sums, counts, means, strict=True)
    ]  # each sums to 0
    deviation = parts[1] - parts[0]
    margin = _quantile(error, blocks) * math.sqrt(blocks / (blocks - 1) * float((deviation**2).sum()))
    ratio = means[1] / means[0]
    return Interval(
        original=means[0], candidate=means[1], value=ratio, low=ratio * math.exp(-margin), high=ratio * math.exp(margin)
    )


def level_increase(levels: tuple[Blocks, Blocks], *, error: float) -> Interval | None:
    """The increase of something that is read from time to time, such as a queue: a paired t-interval over the blocks.

    Args:
        levels: The original's and the candidate's mean in each block, float64 [blocks]; NaN where there is none.
        error: See the module.

    Returns:
        ``None`` where fewer than :data:`LEAST_BLOCKS` have both.
    """
    used = ~np.isnan(levels[0]) & ~np.isnan(levels[1])
    blocks = int(used.sum())
    if blocks < LEAST_BLOCKS:
        return None
    original, candidate = levels[0][used], levels[1][used]
    difference = candidate - original
    margin = _quantile(error, blocks) * float(difference.std(ddof=1)) / math.sqrt(blocks)
    value = float(difference.mean())
    return Interval(
        original=float(original.mean()), candidate=float(candidate.mean()), value=value, low=value - margin,
        high=value + margin,
    )  # fmt: skip


def _quantile(error: float, blocks: int) -> float:
    return -float(stdtrit(blocks - 1, error))
