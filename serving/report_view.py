"""From the files' numbers to the sentences and tables of the report. No HTML here but the charts' fragments."""

from collections.abc import Mapping, Sequence
from typing import Any

from serving import report_charts as charts
from serving.evaluation_view import evaluation_view
from serving.report_inputs import ReportInputs, Source, fields_of
from toolchain.plan import PlanDocument

_LABELS = {
    "output_throughput": "Output throughput",
    "total_token_throughput": "Total throughput",
    "request_throughput": "Requests answered",
    "mean_ttft_ms": "Time to first token",
    "mean_tpot_ms": "Time per output token",
    "mean_itl_ms": "Gap between tokens",
    "p99_itl_ms": "Gap between tokens, p99",
    "mean_e2el_ms": "Whole request",
    "num_parameters": "Parameters",
    "weight_bytes": "Weights",
    "size_on_disk_bytes": "Size on disk",
    "peak_memory_bytes": "Peak memory",
    "kv_bytes_per_token": "KV cache per token",
    "kv_cache_tokens": "Tokens the KV cache holds",
}
_CHARTED = ("output_throughput", "mean_ttft_ms", "mean_tpot_ms", "mean_e2el_ms")
_ENGINES = {"transformers": "Transformers", "onnx": "ONNX Runtime", "vllm": "vLLM"}


def build_view(inputs: ReportInputs) -> dict[str, Any]:
    """Everything the template prints.

    Raises:
        SenteiError: A file lacks fields.
        MissingDependencyError: plotly is not installed.
    """
    document = inputs.plan.document if inputs.plan else None
    benchmarks = [_benchmark(source, number) for number, source in enumerate(inputs.benchmarks)]
    quality = _quality(inputs, document)
    return {
        "title": _title(inputs, document),
        "size": _size(inputs),
        "quality": quality,
        "evaluation": evaluation_view(inputs.evaluations),
        "speeds": [benchmark["speed"] for benchmark in benchmarks],
        "layers": _layers(inputs) if inputs.plan else None,
        "trace": _trace(document) if document and document.trace else None,
        "benchmarks": benchmarks,
        "verifications": [_verification(source) for source in inputs.verifications],
        "provenance": _provenance(document) if document else None,
    }


def _title(inputs: ReportInputs, document: PlanDocument | None) -> str:
    if document:
        return document.base_model.name
    if inputs.summary:
        with fields_of(inputs.summary) as summary:
            return str(summary["original"]["name"])
    if inputs.benchmarks:
        with fields_of(inputs.benchmarks[0]) as results:
            return str(results["models"]["original"]["name"])
    return "A pruned model"


def _size(inputs: ReportInputs) -> dict[str, Any] | None:
    """Stored weights before and after: from the checkpoint's summary, else from a benchmark."""
    if inputs.summary:
        with fields_of(inputs.summary) as summary:
            before, after = summary["original"], summary["pruned"]
            return {
                "original": format_bytes(before["weight_bytes"]),
                "pruned": format_bytes(after["weight_bytes"]),
                "change": format_change(after["weight_bytes"] / before["weight_bytes"]),
                "parameters": f"{format_count(before['num_parameters'])} → {format_count(after['num_parameters'])}",
                "sparsity": f"{100 * summary['sparsity']:.1f} %",
            }
    if inputs.benchmarks:
        with fields_of(inputs.benchmarks[0]) as results:
            weights = results["sizes"]["weight_bytes"]
            return {
                "original": format_bytes(weights["original"]),
                "pruned": format_bytes(weights["pruned"]),
                "change": format_change(weights["ratio"]),
                "parameters": None,
                "sparsity": None,
            }
    return None


def _quality(inputs: ReportInputs, document: PlanDocument | None) -> dict[str, Any] | None:
    """Perplexity before and after; text the plan was not made from comes first."""
    evaluated: dict[str, dict[str, Mapping[str, Any]]] = {}
    for source in inputs.evaluations:
        with fields_of(source) as content:
            for entry in content["evaluations"]:
                evaluated.setdefault(str(entry["text"]), {})[entry["model"]] = {
                    name: entry[name]
                    for name in ("perplexity", "standard_error", "num_windows", "seq_len", "num_tokens")
                }
    bars: list[tuple[str, float, float | None]] = []
    texts = [_evaluated(text, sides) for text, sides in evaluated.items() if {"original", "pruned"} <= set(sides)]
    if texts:
        first = texts[0]
        bars = [(side, first[side]["perplexity"], first[side]["standard_error"]) for side in ("original", "pruned")]
    calibration = _calibration_perplexity(inputs, document)
    if not bars and calibration:
        bars = [(name.replace("_", " "), value, None) for name, value in calibration.items()]
    if not bars:
        return None
    before, after = bars[0][1], bars[-1][1]
    return {
        "original": f"{before:.4g}",
        "pruned": f"{after:.4g}",
        "ratio": f"{after / before:.2f}",
        "change": format_change(after / before),
        "worse": after > before,
        "calibrated": not texts or bool(document and texts[0]["text"] == document.calibration.source),
        "text": texts[0]["text"] if texts else None,
        "texts": texts,
        "calibration": {name: f"{value:.4g}" for name, value in (calibration or {}).items()},
        "chart": charts.perplexity_chart(bars),
    }


