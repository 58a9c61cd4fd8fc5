"""From timestamps to vLLM's metrics, and from repeats to a ratio with a confidence interval.

Names and formulas are those of ``vllm bench serve``, so that the figures of every engine can stand in one table.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median
from typing import Any, Literal

from toolchain.errors import MissingDependencyError, SenteiError

SIDES = ("original", "pruned")
CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class RequestTimes:
    """One request's timestamps, in seconds of one clock.

    Attributes:
        start_s: When the prompt was handed over.
        token_times_s: When each output token was there; at least one.
    """

    start_s: float
    token_times_s: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """What a metric is called, in which unit, which direction is better, and how it is computed."""

    name: str
    unit: str
    better: Literal["lower", "higher"]
    formula: str


METRICS: tuple[Metric, ...] = (
    Metric(
        name="output_throughput", unit="tokens/s", better="higher",
        formula="output tokens of all requests / wall-clock time of the repeat",
    ),
    Metric(
        name="total_token_throughput", unit="tokens/s", better="higher",
        formula="(input + output tokens of all requests) / wall-clock time of the repeat",
    ),
    Metric(
        name="request_throughput", unit="requests/s", better="higher",
        formula="requests / wall-clock time of the repeat",
    ),
    Metric(
        name="mean_ttft_ms", unit="ms", better="lower",
        formula="TTFT = time from handing over the prompt to the first output token; mean over requests",
    ),
    Metric(
        name="mean_tpot_ms", unit="ms", better="lower",
        formula="TPOT = (E2EL - TTFT) / (output tokens - 1); mean over requests",
    ),
    Metric(
        name="mean_itl_ms", unit="ms", better="lower",
        formula="ITL = gap between consecutive output tokens (vLLM: chunks); mean over the pooled gaps",
    ),
    Metric(
        name="p99_itl_ms", unit="ms", better="lower",
        formula="99th percentile of the pooled gaps, linearly interpolated",
    ),
    Metric(
        name="mean_e2el_ms", unit="ms", better="lower",
        formula="E2EL = time from handing over the prompt to the last output token; mean over requests",
    ),
)  # fmt: skip
# On GPUs that count it; see serving.benchmark.gpu_watch.
ENERGY = Metric(
    name="energy_per_output_token_j", unit="J", better="lower",
    formula="energy that NVML counted for the GPUs over the repeat / output tokens; idle power included",
)  # fmt: skip
# What is kept of each repeat's distributions, linearly interpolated, of these times in ms.
PERCENTILES = (5, 25, 50, 75, 90, 95, 99)
DISTRIBUTED = ("ttft", "tpot", "itl", "e2el")
DEFAULT_PRIMARY = "output_throughput"
# With one output token there is no gap to measure; vLLM writes 0 where these are undefined.
BETWEEN_TOKENS = frozenset({"mean_tpot_ms", "mean_itl_ms", "p99_itl_ms"})
RATIO_FORMULA = (
    "Each repeat measures both models next to each other, in alternating order, in processes of its own. Servers "
    "given by URL are measured as they run: by how much one of them is faster by chance, the interval cannot tell. "
    "ratio = exp(mean of ln(pruned / original) over repeats), with the 95 % t-interval of that mean; gain = the ratio"
    " where higher is better, its inverse where lower is better, so that a gain above 1 is always an improvement. An "
    "interval that contains 1 shows no difference. The primary metric was named before anything was measured and "
    "alone decides; the others are exploratory: of many intervals at 95 %, some miss by chance."
)


def request_metrics(requests: Sequence[RequestTimes], *, input_len: int) -> dict[str, float | None]:
    """One repeat's metrics.

    Args:
        requests: At least one.
        input_len: Tokens of each prompt.

    Returns:
        A value for each of :data:`METRICS`; ``None`` where it is undefined (no gaps with one output token).
    """
    duration_s = max(r.token_times_s[-1] for r in requests) - min(r.start_s for r in requests)
    num_output_tokens = sum(len(r.token_times_s) for r in requests)
    times = _times_ms(requests)
    return {
        "output_throughput": num_output_tokens / duration_s,
        "total_token_throughput": (num_output_tokens + input_len * len(requests)) / duration_s,
        "request_throughput": len(requests) / duration_s,
        **{f"mean_{name}_ms": fmean(values) if values else None for name, values in times.items()},
        "p99_itl_ms": percentile(times["itl"], 99) if times["itl"] else None,
    }


def request_percentiles(requests: Sequence[RequestTimes]) -> dict[str, dict[str, float] | None]:
    """One repeat's distributions: for each of :data:`DISTRIBUTED`, percentile to ms; ``None`` where undefined."""
    return {
        name: {str(percent): percentile(values, percent) for percent in PERCENTILES} if values else None
        for name, values in _times_ms(requests).items()
    }


