"""From repeats to a ratio with a confidence interval, a gain and a verdict, metric by metric."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from serving.benchmark.metrics import DEFAULT_PRIMARY, METRICS, Metric
from toolchain.significance import ratio_interval

SIDES = ("original", "pruned")
RATIO_FORMULA = (
    "Each repeat measures both models next to each other, in alternating order, in processes of its own. Servers "
    "given by URL are measured as they run: by how much one of them is faster by chance, the interval cannot tell. "
    "ratio = exp(mean of ln(pruned / original) over repeats), with the 95 % t-interval of that mean; gain = the ratio"
    " where higher is better, its inverse where lower is better, so that a gain above 1 is always an improvement. An "
    "interval that contains 1 shows no difference. The primary metric was named before anything was measured and "
    "alone decides; the others are exploratory: of many intervals at 95 %, some miss by chance."
)


def compare_repeats(
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
