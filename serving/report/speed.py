"""The report's part on speed: from ``results.json`` to sentences, tables and charts."""

from collections.abc import Mapping, Sequence
from typing import Any

from serving.benchmark.ratios import SIDES
from serving.report import speed_charts as charts
from serving.report.format import flatten, format_bytes, format_change, format_count, format_ratio
from serving.report.translate import Say
from serving.saved_json import Source, fields_of

LABELS = {
    "output_throughput": "Output throughput",
    "total_token_throughput": "Total throughput",
    "request_throughput": "Requests answered",
    "mean_ttft_ms": "Time to first token",
    "mean_tpot_ms": "Time per output token",
    "mean_itl_ms": "Gap between tokens",
    "p99_itl_ms": "Gap between tokens, p99",
    "mean_e2el_ms": "Whole request",
    "max_request_rate": "Highest rate within the limits",
    "request_goodput": "Goodput at that rate",
    "num_parameters": "Parameters",
    "weight_bytes": "Weights",
    "size_on_disk_bytes": "Size on disk",
    "peak_memory_bytes": "Peak memory",
    "kv_bytes_per_token": "KV cache per token",
    "kv_cache_tokens": "Tokens the KV cache holds",
    "startup_s": "Start-up time",
    "startup_cold_s": "Start-up time, first start",
    "startup_warm_s": "Start-up time, later starts",
    "energy_per_output_token_j": "Energy per output token",
}
# The curves of a sweep, and the distributions.
_LATENCIES = {"mean_ttft_ms": "TTFT", "mean_tpot_ms": "TPOT", "mean_e2el_ms": "E2EL"}
_TIMES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "E2EL"}
_CHARTED = ("output_throughput", "mean_ttft_ms", "mean_tpot_ms", "mean_e2el_ms")
# Formulas of files from before. The first is from when a server passed that answered half of what arrived.
FORMER_RATE_FORMULA = (
    "highest Poisson request rate tried at which 90% of the requests met every objective and at least 50% as many a "
    "second were answered as arrived; from the rate of 20 or more requests sent at once it is halved until they do, or "
    "doubled while they do, then four bisections on a logarithmic scale, so the rate found is up to 4.4 % below the "
    "highest; failed requests miss their objectives"
)
FORMER_FORMULAS = (
    FORMER_RATE_FORMULA,
    "requests that met every objective / wall-clock time, at that rate (vLLM's request_goodput)",
    "tokens that fit into the server's KV cache, from its log; both were given the same memory",
    "from starting the engine until it could answer: loading, compiling and vLLM's own warm-up; the last start",
    # From when layers with a sliding window counted as if they attended to all tokens.
    "gain = FLOPs of the original / FLOPs of the pruned model for one prompt of input_len tokens; FLOPs = 2 x block "
    "matrix parameters x input_len + 2 x head parameters x positions the engine computes logits for + 2 x input_len^2 "
    "x query width per attending layer (causal scores and values)",
    "gain = bytes read per step by the original / by the pruned model; bytes = all weights (the head's included, an "
    "untied embedding table left out: only its looked-up rows are read) + concurrency x KV bytes per token x "
    "(input_len + output_len / 2); holds where memory is the bound, at small batches",
)
_ENGINES = {
    "transformers": "Transformers",
    "onnx": "ONNX Runtime",
    "onnx-server": "ONNX Runtime, server",
    "vllm": "vLLM",
    "vllm-offline": "vLLM, offline",
}


