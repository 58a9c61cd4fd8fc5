"""From the journal of a benchmark to ``results.json``."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from importlib import metadata
from statistics import median
from typing import Any

from serving.benchmark.environment import describe_environment
from serving.benchmark.goodput import GOODPUT_METRICS
from serving.benchmark.gpu_watch import NOT_RECORDED, RECORDED
from serving.benchmark.journal import Journal
from serving.benchmark.metrics import DISTRIBUTED, ENERGY, METRICS
from serving.benchmark.ratios import RATIO_FORMULA, SIDES, compare_repeats
from serving.benchmark.settings import BenchmarkSettings
from serving.benchmark.side import Side
from serving.benchmark.workload import Slo, Workload
from serving.forecast.device_probe import DevicePeaks, probe_device
from serving.forecast.explain import Observations, limits_of_measurement
from serving.forecast.gap import Compared, explain_gap
from serving.forecast.model_facts import ModelFacts, compare_sizes, expected_gains, size_entry
from serving.forecast.roofline import roofline
from toolchain.checkpoint.directory import model_name
from toolchain.errors import SenteiError
from toolchain.given_options import NO_SLIDING_CACHE, given_options

SCHEMA_VERSION = 1
_KV_SIZES, _MEMORY_SHARE = {"--kv-cache-memory-bytes", "--num-gpu-blocks-override"}, "--gpu-memory-utilization"
_FLOATS = ("float32", "bfloat16", "float16")
_PEAK_FORMULA = {
    "cpu": "highest resident memory of the process that ran the model alone, the Python runtime and libraries included",
    "cuda": "highest memory allocated by torch on the device; null for engines that do not tell",
    "vllm": "not measured: vLLM reserves the memory it is told to, not what the model needs",
}
_KV_TOKENS = "tokens that fit into the server's KV cache, from its log; "
_KV_TOKENS_FORMULA = {
    "same": f"{_KV_TOKENS}both caches were given the same memory",
    "rest": f"{_KV_TOKENS}each server took the same share of the GPU's memory and its cache what the weights leave of "
    "it, so smaller weights make a larger cache, whether a token takes less of it or not",
    "unknown": f"{_KV_TOKENS}how much memory each cache was given is not known",
}
_STARTUP = "from starting the engine until it could answer: loading, compiling and vLLM's own warm-up; "
_STARTUP_COLD_FORMULA = (
    f"{_STARTUP}the first start of the benchmark, in which files are read and kernels compiled that later starts find "
    "in memory or on disk. No ratio: the original started first, and part of what it read serves the pruned model too"
)
_STARTUP_WARM_FORMULA = f"{_STARTUP}the median of the starts after the first, which find what that one left"
COST_FORMULA = "price per hour / (3600 x median output throughput) x 1,000,000"
FORMULAS = (
    *_PEAK_FORMULA.values(), *_KV_TOKENS_FORMULA.values(), _STARTUP_COLD_FORMULA, _STARTUP_WARM_FORMULA, COST_FORMULA,
)  # fmt: skip


def assemble_results(journal: Journal, settings: BenchmarkSettings, sides: Mapping[str, Side]) -> dict[str, Any]:
    """What ``results.json`` holds; ``docs/metrics.md`` describes it.

    Args:
        journal: Every measurement of every repeat. The search for the highest rate comes after the workloads.
        settings: What the user chose.
        sides: Both models, or the original alone, with what their engines reported.
    """
    peaks = _peaks(sides["original"]) if len(sides) == 2 else None
    runs = [_runs(journal, load, settings.repeats, tuple(sides)) for load in range(len(settings.workloads))]
    measurements = [
        _measurement(each, workload, sides, settings) for each, workload in zip(runs, settings.workloads, strict=True)
    ]
    if len(sides) == 2:
        measurements = [
            {**each, **_against_expectation(each, workload, sides, peaks, settings)}
            for each, workload in zip(measurements, settings.workloads, strict=True)
        ]
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "benchmark",
        "sentei_version": metadata.version("sentei"),
        "engine": settings.engine,
        "primary_metric": settings.primary,
        "ratio_formula": RATIO_FORMULA,
        "options": settings.options,
        "models": {name: _model(side, settings) for name, side in sides.items()},
        "sizes": _sizes(settings, sides, journal),
        "measurements": measurements,
        "goodput": settings.slo and _goodput(journal, settings, settings.slo, tuple(sides)),
        "device_peaks": peaks and asdict(peaks),
        "gpu_state": _gpu_state(measurements),
        "failed_attempts": journal.failures,
        "environment": describe_environment(),
    }


def _model(side: Side, settings: BenchmarkSettings) -> dict[str, Any]:
    return {
        "name": model_name(side.directory),
        "directory": str(side.directory),
        "weights_sha256": side.files_sha256,
        "precision": side.facts.precision,
        **({"window": window} if (window := _window(side, settings)) else {}),
        **side.engine_report,
    }


def _window(side: Side, settings: BenchmarkSettings) -> dict[str, Any] | None:
    """The sliding window of a model whose KV cache holds no more than that, as ``results.json`` has it."""
    window = side.facts.sliding
    if window is None or NO_SLIDING_CACHE in given_options(settings.engine_options):
        return None
    return window.model_dump()


def _kv_cache_tokens(side: Side, settings: BenchmarkSettings) -> int | None:
    """What the server said. It means requests as long as can be: with a window, of shorter ones fewer tokens fit."""
    return None if _window(side, settings) else side.engine_report.get("kv_cache_tokens")


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
    sides: Mapping[str, Side],
    settings: BenchmarkSettings,
) -> dict[str, Any]:
    failed = {name: sum(run[name]["failed"] for run in runs) for name in sides}
    counted = all(run[name][ENERGY.name] is not None for run in runs for name in sides)
    metrics = compare_repeats(runs, primary=settings.primary, metrics=(*METRICS, ENERGY) if counted else METRICS)
    if any(failed.values()):
        # Rates and times of the requests that got through say nothing of those that did not.
        metrics = {name: {**metric, "ratio": None, "gain": None, "verdict": None} for name, metric in metrics.items()}
    medians = {name: metric["original"]["median"] for name, metric in metrics.items()}
    return {
        "workload": describe(workload),
        "metrics": metrics,
        "failed_requests": failed,
        "percentiles": _percentiles(runs),
        "cost": None if any(failed.values()) else settings.price_per_hour and _cost(metrics, settings.price_per_hour),
        "expected": {}
        if len(sides) == 1
        else expected_gains(
            sides["original"].facts,
            sides["pruned"].facts,
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


def _peaks(original: Side) -> DevicePeaks | None:
    """This device's, now that nothing else runs on it; ``None`` where the servers are elsewhere or it fails."""
    device, precision = original.engine_report.get("device"), original.facts.precision
    if device is None:
        return None
    # Quantised weights are multiplied in 16 bits or fewer; what torch can do in 8 or 4 bits is no peak of theirs.
    try:
        return probe_device(device, precision if precision in _FLOATS else "bfloat16")
    except SenteiError:
        return None  # hours of measurements are not thrown away for want of an expectation


