"""Two benchmarks of different days, machines or versions side by side, if they can be compared at all."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from serving.benchmark.journal import RESULTS_FILE
from serving.benchmark.ratios import SIDES, gain_of, verdict_on
from serving.saved_json import Source, blamed_for_fields, checked
from toolchain.errors import SenteiError
from toolchain.json_files import read_json_object
from toolchain.significance import check_statistics, welch_interval

FORMULA = (
    "ratio = exp(mean ln B - mean ln A) over the repeats of each run, with Welch's 95 % t-interval: the repeats of two "
    "runs are not pairs. An interval that contains 1 shows no difference."
)
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
        ``workload`` and by metric and side A's and B's geometric means, ``ratio`` B/A and ``verdict``), ``goodput``
        (likewise, with its ``slo_ms`` and the sides that left them ``unmet`` in a repeat; ``None`` where no rate was
        searched for in both), ``goodput_left_out`` (whether one was, and cannot be compared), ``left_out`` (how many
        loads of one run alone) and ``formula``.

    Raises:
        SenteiError: Not two benchmarks, or not comparable; the message says why.
        MissingDependencyError: scipy is not installed.
    """
    check_statistics("demo")
    runs = [_read(path) for path in (one, other)]
    with blamed_for_fields(f"{one} or {other}"):
        return _compare(runs, one, other)


def _compare(runs: Sequence[Mapping[str, Any]], one: Path, other: Path) -> dict[str, Any]:
    for name in _SAME:
        if runs[0][name] != runs[1][name]:
            raise SenteiError(f"Not comparable: {name} is {runs[0][name]!r} in {one} and {runs[1][name]!r} in {other}.")
    originals = [run["models"]["original"] for run in runs]
    if originals[0]["weights_sha256"] != originals[1]["weights_sha256"]:
        raise SenteiError(
            "Not comparable: the originals differ, "
            + " and ".join(f"{each['name']} (SHA-256 {each['weights_sha256'][:16]})" for each in originals) + "."
        )  # fmt: skip
    for side in SIDES:
        precisions = [run["models"].get(side, {}).get("precision") for run in runs]
        if precisions[0] != precisions[1]:
            raise SenteiError(f"Not comparable: the {side} model is {precisions[0]} in A and {precisions[1]} in B.")
    loads = [{_load(each): each for each in run["measurements"]} for run in runs]
    shared = [load for load in loads[0] if load in loads[1]]
    if not shared:
        raise SenteiError(
            "Not comparable: no load was measured in both (lengths, requests, how many in flight, rate, prompts)."
        )
    _check_formulas(*(run["measurements"][0]["metrics"] for run in runs))
    goodput = _compare_goodput(*runs)
    return {
        "formula": FORMULA,
        "changed": _changed(_circumstances(runs[0]), _circumstances(runs[1])),
        "loads": [_compare_load(loads[0][load], loads[1][load]) for load in shared],
        "left_out": len(loads[0]) + len(loads[1]) - 2 * len(shared),
        "goodput": goodput,
        "goodput_left_out": goodput is None and any(run.get("goodput") for run in runs),
    }


def _check_formulas(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    for name in one.keys() & other.keys():
        if one[name]["formula"] != other[name]["formula"]:
            raise SenteiError(f"Not comparable: {name} was computed in another way.", "Measure again with one sentei.")


def _read(path: Path) -> Mapping[str, Any]:
    file = path / RESULTS_FILE if path.is_dir() else path
    if not file.is_file():
        raise SenteiError(f"There is no {file}.", f"Give a benchmark's {RESULTS_FILE}, or its directory.")
    content = read_json_object(file)
    if content.get("kind") != "benchmark":
        raise SenteiError(f"{file} is not a benchmark's {RESULTS_FILE}.")
    return checked(Source(path=file, content=content)).content


def _load(measurement: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(measurement["workload"].get(name) for name in _LOAD)


def _compare_load(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    # Rates and times of the requests that got through say nothing of those that did not.
    failed = {side: sum(each["failed_requests"].get(side, 0) for each in (one, other)) for side in SIDES}
    sides = [side for side in SIDES if not failed[side]]
    metrics = _compare_metrics(one["metrics"], other["metrics"], sides)
    return {"workload": one["workload"], "failed_requests": failed, "metrics": metrics}


def _compare_goodput(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any] | None:
    """The highest rates, if both runs searched for them under the same limits, with requests of the same lengths."""
    if not one.get("goodput") or not other.get("goodput") or _objectives(one) != _objectives(other):
        return None
    before, after = one["goodput"]["metrics"], other["goodput"]["metrics"]
    _check_formulas(before, after)
    rates = [each["max_request_rate"] for each in (before, after)]
    unmet = [side for side in SIDES if not all(value for rate in rates for value in rate[side]["values"])]
    return {"slo_ms": one["goodput"]["slo_ms"], "metrics": _compare_metrics(before, after, SIDES), "unmet": unmet}


def _objectives(run: Mapping[str, Any]) -> tuple[Any, ...]:
    # The search asks requests of the first load's lengths.
    asked, goodput = run["measurements"][0]["workload"], run["goodput"]
    return goodput["slo_ms"], goodput["attainment"], [asked.get(name) for name in _LENGTHS]


def _compare_metrics(one: Mapping[str, Any], other: Mapping[str, Any], sides: Sequence[str]) -> dict[str, Any]:
    return {
        name: {
            "unit": metric["unit"],
            "role": metric["role"],
            **{side: _compare_side(metric, other[name], side) if side in sides else None for side in SIDES},
        }
        for name, metric in one.items()
        if name in other
    }


def _compare_side(one: Mapping[str, Any], other: Mapping[str, Any], side: str) -> dict[str, Any] | None:
    values = [metric[side]["values"] for metric in (one, other)]
    if not all(values) or any(value is None or value <= 0 for each in values for value in each):
        return None
    ratio = welch_interval(*values)
    return {"a": math.exp(fmean(map(math.log, values[0]))), "b": math.exp(fmean(map(math.log, values[1]))),
            "ratio": ratio, "verdict": verdict_on(gain_of(ratio, one["better"]))}  # fmt: skip


def _circumstances(run: Mapping[str, Any]) -> dict[str, Any]:
    return {part: run[part] for part in ("models", "options", "environment")}


def _changed(one: Any, other: Any, name: str = "") -> list[list[Any]]:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return [
            row
            for key in sorted(one.keys() | other.keys())
            for row in _changed(one.get(key), other.get(key), f"{name}.{key}" if name else key)
        ]
    return [] if one == other else [[name, one, other]]
