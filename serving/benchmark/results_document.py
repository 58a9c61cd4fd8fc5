"""``results.json``: what a benchmark measured; docs/metrics.md describes the metrics.

What an engine or the machine tells of itself depends on the engine and its version, and is kept as it was told.
"""

from typing import Any, Literal

from pydantic import ConfigDict, Field

from serving.forecast.estimate_document import (
    CauseRecord,
    DevicePeaksRecord,
    GapRecord,
    Phase,
    RooflineRecord,
    Side,
    WindowRecord,
)
from toolchain.documents import Document, Number, Record
from toolchain.evaluate.metric_record import MetricRecord


class ModelRecord(Record):
    """One model: which one it was, and beside that what its engine told of itself.

    ``window`` is missing where the KV cache holds all tokens in all layers, and in files from before it was written.
    """

    model_config = ConfigDict(extra="allow")

    name: str
    directory: str
    weights_sha256: str
    precision: str
    window: WindowRecord | None = None


class ModelsRecord(Record):
    """Both models. ``pruned`` is missing where one running server was measured alone."""

    original: ModelRecord
    pruned: ModelRecord | None = None


class WorkloadRecord(Record):
    """One load; :class:`serving.benchmark.workload.Workload` describes the fields."""

    input_len: int
    output_len: int
    concurrency: int | None
    request_rate: Number | None
    range_ratio: Number
    num_prompts: int
    seed: int
    prompts: str
    ignore_eos: bool


class SizeRecord(Record):
    """One size of both models; null where it is not known."""

    unit: str
    formula: str
    original: Number | None
    pruned: Number | None
    ratio: float | None


class CostRecord(Record):
    """What a million output tokens cost, by side."""

    price_per_hour: Number
    formula: str
    per_million_output_tokens: dict[Side, float | None]


class ExpectedRecord(Record):
    """The gain that parameters alone promise, and what it was computed from."""

    phase: str
    gain: float
    formula: str
    original_flops: Number | None = None
    pruned_flops: Number | None = None
    original_bytes: Number | None = None
    pruned_bytes: Number | None = None


class RunRecord(Record):
    """One repeat: which model was measured first, and what its engine told of each."""

    repeat: int
    order: list[Side]
    original: dict[str, Any]
    pruned: dict[str, Any] | None = None


class MeasurementRecord(Record):
    """One load. ``percentiles`` by time and side: percentile to ms, the median over repeats.

    ``cost`` is null without a price, and 0 where the price is 0. ``gap`` is null where what was expected of the primary
    metric lies inside the measured interval, and missing in files from before it was measured; in these
    ``why_not_more`` lists causes of a shortfall too.
    """

    workload: WorkloadRecord
    metrics: dict[str, MetricRecord]
    failed_requests: dict[Side, int]
    percentiles: dict[str, dict[Side, dict[str, Number] | None]]
    cost: CostRecord | float | None
    expected: dict[str, ExpectedRecord]
    runs: list[RunRecord]
    roofline: dict[Phase, RooflineRecord] | None = None
    why_not_more: list[CauseRecord] | None = None
    gap: GapRecord | None = None


class GoodputMetrics(Record):
    """The rate that was found, and how many requests per second met every limit at it."""

    max_request_rate: MetricRecord
    request_goodput: MetricRecord


class GoodputRecord(Record):
    """The highest request rate at which a share of the requests, ``attainment``, met every limit."""

    slo_ms: dict[str, Number]
    attainment: float
    metrics: GoodputMetrics
    runs: list[RunRecord]


class FailedAttempt(Record):
    """A measurement that came to nothing and was made again."""

    repeat: int
    load: int
    side: Side
    failed: int
    error: str


class ResultsDocument(Document):
    """All of ``results.json``."""

    schema_version: Literal[1]
    kind: Literal["benchmark"]
    sentei_version: str
    engine: str
    primary_metric: str
    ratio_formula: str
    options: dict[str, Any]
    models: ModelsRecord
    sizes: dict[str, SizeRecord]
    measurements: list[MeasurementRecord] = Field(min_length=1)
    goodput: GoodputRecord | None
    device_peaks: DevicePeaksRecord | None
    gpu_state: str
    failed_attempts: list[FailedAttempt]
    environment: dict[str, Any]