def _against_expectation(
    measurement: Mapping[str, Any],
    workload: Workload,
    sides: Mapping[str, Side],
    peaks: DevicePeaks | None,
    settings: BenchmarkSettings,
) -> dict[str, Any]:
    """The roofline, where the device's peaks are known, and why the measured gain differs from the expected one."""
    medians = {name: metric["original"]["median"] for name, metric in measurement["metrics"].items()}
    pruned, concurrency = sides["pruned"], in_flight(workload, medians)
    context = workload.input_len + workload.output_len // 2
    seen = _observations(measurement, sides, settings)

    def bounds(facts: ModelFacts) -> dict[str, dict[str, Any]]:
        assert peaks is not None
        return roofline(
            {"original": sides["original"].facts, "pruned": facts}, peaks, input_len=workload.input_len,
            output_len=workload.output_len, concurrency=concurrency, num_gpus=settings.shape.num_gpus,
        )  # fmt: skip

    expected = bounds(pruned.facts) if peaks else {}
    gain = measurement["metrics"][settings.primary]["gain"]
    gap = gain and explain_gap(
        Compared(
            metric=settings.primary,
            gain=gain,
            expected={name: each["gain"] for name, each in measurement["expected"].items()},
            medians=medians,
            roofline=expected,
            tiled=bounds(pruned.tiled_facts) if peaks and pruned.tiled_facts else {},
            layout=pruned.layout,
            context=context,
            concurrency=concurrency,
            seen=seen,
        )
    )
    limits = limits_of_measurement(pruned.facts, seen, context=context, concurrency=concurrency)
    return {"gap": gap, **({"roofline": expected, "why_not_more": limits} if peaks else {})}


