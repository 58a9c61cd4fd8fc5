"""From the journal of a benchmark to ``results.json``."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

from serving.benchmark.environment import describe_environment
from serving.benchmark.goodput import ATTAINMENT, GOODPUT_METRICS
from serving.benchmark.gpu_watch import NOT_RECORDED, RECORDED
from serving.benchmark.journal import Journal
from serving.benchmark.metrics import DISTRIBUTED, ENERGY, METRICS
from serving.benchmark.ratios import RATIO_FORMULA, SIDES, compare
from serving.benchmark.workload import Slo, Workload
from serving.forecast.device_probe import DevicePeaks, probe_device
from serving.forecast.explain import explain
from serving.forecast.model_facts import ModelFacts, compare_sizes, expected_gains, size_entry
from serving.forecast.roofline import roofline
from toolchain.architecture.layout import LayerLayout
from toolchain.checkpoint.directory import model_name
from toolchain.checkpoint.quantized import open_servable
from toolchain.errors import SenteiError

SCHEMA_VERSION = 1
_FLOATS = ("float32", "bfloat16", "float16")
_PEAK_FORMULA = {
    "cpu": "highest resident memory of the process that ran the model alone, the Python runtime and libraries included",
    "cuda": "highest memory allocated by torch on the device; null for engines that do not tell",
    "vllm": "not measured: vLLM reserves the memory it is told to, not what the model needs",
}
_KV_TOKENS_FORMULA = "tokens that fit into the server's KV cache, from its log; both were given the same memory"
_STARTUP_FORMULA = (
    "from starting the engine until it could answer: loading, compiling and vLLM's own warm-up; the last start"
)
COST_FORMULA = "price per hour / (3600 x median output throughput) x 1,000,000"
FORMULAS = (*_PEAK_FORMULA.values(), _KV_TOKENS_FORMULA, _STARTUP_FORMULA, COST_FORMULA)


def assemble_results(
    journal: Journal,
    *,
    engine: str,
    directories: Mapping[str, Path],
    facts: Mapping[str, ModelFacts],
    hashes: Mapping[str, str],
    workloads: Sequence[Workload],
    slo: Slo | None,
    repeats: int,
    primary: str,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """What ``results.json`` holds; ``docs/metrics.md`` describes it.

    Args:
        journal: Every measurement of every repeat.
        engine: What ran both.
        directories: By side.
        facts: By side.
        hashes: Of the weights, by side.
        workloads: What was asked, in the journal's order.
        slo: What the search, which comes after the workloads in the journal, looked for.
        repeats: How often.
        primary: The metric that decides.
        options: What the user chose.
    """
    told = {side: journal.told(side) for side in directories}
    both = len(directories) == 2
    peaks = _peaks(told, facts) if both else None
    layout = () if engine.startswith("onnx") or not both else open_servable(directories["pruned"]).layout
    measurements = [
        _measurement(
            _runs(journal, load, repeats, tuple(directories)), workload, facts, primary, options["price_per_hour"]
        )
        for load, workload in enumerate(workloads)
    ]
    if peaks:
        measurements = [
            {**each, **_against_roofline(each, workload, facts, peaks, layout, told)}
            for each, workload in zip(measurements, workloads, strict=True)
        ]
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "benchmark",
        "sentei_version": metadata.version("sentei"),
        "engine": engine,
        "primary_metric": primary,
        "ratio_formula": RATIO_FORMULA,
        "options": dict(options),
        "models": {
            side: {"name": model_name(path), "directory": str(path), "weights_sha256": hashes[side],
                   "precision": facts[side].precision, **told[side]}
            for side, path in directories.items()
        },
        "sizes": _sizes(engine, facts, told),
        "measurements": measurements,
        "goodput": slo and _goodput(_runs(journal, len(workloads), repeats, tuple(directories)), slo),
        "device_peaks": peaks and asdict(peaks),
        "gpu_state": _gpu_state(measurements),
        "failed_attempts": journal.failures,
        "environment": describe_environment(),
    }  # fmt: skip


def _runs(journal: Journal, load: int, repeats: int, sides: Sequence[str]) -> list[dict[str, Any]]:
    runs = []
    for repeat in range(repeats):
        measured = {side: journal.get((repeat, load, side)) for side in sides}
        run: dict[str, Any] = {"repeat": repeat, "order": list(sides if repeat % 2 == 0 else sides[::-1])}
        for side, entry in measured.items():
            assert entry is not None, "every visit was made"
            run[side] = dict(entry["metrics"])
        runs.append(run)
    return runs


def _measurement(
    runs: list[dict[str, Any]],
    workload: Workload,
    facts: Mapping[str, ModelFacts],
    primary: str,
    price_per_hour: float | None,
) -> dict[str, Any]:
    failed = {side: sum(run[side]["failed"] for run in runs) for side in facts}
    counted = all(run[side][ENERGY.name] is not None for run in runs for side in facts)
    metrics = compare(runs, primary=primary, metrics=(*METRICS, ENERGY) if counted else METRICS)
    if any(failed.values()):
        # Rates and times of the requests that got through say nothing of those that did not.
        metrics = {name: {**metric, "ratio": None, "gain": None, "verdict": None} for name, metric in metrics.items()}
    medians = {name: metric["original"]["median"] for name, metric in metrics.items()}
    return {
        "workload": describe(workload),
        "metrics": metrics,
        "failed_requests": failed,
        "percentiles": _percentiles(runs),
        "cost": None if any(failed.values()) else price_per_hour and _cost(metrics, price_per_hour),
        "expected": {}
        if len(facts) == 1
        else expected_gains(
            facts["original"],
            facts["pruned"],
            input_len=workload.input_len,
            output_len=workload.output_len,
            concurrency=in_flight(workload, medians),
            original_medians=medians,
        ),
        "runs": runs,
    }


def _gpu_state(measurements: Sequence[Mapping[str, Any]]) -> str:
    runs = [run for measurement in measurements for run in measurement["runs"]]
    return RECORDED if any(run[side]["gpu"] for run in runs for side in SIDES if side in run) else NOT_RECORDED


def _cost(metrics: Mapping[str, Any], price_per_hour: float) -> dict[str, Any]:
    throughput = {side: metrics["output_throughput"][side]["median"] for side in SIDES}
    return {
        "price_per_hour": price_per_hour,
        "formula": COST_FORMULA,
        "per_million_output_tokens": {
            side: price_per_hour / 3600 / each * 1e6 if each else None for side, each in throughput.items()
        },
    }


def _percentiles(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """By time and side: percentile to the median over repeats, in ms; null where undefined."""
    return {name: {side: _median_percentiles([run[side]["percentiles"][name] for run in runs if side in run])
                   for side in SIDES}
            for name in DISTRIBUTED}  # fmt: skip


def _median_percentiles(repeats: Sequence[Mapping[str, float] | None]) -> dict[str, float] | None:
    found = [each for each in repeats if each]
    return {percent: median(each[percent] for each in found) for percent in found[0]} if found else None


def _peaks(told: Mapping[str, Mapping[str, Any]], facts: Mapping[str, ModelFacts]) -> DevicePeaks | None:
    """This device's, now that nothing else runs on it; ``None`` where the servers are elsewhere or it fails."""
    device, precision = told["original"].get("device"), facts["original"].precision
    if device is None:
        return None
    # Quantised weights are multiplied in 16 bits or fewer; what torch can do in 8 or 4 bits is no peak of theirs.
    try:
        return probe_device(device, precision if precision in _FLOATS else "bfloat16")
    except SenteiError:
        return None  # hours of measurements are not thrown away for want of an expectation


