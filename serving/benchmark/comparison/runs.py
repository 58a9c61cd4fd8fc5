"""Two benchmarks of different days, machines or versions side by side, if they can be compared at all."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from serving.benchmark.journal import RESULTS_FILE
from serving.benchmark.ratios import gain_of, verdict_on
from serving.benchmark.results_document import GoodputRecord, MeasurementRecord, ResultsDocument
from serving.forecast.estimate_document import Side
from serving.saved_json import Source, checked
from toolchain.documents import Number, check_document
from toolchain.errors import SenteiError
from toolchain.evaluate.metric_record import MetricRecord
from toolchain.json_files import read_json_object
from toolchain.significance import check_statistics, welch_interval

FORMULA = (
    "ratio = exp(mean ln B - mean ln A) over the repeats of each run, with Welch's 95 % t-interval: the repeats of two "
    "runs are not pairs. An interval that contains 1 shows no difference. The original, which both runs measured, is "
    "the yardstick of the pruned model: pruned_against_original = exp(mean ln (pruned B / original B) - mean ln "
    "(pruned A / original A)) over the pairs of repeats of each run, turned so that above 1 is better. What changed "
    "the original's speed from A to B is not in it."
)
Metrics = Mapping[str, MetricRecord]
SIDES: tuple[Side, ...] = ("original", "pruned")
_SAME = ("engine", "primary_metric")
_LENGTHS = ("input_len", "output_len", "range_ratio", "prompts", "ignore_eos")
_LOAD = (*_LENGTHS, "concurrency", "request_rate", "num_prompts")


def compare_results(one: Path, other: Path) -> dict[str, Any]:
    """Sets run B beside run A, load by load.

    Args:
        one: A's ``results.json``, or its directory.
        other: B's.

    Returns:
        ``changed`` (what differs of models, options and environment: ``[name, A's, B's]``), ``loads`` (for each:
        ``workload`` and by metric and side A's and B's geometric means and ``ratio`` B/A; ``verdict`` is the
        original's, and under ``pruned_against_original`` the pruned model's, by its gain over the original in A and in
        B), ``goodput`` (likewise, with its ``slo_ms`` and the sides that left them ``unmet`` in a repeat; ``None``
        where no rate was searched for in both), ``goodput_left_out`` (whether one was, and cannot be compared),
        ``left_out`` (how many loads of one run alone) and ``formula``.

    Raises:
        SenteiError: Not two benchmarks, or not comparable; the message says why.
        MissingDependencyError: scipy is not installed.
    """
    check_statistics("demo")
    return _compare(_read(one), _read(other), (one, other))


def _compare(one: ResultsDocument, other: ResultsDocument, where: Sequence[Path]) -> dict[str, Any]:
    _check_same_model(one, other, where)
    loads = [{_load(each): each for each in run.measurements} for run in (one, other)]
    shared = [load for load in loads[0] if load in loads[1]]
    if not shared:
        raise SenteiError(
            "Not comparable: no load was measured in both (lengths, requests, how many in flight, rate, prompts)."
        )
    _check_formulas(one.measurements[0].metrics, other.measurements[0].metrics)
    goodput = _compare_goodput(one, other)
    return {
        "formula": FORMULA,
        "changed": _changed(_circumstances(one), _circumstances(other)),
        "loads": [_compare_load(loads[0][load], loads[1][load]) for load in shared],
        "left_out": len(loads[0]) + len(loads[1]) - 2 * len(shared),
        "goodput": goodput,
        "goodput_left_out": goodput is None and bool(one.goodput or other.goodput),
    }


def _check_same_model(one: ResultsDocument, other: ResultsDocument, where: Sequence[Path]) -> None:
    for name in _SAME:
        if (before := getattr(one, name)) != (after := getattr(other, name)):
            raise SenteiError(f"Not comparable: {name} is {before!r} in {where[0]} and {after!r} in {where[1]}.")
    originals = [run.models.original for run in (one, other)]
    if originals[0].weights_sha256 != originals[1].weights_sha256:
        raise SenteiError(
            "Not comparable: the originals differ, "
            + " and ".join(f"{each.name} (SHA-256 {each.weights_sha256[:16]})" for each in originals) + "."
        )  # fmt: skip
    for side in SIDES:
        models = [getattr(run.models, side) for run in (one, other)]
        before, after = (model.precision if model else None for model in models)
        if before != after:
            raise SenteiError(f"Not comparable: the {side} model is {before} in A and {after} in B.")


def _check_formulas(one: Metrics, other: Metrics) -> None:
    for name in one.keys() & other.keys():
        if one[name].formula != other[name].formula:
            raise SenteiError(f"Not comparable: {name} was computed in another way.", "Measure again with one sentei.")


def results_file(path: Path) -> Path:
    """A benchmark's file, from it or its directory.

    Raises:
        SenteiError: It is not there.
    """
    file = path / RESULTS_FILE if path.is_dir() else path
    if not file.is_file():
        raise SenteiError(f"There is no {file}.", f"Give a benchmark's {RESULTS_FILE}, or its directory.")
    return file


def _read(path: Path) -> ResultsDocument:
    file = results_file(path)
    content = read_json_object(file)
    if content.get("kind") != "benchmark":
        raise SenteiError(f"{file} is not a benchmark's {RESULTS_FILE}.")
    return check_document(checked(Source(path=file, content=content)).content, str(file), ResultsDocument)


def _load(measurement: MeasurementRecord) -> tuple[Any, ...]:
    return tuple(getattr(measurement.workload, name) for name in _LOAD)


def _compare_load(one: MeasurementRecord, other: MeasurementRecord) -> dict[str, Any]:
    # Rates and times of the requests that got through say nothing of those that did not.
    failed = {side: sum(each.failed_requests.get(side, 0) for each in (one, other)) for side in SIDES}
    sides = [side for side in SIDES if not failed[side]]
    metrics = _compare_metrics(one.metrics, other.metrics, sides)
    return {"workload": one.workload.model_dump(), "failed_requests": failed, "metrics": metrics}


def _compare_goodput(one: ResultsDocument, other: ResultsDocument) -> dict[str, Any] | None:
    """The highest rates, if both runs searched for them under the same limits, with requests of the same lengths."""
    if (
        one.goodput is None
        or other.goodput is None
        or _objectives(one, one.goodput) != _objectives(other, other.goodput)
    ):
        return None
    before, after = (dict(each.metrics) for each in (one.goodput, other.goodput))
    if any(before[name].formula != after[name].formula for name in before):
        return None  # an older rule let a server pass that answered half of what arrived
    rates = [each["max_request_rate"] for each in (before, after)]
    unmet = [side for side in SIDES if not all(value for rate in rates for value in getattr(rate, side).values)]
    return {"slo_ms": one.goodput.slo_ms, "metrics": _compare_metrics(before, after, SIDES), "unmet": unmet}


def _objectives(run: ResultsDocument, goodput: GoodputRecord) -> tuple[Any, ...]:
    # The search asks requests of the first load's lengths.
    asked = run.measurements[0].workload
    return goodput.slo_ms, goodput.attainment, [getattr(asked, name) for name in _LENGTHS]


def _compare_metrics(one: Metrics, other: Metrics, sides: Sequence[Side]) -> dict[str, Any]:
    return {
        name: {
            "unit": metric.unit,
            "role": metric.role,
            **_compare_models(metric, other[name], sides),
        }
        for name, metric in one.items()
        if name in other
    }


def _compare_models(one: MetricRecord, other: MetricRecord, sides: Sequence[Side]) -> dict[str, Any]:
    found: dict[str, Any] = {side: _compare_side(one, other, side) if side in sides else None for side in SIDES}
    gains = [_gains(metric) if len(sides) == 2 else [] for metric in (one, other)]
    if found["pruned"] is None or not all(gains):
        return {**found, "pruned_against_original": None}
    # A faster machine makes every model faster: by itself that says nothing of what was pruned.
    pruned, ratio = {**found["pruned"], "verdict": None}, welch_interval(*gains)
    return {
        **found,
        "pruned": pruned,
        "pruned_against_original": {
            "a": math.exp(fmean(map(math.log, gains[0]))), "b": math.exp(fmean(map(math.log, gains[1]))),
            "ratio": ratio, "verdict": verdict_on(ratio),
        },
    }  # fmt: skip


def _gains(metric: MetricRecord) -> list[float]:
    """How much better the pruned model was in each pair of repeats; empty where one of them is undefined."""
    pairs = [_all_positive(getattr(metric, side).values) for side in SIDES]
    if not all(pairs) or len(pairs[0]) != len(pairs[1]):
        return []
    ratios = [pruned / original for original, pruned in zip(*pairs, strict=True)]
    return ratios if metric.better == "higher" else [1 / each for each in ratios]


def _compare_side(one: MetricRecord, other: MetricRecord, side: Side) -> dict[str, Any] | None:
    before, after = (_all_positive(getattr(metric, side).values) for metric in (one, other))
    if not before or not after:
        return None
    ratio = welch_interval(before, after)
    return {"a": math.exp(fmean(map(math.log, before))), "b": math.exp(fmean(map(math.log, after))),
            "ratio": ratio, "verdict": verdict_on(gain_of(ratio, one.better))}  # fmt: skip


def _all_positive(values: Sequence[Number | None]) -> list[Number]:
    """The values; empty where one of them is undefined or has no logarithm."""
    found = [value for value in values if value is not None and value > 0]
    return found if len(found) == len(values) else []


def _circumstances(run: ResultsDocument) -> dict[str, Any]:
    return run.model_dump(include={"models", "options", "environment"}, exclude_unset=True)


def _changed(one: Any, other: Any, name: str = "") -> list[list[Any]]:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return [
            row
            for key in sorted(one.keys() | other.keys())
            for row in _changed(one.get(key), other.get(key), f"{name}.{key}" if name else key)
        ]
    return [] if one == other else [[name, one, other]]
