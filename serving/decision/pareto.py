"""Which candidates nobody should pick: another one is better in every respect."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from serving.decision.document import CandidateRecord, Interval


@dataclass(frozen=True, kw_only=True)
class Point:
    """A model in the picture.

    Attributes:
        name: Of the model.
        loss: Perplexity over the original's, the worst text's; lower is better.
        speed: Gain over the original; higher is better.
        memory_bytes: Lower is better.
    """

    name: str
    loss: Interval
    speed: Interval
    memory_bytes: float


def points_of(candidates: Sequence[CandidateRecord], original_memory_bytes: float | None) -> list[Point]:
    """The models that have a place in the picture: the original, and every candidate of which all was measured."""
    one = Interval(value=1, low=1, high=1)
    points = [] if original_memory_bytes is None else [
        Point(name="original", loss=one, speed=one, memory_bytes=original_memory_bytes)
    ]  # fmt: skip
    for each in candidates:
        if (worst := worst_loss(each)) and each.gain and each.memory_bytes is not None:
            points.append(Point(name=each.name, loss=worst, speed=each.gain, memory_bytes=each.memory_bytes))
    return points


def worst_loss(candidate: CandidateRecord) -> Interval | None:
    """The perplexity ratio of the text that suffered most."""
    return max(candidate.perplexity.values(), key=lambda each: each.value, default=None)


def better_ones(points: Sequence[Point]) -> Mapping[str, list[str]]:
    """By name, the points that are better: at least as good in all three measured values, and shown so in one.

    Shown: the 95 % intervals of loss or speed do not touch, or the memory is less. So chance alone strikes nobody out,
    and of several candidates at least one is left.
    """
    return {point.name: [other.name for other in points if _is_better(other, point)] for point in points}


def _is_better(one: Point, other: Point) -> bool:
    as_good = (
        one.loss.value <= other.loss.value
        and one.speed.value >= other.speed.value
        and one.memory_bytes <= other.memory_bytes
    )
    shown = (
        _below(one.loss, other.loss) or _below(other.speed, one.speed) or one.memory_bytes < other.memory_bytes
    )  # fmt: skip
    return as_good and shown


def _below(one: Interval, other: Interval) -> bool:
    """Whether a number is shown to be less than another."""
    return one.high is not None and other.low is not None and one.high < other.low