def _against_roofline(
    measurement: Mapping[str, Any],
    workload: Workload,
    facts: Mapping[str, ModelFacts],
    peaks: DevicePeaks,
    layout: Sequence[LayerLayout],
    told: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    medians = {
        side: {name: metric[side]["median"] for name, metric in measurement["metrics"].items()} for side in SIDES
    }
    concurrency, output_len = in_flight(workload, medians["original"]), workload.output_len
    expected = roofline(facts, peaks, input_len=workload.input_len, output_len=output_len, concurrency=concurrency)
    busy = [run[side].get("client_cpu_cores") for run in measurement["runs"] for side in SIDES]
    causes = explain(
        facts, expected, medians, layout=layout, context=workload.input_len + output_len // 2, concurrency=concurrency,
        kv_cache_tokens={side: told[side].get("kv_cache_tokens") for side in SIDES},
        client_cpu_cores=max((each for each in busy if each is not None), default=None),
        throttled=sorted({reason for run in measurement["runs"] for side in SIDES
                          for reason in (run[side]["gpu"] or {}).get("throttled", ())}),
        not_compiled=next(filter(None, (told[side].get("not_compiled") for side in SIDES)), None),
    )  # fmt: skip
    return {"roofline": expected, "why_not_more": causes}


def in_flight(workload: Workload, medians: Mapping[str, float | None]) -> int:
    """How many requests are decoded together: as many as are let in, or by Little's law at a request rate."""
    if workload.concurrency is not None:
        return workload.concurrency
    rate, seconds = medians["request_throughput"], medians["mean_e2el_ms"]
    return max(1, round(rate * seconds / 1000)) if rate and seconds else 1


def describe(workload: Workload) -> dict[str, Any]:
    """A workload as JSON; of a file of prompts, that it is one."""
    content = {field.name: getattr(workload, field.name) for field in fields(workload)}
    own = workload.prompts
    said = "random token ids" if own is None else f"one's own (SHA-256 {own.sha256}), as in prompts.jsonl"
    return {**content, "ignore_eos": True, "prompts": f"{said}, the same for both models"}


def _goodput(runs: list[dict[str, Any]], slo: Slo) -> dict[str, Any]:
    return {
        "slo_ms": slo.limits,
        "attainment": ATTAINMENT,
        "metrics": compare(runs, primary="max_request_rate", metrics=GOODPUT_METRICS),
        "runs": runs,
    }


def _sizes(
    engine: str, facts: Mapping[str, ModelFacts], told: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    sizes = compare_sizes(facts["original"], facts.get("pruned"))
    place = "vllm" if engine.startswith("vllm") else "cpu" if told["original"]["device"] == "cpu" else "cuda"
    peaks = [told.get(side, {}).get("peak_memory_bytes") for side in SIDES]
    sizes["peak_memory_bytes"] = size_entry(*peaks, unit="bytes", formula=_PEAK_FORMULA[place])
    if engine.startswith("vllm"):
        tokens = [told.get(side, {}).get("kv_cache_tokens") for side in SIDES]
        sizes["kv_cache_tokens"] = size_entry(*tokens, unit="tokens", formula=_KV_TOKENS_FORMULA)
    startup = [told.get(side, {}).get("startup_s") for side in SIDES]
    sizes["startup_s"] = size_entry(*startup, unit="s", formula=_STARTUP_FORMULA)
    return sizes
