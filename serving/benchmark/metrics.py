"""From timestamps to vLLM's metrics.

Names and formulas are those of ``vllm bench serve``, so that the figures of every engine can stand in one table.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Literal

from toolchain.errors import SenteiError


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
