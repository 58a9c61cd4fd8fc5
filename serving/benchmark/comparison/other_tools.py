"""Results of other load generators: ``vllm bench serve``, guidellm and aiperf, under sentei's names.

Fields and definitions were read in the sources of vLLM 0.32, guidellm 0.8.1 (report version 2) and aiperf 0.13 (export
schema 1.4). A figure that a tool defines in another way is not taken; ``left_out`` says why.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from toolchain.documents import Number, check_document
from toolchain.errors import SenteiError

MAX_BYTES = 256 * 1024**2  # with the times of each request in them
_HINT = "Was it edited, or written by another version of that tool?"
_NOT_TOLD = "(not told)"
_NO_RATE = "its rates are of a window that leaves out requests under way, and here they are over the whole run"


@dataclass(frozen=True, kw_only=True)
class ToolRun:
    """One load of one model, as a tool measured it.

    Attributes:
        tool: Its name.
        model: As the tool calls it.
        input_len: Mean tokens of a prompt.
        output_len: Mean tokens of an answer.
        concurrency: Requests in flight; ``None`` where nothing limits them or it is not told.
        request_rate: Requests per second as a Poisson process; ``None`` where the next follows as one ends, and where
            all are sent at once.
        arrivals: ``closed`` (the next follows as one ends), ``at once``, ``poisson``, or another word of the tool's.
        metrics: By sentei's name; one value a run.
        failed: Requests that failed, or were under way when the run ended.
        left_out: By the tool's own name, why a figure cannot be compared.
    """

    tool: str
    model: str
    input_len: float
    output_len: float
    concurrency: int | None
    request_rate: float | None
    arrivals: str
    metrics: Mapping[str, float]
    failed: int
    left_out: Mapping[str, str] = field(default_factory=dict)


class _Foreign(BaseModel):
    """A part of another tool's file: what is not named here is not read."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


_Positive = Annotated[Number, Field(gt=0)]
_Count = Annotated[int, Field(ge=0)]


class _VllmServe(_Foreign):
    model_id: str
    num_prompts: _Count
    completed: _Count
    request_rate: _Positive | Literal["inf"]
    burstiness: Number
    max_concurrency: Annotated[int, Field(gt=0)] | None
    total_input_tokens: _Count
    total_output_tokens: _Count
    output_throughput: Number
    total_token_throughput: Number
    request_throughput: Number
    mean_ttft_ms: Number
    mean_tpot_ms: Number
    mean_itl_ms: Number
    p99_itl_ms: Number | None = None
    mean_e2el_ms: Number | None = None


class _Mean(_Foreign):
    mean: Number
    std_dev: Number
    count: _Count


class _ByStatus(_Foreign):
    successful: _Mean


class _Totals(_Foreign):
    successful: _Count
    incomplete: _Count
    errored: _Count


class _GuideMetrics(_Foreign):
    request_totals: _Totals
    prompt_token_count: _ByStatus
    output_token_count: _ByStatus
    request_latency: _ByStatus
    time_to_first_token_ms: _ByStatus
    inter_token_latency_ms: _ByStatus


class _GuideStrategy(_Foreign):
    type_: str
    streams: Annotated[int, Field(gt=0)] | None = None
    rate: _Positive | None = None


class _GuideConfig(_Foreign):
    strategy: _GuideStrategy


class _GuideBenchmark(_Foreign):
    config: _GuideConfig
    metrics: _GuideMetrics


class _GuideMetadata(_Foreign):
    version: Literal[2]


class _GuideReport(_Foreign):
    metadata: _GuideMetadata
    config: dict[str, Any]
    benchmarks: Annotated[list[_GuideBenchmark], Field(min_length=1)]


class _Average(_Foreign):
    unit: str
    avg: Number


class _AiperfPhase(_Foreign):
    type: str
    kind: str | None = None
    name: str | None = None
    concurrency: Annotated[int, Field(gt=0)] | None = None
    rate: _Positive | None = None


class _AiperfConfig(_Foreign):
    phases: Annotated[list[_AiperfPhase], Field(min_length=1)]
    models: Any = None


class _Aiperf(_Foreign):
    aiperf_version: str
    schema_version: str
    input_config: _AiperfConfig
    request_count: _Average
    input_sequence_length: _Average
    output_sequence_length: _Average
    request_latency: _Average
    request_throughput: _Average
    output_token_throughput: _Average
    time_to_first_token: _Average | None = None
    inter_token_latency: _Average | None = None
    inter_chunk_latency: _Average | None = None
    error_request_count: _Average | None = None
    is_complete: bool | None = None
    was_cancelled: bool | None = None


def read_tool_runs(content: Mapping[str, Any], path: Path) -> list[ToolRun]:
    """Reads another tool's results.

    Args:
        content: Of the file.
        path: Names it in errors.

    Raises:
        SenteiError: None of the three wrote it, or a field is missing or of the wrong kind.
    """
    for recognised, read in _READERS:
        if recognised(content):
            return read(content, str(path))
    raise SenteiError(
        f"{path} is not a benchmark that is known here.",
        "Give sentei's results.json, or a JSON file of vllm bench serve (--save-result), guidellm (benchmarks.json) or "
        "aiperf (profile_export_aiperf.json).",
    )