def _times_ms(requests: Sequence[RequestTimes]) -> dict[str, list[float]]:
    """TTFT, TPOT and E2EL of every request and the pooled gaps between tokens; the second and third may be empty."""
    stamps = [(each.start_s, each.token_times_s) for each in requests]
    gaps = [later - before for _, times in stamps for before, later in pairwise(times)]
    seconds = {
        "ttft": [times[0] - start for start, times in stamps],
        "tpot": [(times[-1] - times[0]) / (len(times) - 1) for _, times in stamps if len(times) > 1],
        "itl": gaps,
        "e2el": [times[-1] - start for start, times in stamps],
    }
    return {name: [1000 * value for value in values] for name, values in seconds.items()}


def percentile(values: Sequence[float], percent: float) -> float:
    """Percentile with linear interpolation, as ``numpy.percentile`` does it and vLLM uses it."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def check_statistics() -> None:
    """Refuses to start what could not be evaluated in the end.

    Raises:
        MissingDependencyError: scipy is not installed.
    """
    try:
        import scipy.stats  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError("scipy", "demo") from error


def ratio_interval(original: Sequence[float], pruned: Sequence[float]) -> dict[str, float]:
    """The ratio pruned/original and its t-interval, from paired repeats.

    Args:
        original: One positive value a repeat.
        pruned: The values measured beside them.

    Returns:
        ``value`` (geometric mean of the pairs' ratios), ``low``, ``high`` and ``confidence``.
    """
    from scipy.stats import t

    logs = [math.log(after / before) for before, after in zip(original, pruned, strict=True)]
    center, count = fmean(logs), len(logs)
    standard_error = math.sqrt(sum((log - center) ** 2 for log in logs) / (count - 1) / count)
    margin = float(t.ppf((1 + CONFIDENCE) / 2, count - 1)) * standard_error
    return {
        "value": math.exp(center),
        "low": math.exp(center - margin),
        "high": math.exp(center + margin),
        "confidence": CONFIDENCE,
    }


def check_primary(primary: str, *, output_len: int | None, undefined: frozenset[str] | set[str] = frozenset()) -> None:
    """Refuses a primary metric that nobody measures, or that this load or engine leaves ``undefined``.

    Raises:
        SenteiError: Not one of :data:`METRICS`, or about the gap between tokens where there is one token.
    """
    names = [metric.name for metric in METRICS]
    if primary not in names:
        raise SenteiError(f"The primary metric {primary!r} is not known.", f"Choose one of {', '.join(names)}.")
    if primary in undefined:
        raise SenteiError(f"The primary metric {primary} is undefined with this engine.", "Choose another.")
    if output_len == 1 and primary in BETWEEN_TOKENS:
        raise SenteiError(f"The primary metric {primary} is undefined where every answer has one token.")


def compare(
    runs: Sequence[Mapping[str, Any]], *, primary: str = DEFAULT_PRIMARY, metrics: Sequence[Metric] = METRICS
) -> dict[str, dict[str, Any]]:
    """Sets the models' repeats side by side, metric by metric.

    Args:
        runs: One mapping a repeat, with ``original`` and ``pruned`` metrics, or ``original`` alone.
        primary: The metric that decides, named before anything was measured.
        metrics: What to compare.

    Returns:
        By metric name: what it is, its ``role`` (``primary`` or ``exploratory``), each model's median and values,
        ``ratio``, ``gain`` and ``verdict`` (``better``, ``worse`` or ``no difference shown``). Metrics that are
        undefined for this workload are null.
    """
    return {metric.name: _compare_metric(metric, runs, primary) for metric in metrics}


def _compare_metric(metric: Metric, runs: Sequence[Mapping[str, Any]], primary: str) -> dict[str, Any]:
    values = {side: [run[side].get(metric.name) for run in runs if side in run] for side in SIDES}
    defined = {
        side: bool(each) and all(value is not None and value > 0 for value in each) for side, each in values.items()
    }
    ratio = ratio_interval(values["original"], values["pruned"]) if all(defined.values()) else None
    gain = gain_of(ratio, metric.better) if ratio else None
    return {
        "role": "primary" if metric.name == primary else "exploratory",
        "unit": metric.unit,
        "better": metric.better,
        "formula": metric.formula,
        **{side: {"median": median(each) if defined[side] else None, "values": each} for side, each in values.items()},
        "ratio": ratio,
        "gain": gain,
        "verdict": verdict_on(gain) if gain else None,
    }


def gain_of(ratio: Mapping[str, float], better: str) -> dict[str, float]:
    """A ratio with its interval turned so that above 1 is an improvement."""
    if better == "higher":
        return dict(ratio)
    inverse = {"value": 1 / ratio["value"], "low": 1 / ratio["high"], "high": 1 / ratio["low"]}
    return {**inverse, "confidence": ratio["confidence"]}


def verdict_on(gain: Mapping[str, float]) -> str:
    """``better``, ``worse``, or ``no difference shown`` where the interval contains 1."""
    if gain["low"] > 1:
        return "better"
    return "worse" if gain["high"] < 1 else "no difference shown"