def benchmark_view(source: Source, number: int, say: Say) -> dict[str, Any]:
    """What the template prints of one benchmark. The verdict is about its first load.

    Args:
        source: ``results.json``.
        number: Makes the charts' ids unique.
        say: The page's language.

    Raises:
        SenteiError: The file lacks fields.
        MissingDependencyError: plotly is not installed.
    """
    with fields_of(source) as results:
        engine, primary = _ENGINES.get(results["engine"], str(results["engine"])), results["primary_metric"]
        measurements = results["measurements"]
        first = measurements[0]
        metrics, expected = first["metrics"], first["expected"]
        speed = _speed(metrics[primary], expected.get(primary), say)
        load, label = load_label(first["workload"], say), LABELS.get(primary, primary)
        return {
            "engine": engine,
            "load": load,
            "alone": None
            if "pruned" in results["models"] or any(first["failed_requests"].values())
            else _metric_row(primary, metrics[primary], None, say)["original"],
            "primary": say(label),
            "primary_inside": label[0].lower() + label[1:] if say.language == "en" else say(label),
            "speed": speed and {"engine": engine, "load": load, **speed},
            "loads": [_load(each, f"{number}-{i}", primary, say) for i, each in enumerate(measurements)],
            "curves": _curves(measurements, str(number), say),
            "goodput": _goodput(results["goodput"], str(number), say) if results["goodput"] else None,
            "cost": _costs(measurements, say),
            "gpu_state": say(results["gpu_state"]),
            "failed_attempts": results["failed_attempts"],
            "sizes": [
                _size_row(name, entry, say)
                for name, entry in results["sizes"].items()
                if any(entry[side] is not None for side in SIDES)
            ],
            "options": flatten(results["options"], say),
            "models": {say(side): flatten(told, say) for side, told in results["models"].items()},
            "environment": flatten(results["environment"], say),
            "formulas": _formulas(
                {**metrics, **(results["goodput"] or {}).get("metrics", {})}, results["sizes"], expected, say
            ),
            "ratio_formula": say(results["ratio_formula"]),
            "repeats": len(first["runs"]),
        }


def load_label(workload: Mapping[str, Any], say: Say) -> str:
    """A load in a few words."""
    return say(
        "%(input)s tokens in, %(output)s out, %(hard)s",
        input=workload["input_len"], output=workload["output_len"], hard=_how_hard(workload, say),
    )  # fmt: skip


def _how_hard(workload: Mapping[str, Any], say: Say) -> str:
    parts = []
    if workload["request_rate"]:
        parts.append(say("%(rate)s requests/s", rate=f"{workload['request_rate']:g}"))
    if workload["concurrency"]:
        parts.append(say("%(count)s at a time", count=workload["concurrency"]))
    return ", ".join(parts)


def _load(measurement: Mapping[str, Any], name: str, primary: str, say: Say) -> dict[str, Any]:
    metrics, expected = measurement["metrics"], measurement["expected"]
    charted = [
        (say(LABELS[metric]), metrics[metric]["gain"], expected.get(metric, {}).get("gain"))
        for metric in _CHARTED
        if metrics.get(metric, {}).get("gain")
    ]
    return {
        "label": load_label(measurement["workload"], say),
        "hard": _how_hard(measurement["workload"], say),
        "primary": _metric_row(primary, metrics[primary], expected.get(primary), say),
        "rows": [_metric_row(each, metric, expected.get(each), say) for each, metric in metrics.items()],
        "chart": charts.gain_chart(name, charted, say) if charted else None,
        "distributions": _distributions(measurement["percentiles"], name, say),
        "failed": {say(side): count for side, count in measurement["failed_requests"].items() if count},
        "causes": [_cause(each, say) for each in measurement.get("why_not_more") or []],
        "gap": _gap(measurement["gap"], say) if measurement.get("gap") else None,
        "roofline": _roofline(measurement.get("roofline") or {}, say),
        "workload": flatten({name: each for name, each in measurement["workload"].items() if each is not None}, say),
        "runs": _raw_values(metrics, say),
        "repeats": len(measurement["runs"]),
    }


