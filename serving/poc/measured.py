"""From the files that the steps wrote to what the decision is made of."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from serving.benchmark.journal import RESULTS_FILE
from serving.benchmark.results_document import ResultsDocument
from serving.decision.document import CandidateRecord, Interval, LoadRecord, OriginalRecord
from serving.forecast.estimate_document import kv_bytes
from serving.poc.answers import AskedQuestion, Quality, accuracy_change, accuracy_of, groups_of, interval_of
from toolchain.documents import read_document
from toolchain.evaluate.metric_record import MetricRecord
from toolchain.significance import compare_means

GOODPUT, THROUGHPUT = "max_request_rate", "output_throughput"
_RATE = "request_throughput"
_NO_MEMORY = (
    "ONNX Runtime's memory is measured on CPUs alone. On a GPU, leave out most_memory_gb and look at nvidia-smi."
)


def with_quality(
    candidate: CandidateRecord, quality: Quality, original: Sequence[AskedQuestion]
) -> CandidateRecord:  # fmt: skip
    """Adds what the evaluation says."""
    return candidate.model_copy(
        update={
            "perplexity": dict(quality.perplexity),
            "seen": {**candidate.seen, **quality.seen},
            "accuracy": accuracy_of(quality.questions),
            "accuracy_change": accuracy_change(original, quality.questions),
            "groups": groups_of(quality.questions),
            "metrics": dict(quality.metrics),
        }
    )


def read_results(directory: Path) -> ResultsDocument:
    """A benchmark's results.

    Raises:
        SenteiError: They are missing or damaged.
    """
    return read_document(directory / RESULTS_FILE, ResultsDocument)


def with_speed(candidate: CandidateRecord, results: ResultsDocument) -> CandidateRecord:
    """Adds what the benchmark says."""
    gain, sizes = _deciding(results).gain, _sizes(results, "pruned")
    unknown_memory = _NO_MEMORY if sizes["memory_bytes"] is None else candidate.not_measured
    return candidate.model_copy(
        update={
            "gain": None if gain is None else interval_of(gain),
            "load": _load([results], "pruned"),
            "original_load": _load([results], "original"),
            "not_measured": _why_no_gain(results) if gain is None else unknown_memory,
            **sizes,
        }
    )


def original_record(quality: Quality, results: Sequence[ResultsDocument]) -> OriginalRecord:
    """What was measured of the original, in all benchmarks together."""
    return OriginalRecord(
        accuracy=accuracy_of(quality.questions),
        groups=groups_of(quality.questions),
        metrics=dict(quality.metrics),
        load=_load(results, "original") if results else None,
        **(_sizes(results[0], "original") if results else {}),
    )


def gain_metric(results: Sequence[ResultsDocument]) -> str:
    """The metric whose gain decides."""
    return GOODPUT if any(each.goodput for each in results) else THROUGHPUT


def _deciding(results: ResultsDocument) -> MetricRecord:
    """The highest rate within the limits buys GPUs; where no limits were given, the tokens per second do."""
    if results.goodput is not None:
        return results.goodput.metrics.max_request_rate
    return results.measurements[0].metrics[THROUGHPUT]


def _why_no_gain(results: ResultsDocument) -> str:
    failed = results.measurements[0].failed_requests
    if any(failed.values()):
        return f"{sum(failed.values())} requests failed."
    return "No rate within the limits was found." if results.goodput else "The metric is undefined for this load."


def _load(results: Sequence[ResultsDocument], side: Any) -> LoadRecord | None:
    metrics = [
        each.goodput.metrics.max_request_rate if each.goodput else each.measurements[0].metrics[_RATE]
        for each in results
        if not any(each.measurements[0].failed_requests.values())
    ]
    values = [value for metric in metrics for value in getattr(metric, side).values]
    rate = _rate(values)
    return None if rate is None else LoadRecord(requests_per_s=rate, goodput=bool(results[0].goodput))


def _rate(values: Sequence[float | None]) -> Interval | None:
    """The geometric mean of repeats with its t-interval; ``None`` where a repeat found no rate."""
    found = [value for value in values if value]
    if not found or len(found) < len(values):
        return None
    logs = compare_means([math.log(value) for value in found])
    low, high = (None if end is None else math.exp(end) for end in (logs.low, logs.high))
    return Interval(value=math.exp(logs.value), low=low, high=high)


def _sizes(results: ResultsDocument, side: Any) -> dict[str, Any]:
    def size(name: str) -> Any:
        return getattr(results.sizes[name], side) if name in results.sizes else None

    load, model = results.measurements[0].workload, getattr(results.models, side)
    window = model and model.window
    weights, per_token, used = size("weight_bytes"), size("kv_bytes_per_token"), size("peak_memory_bytes")
    if used is None and results.engine == "vllm" and weights is not None and per_token is not None:
        # vLLM takes what it is given; this is what it needs.
        length = load.input_len + load.output_len
        used = weights + (load.concurrency or 1) * kv_bytes(per_token, window, length)
    return {
        "weight_bytes": weights,
        "memory_bytes": None if used is None else round(used),
        "kv_bytes_per_token": per_token,
        "window": window,
        "kv_cache_tokens": size("kv_cache_tokens"),
    }
