"""How much damage a person accepts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from toolchain.errors import SenteiError
from toolchain.metrics.token_metrics import Metric
from toolchain.plan.document import LimitRecord, TextSourceRecord


@dataclass(frozen=True, kw_only=True)
class LimitSettings:
    """What was asked for; at most one of them.

    Attributes:
        max_degradation: The metric may be this many times worse than the original's, such as 1.10.
        max_metric: Worst accepted value of a metric of which lower is better.
        min_metric: Worst accepted value of a metric of which higher is better.
    """

    max_degradation: float | None = None
    max_metric: float | None = None
    min_metric: float | None = None

    @property
    def given(self) -> dict[str, float]:
        """The limits that were given, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}


def limit_asked(
    settings: LimitSettings, metric: Metric, windows: Sequence[TextSourceRecord] = ()
) -> LimitRecord | None:
    """A limit as the plan records it, checked before anything is computed; its value is not known yet.

    Args:
        settings: What was asked for.
        metric: What the limit looks at.
        windows: What each text gave to the windows that ``metric`` is measured on; none if it does not read text.

    Raises:
        SenteiError: Two limits, or one that makes no sense for the metric.
    """
    given = settings.given
    if len(given) > 1:
        names = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        raise SenteiError(f"Two limits were given, {names}.", "Use one of them.")
    if not given:
        return None
    name, value = next(iter(given.items()))
    if name == "max_degradation" and not value >= 1:
        raise SenteiError(f"--max-degradation {value:g} is below 1.", "1.10 accepts 10 % worse.")
    if name == "max_degradation" and metric.name == "kl":
        raise SenteiError("kl is 0 for the original, and no multiple of it is a limit.", "Use --max-metric.")
    if name == "max_metric" and metric.higher_is_better:
        raise SenteiError(f"For {_named(metric)}, higher is better.", "Use --min-metric.")
    if name == "min_metric" and not metric.higher_is_better:
        raise SenteiError(f"For {_named(metric)}, lower is better.", "Use --max-metric.")
    return LimitRecord(
        metric=metric.name,
        source=metric.source,
        source_sha256=metric.source_sha256,
        higher_is_better=metric.higher_is_better,
        asked=name,
        asked_value=value,
        original=0.0,
        value=0.0,
        windows=list(windows),
    )


def _named(metric: Metric) -> str:
    """Which way a refusal rate is better depends on what is wanted of the file."""
    return metric.name if metric.source is None else f"{metric.name} ({metric.source})"


def resolve_limit(limit: LimitRecord, original: float) -> LimitRecord:
    """The worst accepted value, given the original model's.

    Raises:
        SenteiError: A degradation of a metric that is not positive.
    """
    value = limit.asked_value
    if limit.asked == "max_degradation":
        if original <= 0:
            raise SenteiError(
                f"{limit.metric} is {original:g} for the original, and no multiple of it is a limit.",
                "Use --min-metric." if limit.higher_is_better else "Use --max-metric.",
            )
        value = original / limit.asked_value if limit.higher_is_better else original * limit.asked_value
    return limit.model_copy(update={"original": original, "value": value})


def holds(limit: LimitRecord | None, value: float) -> bool:
    """Whether a metric's value is still accepted."""
    if limit is None:
        return True
    return value >= limit.value if limit.higher_is_better else value <= limit.value


def why_not(limit: LimitRecord, value: float, how: str) -> str:
    """Says that a step further would break the limit; ``how`` says which step, and of which model."""
    return f"{limit.metric} would be {value:.5g} {how}{_where(limit)}; the limit is {limit.value:.5g}"


def why_nothing(limit: LimitRecord) -> str:
    """Says that the original model does not hold the limit."""
    return f"{limit.metric} is {limit.original:.5g} for the original{_where(limit)}; the limit is {limit.value:.5g}"


def _where(limit: LimitRecord) -> str:
    if limit.source is not None:
        return f" on {limit.source}"
    count = sum(each.num_windows for each in limit.windows)
    return f" on {count} window{'s' if count > 1 else ''} kept apart" if count else ""


def last_that_holds(steps: int, holds_at: Callable[[int], bool]) -> int:
    """The furthest of ``steps`` that holds, by bisection: 0 is taken to hold, and ``steps`` not to."""
    good, bad = 0, steps
    while bad - good > 1:
        middle = (good + bad) // 2
        if holds_at(middle):
            good = middle
        else:
            bad = middle
    return good