def _speed(metric: Mapping[str, Any], expected: Mapping[str, Any] | None, say: Say) -> dict[str, Any] | None:
    """The verdict on the primary metric, in plain words."""
    gain = metric["gain"]
    if not gain:
        return None
    return {
        "verdict": metric["verdict"],
        "gain": _times(gain["value"], say),
        "interval": _interval(gain, say),
        "original": f"{metric['original']['median']:.4g}",
        "pruned": f"{metric['pruned']['median']:.4g}",
        "unit": say(metric["unit"]),
        "expected": _times(expected["gain"], say) if expected else None,
        "against_expected": _against_expected(gain, expected["gain"], say) if expected else None,
    }


def _times(value: float, say: Say) -> str:
    return say("%(value)sx", value=format_ratio(value))


def _interval(gain: Mapping[str, float], say: Say) -> str:
    return say("%(low)sx to %(high)sx", low=format_ratio(gain["low"]), high=format_ratio(gain["high"]))


def _against_expected(gain: Mapping[str, float], expected: float, say: Say) -> str:
    if gain["high"] < expected:
        return say("The measurement falls short of it.")
    if gain["low"] > expected:
        return say("The measurement is above it.")
    if gain["low"] <= 1 <= gain["high"]:
        return say("The interval holds that too: measure again with more repeats, on a machine that does nothing else.")
    return say("That lies inside the measured interval.")


def _metric_row(name: str, metric: Mapping[str, Any], expected: Mapping[str, Any] | None, say: Say) -> dict[str, Any]:
    gain, unit = metric["gain"], say(metric["unit"])
    medians = {side: metric[side]["median"] for side in SIDES}
    return {
        "name": name,
        "label": say(LABELS.get(name, name)),
        **{
            side: f"{value:.4g} {unit}" if value is not None else "" if not metric[side]["values"] else say("undefined")
            for side, value in medians.items()
        },
        "gain": _times(gain["value"], say) if gain else None,
        "interval": _interval(gain, say) if gain else None,
        "expected": _times(expected["gain"], say) if expected else None,
        "verdict": metric["verdict"],
    }


def _curves(measurements: Sequence[Mapping[str, Any]], name: str, say: Say) -> list[dict[str, str]]:
    """Latency against throughput, where several loads of one kind were measured and none failed."""
    drawn = []
    for kind in ("concurrency", "request_rate"):
        swept = [each for each in measurements if each["workload"][kind] and not any(each["failed_requests"].values())]
        if len(swept) < 2:
            continue
        for metric, label in _LATENCIES.items():
            points = {
                side: [_point(each, side, metric, say) for each in swept]
                for side in SIDES
                if all(each["metrics"][metric][side]["median"] for each in swept)
            }
            if points:
                drawn.append(charts.load_chart(f"curve-{name}-{kind}-{metric}", points, label, say))
    return drawn


def _point(measurement: Mapping[str, Any], side: str, metric: str, say: Say) -> dict[str, Any]:
    found = measurement["metrics"][metric][side]
    return {
        "throughput": measurement["metrics"]["output_throughput"][side]["median"],
        "ms": found["median"],
        "spread": (min(found["values"]), max(found["values"])),
        "load": _how_hard(measurement["workload"], say),
        "number": measurement["workload"]["concurrency"] or measurement["workload"]["request_rate"],
    }


def _distributions(percentiles: Mapping[str, Any], name: str, say: Say) -> list[dict[str, str]]:
    """The distributions that spread at all: requests of one batch share their times."""
    drawn = []
    for time, label in _TIMES.items():
        sides = {side: values for side, values in percentiles.get(time, {}).items() if values}
        if any(max(values.values()) > min(values.values()) for values in sides.values()):
            drawn.append(charts.percentile_chart(f"distribution-{name}-{time}", sides, label, say))
    return drawn


def _costs(measurements: Sequence[Mapping[str, Any]], say: Say) -> list[dict[str, Any]]:
    """What a million output tokens cost, load by load; empty where no price was given."""
    costs = [(_how_hard(each["workload"], say), each["cost"]["per_million_output_tokens"])
             for each in measurements if each["cost"]]  # fmt: skip
    return [
        {"hard": hard, **{side: f"{cost[side]:.4g}" if cost.get(side) else "" for side in SIDES}}
        for hard, cost in costs
    ]