def _vllm(content: Mapping[str, Any], where: str) -> list[ToolRun]:
    found = check_document(content, where, _VllmServe, hint=_HINT)
    if not found.completed:
        raise SenteiError(f"{where}: no request was answered, so there is nothing to compare.")
    metrics = {
        name: float(value)
        for name in ("output_throughput", "total_token_throughput", "request_throughput", "mean_ttft_ms",
                     "mean_tpot_ms", "mean_itl_ms", "p99_itl_ms", "mean_e2el_ms")
        if (value := getattr(found, name)) is not None and value > 0
    }  # fmt: skip
    rate = None if found.request_rate == "inf" else float(found.request_rate)
    asked = "it was not asked for: --percentile-metrics ttft,tpot,itl,e2el does"
    missing = {} if found.mean_e2el_ms else {"mean_e2el_ms": asked}
    return [
        ToolRun(
            tool="vllm bench serve",
            model=found.model_id,
            input_len=found.total_input_tokens / found.completed,
            output_len=found.total_output_tokens / found.completed,
            concurrency=found.max_concurrency,
            request_rate=rate,
            arrivals=_vllm_arrivals(found),
            metrics=metrics,
            failed=found.num_prompts - found.completed,
            left_out=missing,
        )
    ]  # fmt: skip


def _vllm_arrivals(found: _VllmServe) -> str:
    if found.request_rate == "inf":
        return "closed" if found.max_concurrency else "at once"
    return "poisson" if found.burstiness == 1 else "gamma"


def _guidellm(content: Mapping[str, Any], where: str) -> list[ToolRun]:
    report = check_document(content, where, _GuideReport, hint=_HINT)
    backend = report.config.get("backend")
    model = backend.get("model") if isinstance(backend, Mapping) else None
    return [_guidellm_run(each, model if isinstance(model, str) else _NOT_TOLD) for each in report.benchmarks]


def _guidellm_run(benchmark: _GuideBenchmark, model: str) -> ToolRun:
    metrics, strategy = benchmark.metrics, benchmark.config.strategy
    output = metrics.output_token_count.successful
    found = {
        "mean_ttft_ms": float(metrics.time_to_first_token_ms.successful.mean),
        "mean_e2el_ms": 1000 * float(metrics.request_latency.successful.mean),
    }
    left_out = {
        "requests_per_second": _NO_RATE,
        "output_tokens_per_second": _NO_RATE,
        "time_per_output_token_ms": "it divides the whole request by its tokens, the first included",
    }
    if output.std_dev == 0:
        # Its mean weighs each request by its tokens: with answers of one length that is the mean over requests.
        found["mean_tpot_ms"] = float(metrics.inter_token_latency_ms.successful.mean)
    else:
        left_out["inter_token_latency_ms"] = "answers differ in length, and its mean weighs long ones more"
    kinds = {"synchronous": "closed", "concurrent": "closed", "throughput": "at once"}
    streams = {"synchronous": 1, "concurrent": strategy.streams}.get(strategy.type_)
    return ToolRun(
        tool="guidellm",
        model=model,
        input_len=float(metrics.prompt_token_count.successful.mean),
        output_len=float(output.mean),
        concurrency=streams,
        request_rate=float(strategy.rate) if strategy.rate and strategy.type_ == "poisson" else None,
        arrivals=kinds.get(strategy.type_, strategy.type_),
        metrics={name: value for name, value in found.items() if value > 0},
        failed=metrics.request_totals.errored + metrics.request_totals.incomplete,
        left_out=left_out,
    )


# The unit that each of aiperf's metrics must have, and ours of the same definition.
_AIPERF = {
    "request_throughput": ("requests/sec", "request_throughput"),
    "output_token_throughput": ("tokens/sec", "output_throughput"),
    "time_to_first_token": ("ms", "mean_ttft_ms"),
    "inter_token_latency": ("ms", "mean_tpot_ms"),
    "inter_chunk_latency": ("ms", "mean_itl_ms"),
    "request_latency": ("ms", "mean_e2el_ms"),
}


def _aiperf(content: Mapping[str, Any], where: str) -> list[ToolRun]:
    found = check_document(content, where, _Aiperf, hint=_HINT)
    if found.is_complete is False or found.was_cancelled:
        raise SenteiError(f"{where}: the run was not finished, so there is nothing to compare.")
    profiled = [each for each in found.input_config.phases if "warmup" not in (each.kind, each.name)]
    if len(profiled) != 1:
        raise SenteiError(f"{where} is of {len(profiled)} phases, and its figures are of all of them together.")
    phase, metrics = profiled[0], {}
    for name, (unit, ours) in _AIPERF.items():
        if (value := getattr(found, name)) is None:
            continue
        if value.unit != unit:
            raise SenteiError(f"{where}: {name} is in {value.unit!r}, and {unit!r} is known here.", _HINT)
        metrics[ours] = float(value.avg)
    return [
        ToolRun(
            tool="aiperf",
            model=_aiperf_model(found.input_config.models),
            input_len=float(found.input_sequence_length.avg),
            output_len=float(found.output_sequence_length.avg),
            concurrency=phase.concurrency or (1 if phase.type == "concurrency" else None),
            request_rate=float(phase.rate) if phase.rate and phase.type == "poisson" else None,
            arrivals="closed" if phase.type == "concurrency" else phase.type,
            metrics={name: value for name, value in metrics.items() if value > 0},
            failed=round(float(found.error_request_count.avg)) if found.error_request_count else 0,
        )
    ]


def _aiperf_model(models: Any) -> str:
    """The first model's name: a list of names, or of objects with one."""
    items = models.get("items") if isinstance(models, Mapping) else models
    first = items[0] if isinstance(items, list) and items else items
    name = first.get("name") if isinstance(first, Mapping) else first
    return name if isinstance(name, str) else _NOT_TOLD


_READERS: tuple[tuple[Callable[[Mapping[str, Any]], bool], Callable[[Mapping[str, Any], str], list[ToolRun]]], ...] = (
    (lambda content: "aiperf_version" in content, _aiperf),
    (lambda content: isinstance(content.get("benchmarks"), list) and "metadata" in content, _guidellm),
    (lambda content: "model_id" in content and "total_output_tokens" in content, _vllm),
)
