"""How much damage a person accepts."""

from dataclasses import dataclass

from toolchain.errors import SenteiError
from toolchain.metrics import Metric
from toolchain.plan import LimitRecord


@dataclass(frozen=True, kw_only=True)
class LimitSettings:
    """What was asked for; at most one of them.

    Attributes:
        max_degradation: The metric may be this many times worse than the original's, such as 1.10.
        max_metric: Worst accepted value.
    """

    max_degradation: float | None = None
    max_metric: float | None = None


def check_limit(settings: LimitSettings) -> None:
    """Checks a limit before anything is computed.

    Raises:
        SenteiError: Two limits, or one that even the original model breaks.
    """
    if settings.max_degradation is not None and settings.max_metric is not None:
        raise SenteiError("Two limits were given.", "Use --max-degradation or --max-metric.")
    if settings.max_degradation is not None and not settings.max_degradation >= 1:
        raise SenteiError(f"--max-degradation {settings.max_degradation:g} is below 1.", "1.10 accepts 10 % worse.")


def resolve_limit(settings: LimitSettings, metric: Metric, original: float) -> LimitRecord | None:
    """The worst accepted value, given the original model's."""
    if settings.max_degradation is not None:
        return LimitRecord(metric=metric.name, original=original, value=original * settings.max_degradation)
    if settings.max_metric is not None:
        return LimitRecord(metric=metric.name, original=original, value=settings.max_metric)
    return None


def holds(limit: LimitRecord | None, value: float) -> bool:
    """Whether a metric's value is still accepted."""
    return limit is None or value <= limit.value