def _goodput(found: Mapping[str, Any], name: str, say: Say) -> dict[str, Any]:
    metrics = found["metrics"]
    tried = {side: [each for run in found["runs"] for each in run[side]["tried"]]
             for side in SIDES if side in found["runs"][0]}  # fmt: skip
    rate = metrics["max_request_rate"]
    return {
        "limits": ", ".join(f"{time.upper()} ≤ {limit:g} ms" for time, limit in found["slo_ms"].items()),
        "attainment": f"{100 * found['attainment']:g}",
        "half_was_enough": rate["formula"] == FORMER_RATE_FORMULA,
        "speed": _speed(rate, None, say),
        "rows": [_metric_row(each, metric, None, say) for each, metric in metrics.items()],
        "unmet": [say(side) for side in tried if not all(rate[side]["values"])],
        "chart": charts.attainment_chart(f"goodput-{name}", tried, found["attainment"], say)
        if any(tried.values())
        else None,
    }


def _cause(cause: Mapping[str, Any], say: Say) -> str:
    return say(cause["message"], **cause["values"])


def _gap(gap: Mapping[str, Any], say: Say) -> dict[str, Any]:
    """The difference between measured and expected gain, in a sentence and a table of its causes."""
    values = {"expected": _times(gap["expected"], say), "measured": _times(gap["measured"], say),
              "metric": say(LABELS.get(gap["metric"], gap["metric"])), "interval": _interval(gap, say)}  # fmt: skip
    rows = [
        (_cause(each, say), say("not known") if each["share"] is None else _percent(each["share"]))
        for each in gap["causes"]
    ]
    return {
        "sentence": say("%(metric)s: %(measured)s measured (%(interval)s), below the %(expected)s expected.", **values)
        if gap["direction"] == "below"
        else say("%(metric)s: %(measured)s measured (%(interval)s), above the %(expected)s expected.", **values),
        "rows": [*rows, (say("unexplained"), _percent(gap["unexplained"]))],
    }


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _roofline(phases: Mapping[str, Any], say: Say) -> list[dict[str, str]]:
    return [
        {
            "phase": say(phase),
            **{side: f"{entry[side]['at_least_ms']:.4g} ms, {say(entry[side]['bound'])}" for side in SIDES},
            "intensity": f"{entry['pruned']['flops_per_byte']:.3g}",
            "gain": _times(entry["gain"], say),
        }
        for phase, entry in phases.items()
    ]


def _size_row(name: str, entry: Mapping[str, Any], say: Say) -> dict[str, Any]:
    show = {"bytes": format_bytes, "s": "{:.3g} s".format}.get(entry["unit"], format_count)
    return {
        "name": name,
        "label": say(LABELS.get(name, name)),
        **{side: say("not known") if entry[side] is None else show(entry[side]) for side in SIDES},
        "change": format_change(entry["ratio"]) if entry["ratio"] else None,
    }


def _formulas(
    metrics: Mapping[str, Any], sizes: Mapping[str, Any], expected: Mapping[str, Any], say: Say
) -> list[tuple[str, str]]:
    formulas = [(name, say(entry["formula"])) for name, entry in (*metrics.items(), *sizes.items())]
    phases = {entry["phase"]: entry["formula"] for entry in expected.values()}
    return formulas + [(say("expected, %(phase)s", phase=say(phase)), say(text)) for phase, text in phases.items()]


def _raw_values(metrics: Mapping[str, Any], say: Say) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "side": say(side),
            "values": ["-" if value is None else f"{value:.4g}" for value in metric[side]["values"]],
        }
        for name, metric in metrics.items()
        for side in SIDES
        if metric[side]["values"]
    ]