def _evaluated(text: str, sides: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    original, pruned = sides["original"], sides["pruned"]
    return {
        "text": text,
        "original": original,
        "pruned": pruned,
        "change": format_change(pruned["perplexity"] / original["perplexity"]),
    }


def _calibration_perplexity(inputs: ReportInputs, document: PlanDocument | None) -> dict[str, float] | None:
    if document and document.healing:
        return None  # it is from before the healing
    if inputs.summary:
        with fields_of(inputs.summary) as summary:
            values = summary["calibration_metric"]
            known = {name: values[name] for name in ("original", "after_stage_1", "pruned")}
            if values["name"] == "perplexity" and known["original"] and known["pruned"]:
                return {name: float(value) for name, value in known.items() if value is not None}
    if document and document.metric == "perplexity":
        return {"original": document.metric_original, "pruned": document.metric_at_end}
    return None


def _layers(inputs: ReportInputs) -> dict[str, Any]:
    assert inputs.plan is not None
    layout, base = inputs.plan.layout, inputs.plan.document.base_model
    widths = [layer.intermediate_size for layer in layout]
    return {
        "chart": charts.layers_chart(layout, base.intermediate_size),
        "num_layers": len(layout),
        "removed_attention": list(inputs.plan.removed_attention),
        "width_range": f"{min(widths)}" if min(widths) == max(widths) else f"{min(widths)} to {max(widths)}",
        "original_width": base.intermediate_size,
        "ffn_kept": f"{100 * sum(widths) / (base.intermediate_size * len(layout)):.1f} %",
    }


def _trace(document: PlanDocument) -> dict[str, Any]:
    steps = [("original", document.metric_original), ("FFN narrowed", document.metric_after_stage_1)]
    steps += [(f"attention {step.removed}", step.metric) for step in document.trace]
    # A metric function's name is a person's text, and Plotly reads markup in labels.
    known = document.metric if document.metric in ("perplexity", "kl", "accuracy") else "metric"
    return {"chart": charts.trace_chart(steps, known), "steps": [(label, f"{value:.5g}") for label, value in steps]}


def _benchmark(source: Source, number: int) -> dict[str, Any]:
    with fields_of(source) as results:
        # One load today; a sweep will add measurements, and its first stays the one the verdict is about.
        measurement = results["measurements"][0]
        engine = _ENGINES.get(results["engine"], str(results["engine"]))
        metrics, expected = measurement["metrics"], measurement["expected"]
        rows = [_metric_row(name, metric, expected.get(name)) for name, metric in metrics.items()]
        charted = [
            (_LABELS[name], metrics[name]["gain"], expected.get(name, {}).get("gain"))
            for name in _CHARTED
            if metrics.get(name, {}).get("gain")
        ]
        primary, workload = results["primary_metric"], measurement["workload"]
        load = f"{workload['input_len']} tokens in, {workload['output_len']} out, {workload['concurrency']} at a time"
        speed = _speed(metrics[primary], expected.get(primary))
        return {
            "engine": engine,
            "load": load,
            "primary": _LABELS.get(primary, primary),
            "causes": [each["text"] for each in measurement.get("why_not_more", [])],
            "roofline": _roofline(measurement.get("roofline", {})),
            "failed_attempts": results.get("failed_attempts", []),
            "speed": speed and {"engine": engine, "load": load, **speed},
            "chart": charts.gain_chart(str(number), charted) if charted else None,
            "rows": rows,
            "sizes": [_size_row(name, entry) for name, entry in results["sizes"].items()],
            "workload": flatten(workload),
            "options": flatten(results["options"]),
            "models": {side: flatten(told) for side, told in results["models"].items()},
            "environment": flatten(results["environment"]),
            "formulas": _formulas(metrics, results["sizes"], expected),
            "ratio_formula": results["ratio_formula"],
            "repeats": len(measurement["runs"]),
            "runs": _raw_values(metrics),
        }


def _speed(metric: Mapping[str, Any], expected: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The verdict on the primary metric, in plain words."""
    gain = metric["gain"]
    if not gain:
        return None
    return {
        "verdict": metric["verdict"],
        "gain": f"{gain['value']:.2f}x",
        "interval": f"{gain['low']:.2f}x to {gain['high']:.2f}x",
        "original": f"{metric['original']['median']:.4g}",
        "pruned": f"{metric['pruned']['median']:.4g}",
        "unit": metric["unit"],
        "expected": f"{expected['gain']:.2f}x" if expected else None,
        "against_expected": _against_expected(gain, expected["gain"]) if expected else None,
    }


def _roofline(phases: Mapping[str, Any]) -> list[dict[str, str]]:
    return [
        {
            "phase": phase,
            **{side: f"{entry[side]['at_least_ms']:.4g} ms, {entry[side]['bound']}" for side in ("original", "pruned")},
            "intensity": f"{entry['pruned']['flops_per_byte']:.3g}",
            "gain": f"{entry['gain']:.2f}x",
        }
        for phase, entry in phases.items()
    ]


def _against_expected(gain: Mapping[str, float], expected: float) -> str:
    if gain["high"] < expected:
        return "The measurement falls short of it."
    if gain["low"] > expected:
        return "The measurement is above it."
    if gain["low"] <= 1 <= gain["high"]:
        return "The interval holds that too: measure again with more repeats, on a machine that does nothing else."
    return "It lies inside the measured interval."


def _metric_row(name: str, metric: Mapping[str, Any], expected: Mapping[str, Any] | None) -> dict[str, Any]:
    gain, unit = metric["gain"], metric["unit"]
    medians = {side: metric[side]["median"] for side in ("original", "pruned")}
    return {
        "name": name,
        "label": _LABELS.get(name, name),
        **{side: f"{value:.4g} {unit}" if value is not None else "undefined" for side, value in medians.items()},
        "gain": f"{gain['value']:.2f}x" if gain else None,
        "interval": f"{gain['low']:.2f} to {gain['high']:.2f}" if gain else None,
        "expected": f"{expected['gain']:.2f}x" if expected else None,
        "verdict": metric["verdict"],
    }


def _size_row(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    show = format_bytes if entry["unit"] == "bytes" else format_count
    return {
        "name": name,
        "label": _LABELS.get(name, name),
        **{side: "not known" if entry[side] is None else show(entry[side]) for side in ("original", "pruned")},
        "change": format_change(entry["ratio"]) if entry["ratio"] else None,
    }


def _formulas(
    metrics: Mapping[str, Any], sizes: Mapping[str, Any], expected: Mapping[str, Any]
) -> list[tuple[str, str]]:
    formulas = [(name, entry["formula"]) for name, entry in (*metrics.items(), *sizes.items())]
    phases = {entry["phase"]: entry["formula"] for entry in expected.values()}
    return formulas + [(f"expected, {phase}", formula) for phase, formula in phases.items()]


def _raw_values(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "side": side,
            "values": ["-" if value is None else f"{value:.4g}" for value in metric[side]["values"]],
        }
        for name, metric in metrics.items()
        for side in ("original", "pruned")
    ]


def _verification(source: Source) -> dict[str, Any]:
    with fields_of(source) as content:
        shown = {key: value for key, value in content.items() if key not in ("schema_version", "kind", "passed")}
        # The prompts themselves can be long, and are not what a reader of the report looks for.
        fields = [(key, value) for key, value in flatten(shown) if len(value) <= 300]
        return {"where": source.path.parent.name, "passed": bool(content["passed"]), "fields": fields}


def _provenance(document: PlanDocument) -> list[tuple[str, str]]:
    calibration = document.calibration
    target = document.target_sparsity
    return [
        ("method", document.method),
        ("target sparsity of the decoder blocks", "none: edited by hand" if target is None else f"{100 * target:g} %"),
        ("widths are multiples of", str(document.align)),
        ("calibration text", calibration.source),
        ("calibration windows", f"{calibration.num_samples} of {calibration.seq_len} tokens"),
        ("calibration token ids, SHA-256", calibration.sha256),
        ("weights of the original, SHA-256", document.base_model.weights_sha256),
        ("computed in", document.dtype),
        ("seed", str(document.seed)),
        ("sentei", document.sentei_version),
        *sorted(document.versions.items()),
    ]


def flatten(content: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested JSON as ``(dotted name, text)`` rows, in the order of the file."""
    rows: list[tuple[str, str]] = []
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            rows += flatten(value, f"{name}.")
        elif isinstance(value, Sequence) and not isinstance(value, str):
            if value and all(isinstance(item, Mapping) for item in value):
                for index, item in enumerate(value):
                    rows += flatten(item, f"{name}.{index}.")
            else:
                rows.append((name, ", ".join(_text(item) for item in value) or "none"))
        else:
            rows.append((name, format_bytes(value) if _is_bytes(name, value) else _text(value)))
    return rows


def _is_bytes(name: str, value: Any) -> bool:
    return name.endswith("_bytes") and isinstance(value, int)


def _text(value: Any) -> str:
    if value is None:
        return "not known"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def format_bytes(count: int) -> str:
    """Bytes with a decimal unit."""
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count} B"


def format_count(count: int) -> str:
    """A number of parameters, as people say it."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.4g}{unit}"
    return str(count)


def format_change(ratio: float) -> str:
    """A ratio as a signed percentage."""
    percent = 100 * (ratio - 1)
    return "±0 %" if abs(percent) < 0.05 else f"{percent:+.{1 if abs(percent) < 100 else 0}f} %".replace("-", "−")
