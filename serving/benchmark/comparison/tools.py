"""Two benchmarks side by side, one or both made by another tool: what can be compared, and why the rest cannot."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from serving.benchmark.comparison.other_tools import MAX_BYTES, ToolRun, read_tool_runs
from serving.benchmark.comparison.runs import SIDES, compare_results, results_file
from serving.benchmark.metrics import METRICS
from serving.benchmark.ratios import gain_of, verdict_on
from serving.benchmark.results_document import ResultsDocument
from serving.saved_json import Source, checked
from toolchain.documents import check_document
from toolchain.errors import SenteiError
from toolchain.json_files import read_json_object
from toolchain.significance import check_statistics, welch_interval

NO_INTERVAL = (
    "A single run has no interval: whether its difference is more than chance cannot be said. Measure each several "
    "times."
)
# Tokens that a tool adds to a random prompt, or counts otherwise.
_SAME_LENGTH, _SAME_RATE = 0.03, 0.01
Values = Mapping[str, Sequence[float]]


def compare_files(one: Path, other: Path) -> dict[str, Any]:
    """Sets B beside A, whichever tools measured them.

    Args:
        one: A's file, or the directory of a ``results.json``.
        other: B's.

    Returns:
        Of two of sentei's, see :func:`serving.benchmark.comparison.runs.compare_results`. Else ``pairs`` (for each two
        loads that are alike: ``a`` and ``b``, which say what was measured, and by metric ``a``, ``b``, ``ratio`` B/A
        and ``verdict``, both ``None`` in their interval where one of them is a single run), ``not_compared`` (what is
        left out: ``[name, why]``) and ``note``.

    Raises:
        SenteiError: A file that no known tool wrote, or nothing that is comparable; the message says why.
        MissingDependencyError: scipy is not installed.
    """
    check_statistics("demo")
    files = [results_file(path) for path in (one, other)]
    contents = [read_json_object(file, max_bytes=MAX_BYTES) for file in files]
    if all(content.get("kind") == "benchmark" for content in contents):
        return compare_results(one, other)
    runs = [_runs(content, file) for content, file in zip(contents, files, strict=True)]
    pairs = [(a, b) for a in runs[0] for b in runs[1] if not _load_difference(a[0], b[0])]
    if not pairs:
        raise SenteiError(
            "Not comparable: no load was measured in both. " + _nearest_difference(runs[0], runs[1]),
            "Measure both with prompts and answers of the same lengths, and as many requests in flight.",
        )
    return {
        "pairs": [_pair(a, b) for a, b in pairs],
        "not_compared": _left_out([each for pair in pairs for each in pair]),
        "note": NO_INTERVAL if any(len(v) < 2 for pair in pairs for _, vs in pair for v in vs.values()) else "",
    }


def _runs(content: Mapping[str, Any], file: Path) -> list[tuple[ToolRun, Values]]:
    """Each load of each model, and by metric the values of its repeats."""
    if content.get("kind") == "benchmark":
        return _own_runs(
            check_document(checked(Source(path=file, content=content)).content, str(file), ResultsDocument)
        )
    return [(run, {name: [value] for name, value in run.metrics.items()}) for run in read_tool_runs(content, file)]


def _own_runs(document: ResultsDocument) -> list[tuple[ToolRun, Values]]:
    runs: list[tuple[ToolRun, Values]] = []
    for measurement in document.measurements:
        load = measurement.workload
        for side in SIDES:
            if (model := getattr(document.models, side)) is None:
                continue
            values = {
                name: [value for value in getattr(metric, side).values if value]
                for name, metric in measurement.metrics.items()
            }
            run = ToolRun(
                tool=f"sentei, {document.engine}",
                model=f"{side} ({model.name})",
                input_len=load.input_len,
                output_len=load.output_len,
                concurrency=load.concurrency,
                request_rate=load.request_rate,
                arrivals="closed" if load.request_rate is None else "poisson",
                metrics={name: fmean(each) for name, each in values.items() if each},
                failed=measurement.failed_requests.get(side, 0),
            )
            runs.append((run, {name: each for name, each in values.items() if each}))
    return runs


def _load_difference(a: ToolRun, b: ToolRun) -> str:
    """What sets two loads apart; empty where they are alike."""
    for name, what in (("input_len", "tokens in"), ("output_len", "tokens out")):
        before, after = getattr(a, name), getattr(b, name)
        if abs(after - before) > max(1.0, _SAME_LENGTH * before):
            return f"{before:.4g} {what} in A and {after:.4g} in B"
    if a.arrivals != b.arrivals:
        return f"requests arrive {a.arrivals!r} in A and {b.arrivals!r} in B"
    if a.concurrency != b.concurrency:
        return f"{a.concurrency or 'any number of'} requests at a time in A and {b.concurrency or 'any number'} in B"
    rates = a.request_rate, b.request_rate
    if rates[0] and rates[1] and abs(rates[1] / rates[0] - 1) > _SAME_RATE:
        return f"{rates[0]:.4g} requests/s in A and {rates[1]:.4g} in B"
    return ""


def _nearest_difference(one: Sequence[tuple[ToolRun, Values]], other: Sequence[tuple[ToolRun, Values]]) -> str:
    return f"The first of each: {_load_difference(one[0][0], other[0][0])}."


def _pair(a: tuple[ToolRun, Values], b: tuple[ToolRun, Values]) -> dict[str, Any]:
    failed = {"a": a[0].failed, "b": b[0].failed}
    # Rates and times of the requests that got through say nothing of those that did not.
    names = [] if any(failed.values()) else [each.name for each in METRICS if each.name in a[1] and each.name in b[1]]
    better = {each.name: each for each in METRICS}
    return {
        "a": _told(a[0]),
        "b": _told(b[0]),
        "failed_requests": failed,
        "metrics": {
            name: {"unit": better[name].unit, **_ratio(a[1][name], b[1][name], better[name].better)} for name in names
        },
    }


def _ratio(before: Sequence[float], after: Sequence[float], better: str) -> dict[str, Any]:
    centers = [each[0] if len(each) == 1 else math.exp(fmean(map(math.log, each))) for each in (before, after)]
    found: dict[str, Any] = {"a": centers[0], "b": centers[1]}
    if len(before) < 2 or len(after) < 2:
        return {**found, "ratio": {"value": centers[1] / centers[0], "low": None, "high": None}, "verdict": None}
    ratio = welch_interval(before, after)
    return {**found, "ratio": ratio, "verdict": verdict_on(gain_of(ratio, better))}


def _told(run: ToolRun) -> dict[str, Any]:
    return {
        "tool": run.tool, "model": run.model, "input_len": run.input_len, "output_len": run.output_len,
        "concurrency": run.concurrency, "request_rate": run.request_rate, "arrivals": run.arrivals,
    }  # fmt: skip


def _left_out(runs: Sequence[tuple[ToolRun, Values]]) -> list[list[str]]:
    """What stays uncompared, once each: by another definition, or because only one of the tools has it."""
    told = {(f"{run.tool}: {name}", why) for run, _ in runs for name, why in run.left_out.items()}
    tools = {run.tool: set(values) for run, values in runs}
    for metric in METRICS:
        lacking = sorted(tool for tool, names in tools.items() if metric.name not in names)
        if lacking and len(lacking) < len(tools):
            told.add((metric.name, f"{' and '.join(lacking)} does not have it by this definition"))
    return [list(each) for each in sorted(told)]