def _observations(
    measurement: Mapping[str, Any], sides: Mapping[str, Side], settings: BenchmarkSettings
) -> Observations:
    busy = [run[side].get("client_cpu_cores") for run in measurement["runs"] for side in SIDES]
    return Observations(
        kv_cache_tokens={name: _kv_cache_tokens(side, settings) for name, side in sides.items()},
        client_cpu_cores=max((each for each in busy if each is not None), default=None),
        throttled=sorted({reason for run in measurement["runs"] for side in SIDES
                          for reason in (run[side]["gpu"] or {}).get("throttled", ())}),
        not_compiled=next(filter(None, (side.engine_report.get("not_compiled") for side in sides.values())), None),
    )  # fmt: skip


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


def _goodput(journal: Journal, settings: BenchmarkSettings, slo: Slo, sides: Sequence[str]) -> dict[str, Any]:
    runs = _runs(journal, len(settings.workloads), settings.repeats, sides)
    return {
        "slo_ms": slo.limits,
        "attainment": settings.attainment,
        "metrics": compare_repeats(runs, primary="max_request_rate", metrics=GOODPUT_METRICS),
        "runs": runs,
    }


def _sizes(settings: BenchmarkSettings, sides: Mapping[str, Side], journal: Journal) -> dict[str, dict[str, Any]]:
    original, pruned = sides["original"], sides.get("pruned")
    reports = [original.engine_report, pruned.engine_report if pruned else {}]
    sizes = compare_sizes(original.facts, pruned.facts if pruned else None)
    is_vllm, device = settings.spec.is_vllm, original.engine_report["device"]
    place = "vllm" if is_vllm else "cpu" if device == "cpu" else "cuda"
    peaks = [each.get("peak_memory_bytes") for each in reports]
    sizes["peak_memory_bytes"] = size_entry(*peaks, unit="bytes", formula=_PEAK_FORMULA[place])
    if is_vllm:
        tokens = [_kv_cache_tokens(each, settings) if each else None for each in (original, pruned)]
        formula = _KV_TOKENS_FORMULA[_kv_memory(settings, device)]
        sizes["kv_cache_tokens"] = size_entry(*tokens, unit="tokens", formula=formula)
    starts = [journal.startups(side) for side in SIDES]
    cold = [each[0] if each else None for each in starts]
    warm = [median(each[1:]) if each[1:] else None for each in starts]
    sizes["startup_cold_s"] = {**size_entry(*cold, unit="s", formula=_STARTUP_COLD_FORMULA), "ratio": None}
    sizes["startup_warm_s"] = size_entry(*warm, unit="s", formula=_STARTUP_WARM_FORMULA)
    return sizes


def _kv_memory(settings: BenchmarkSettings, device: str | None) -> str:
    """Whose memory the KV cache got: that of an option or of the CPU's default, or what weights left of a GPU's."""
    if device is None:
        return "unknown"
    given = given_options(settings.engine_options).keys()
    if device == "cpu" and _MEMORY_SHARE in given and _KV_SIZES.isdisjoint(given):
        return "unknown"
    return "same" if device == "cpu" or not _KV_SIZES.isdisjoint(given) else "rest"
