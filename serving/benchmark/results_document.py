"""``results.json``: what a benchmark measured; docs/metrics.md describes the metrics.

What an engine or the machine tells of itself depends on the engine and its version, and is kept as it was told.
"""

from typing import Any, Literal

from toolchain.documents import Document, Number, Record
from toolchain.significance import Verdict

Side = Literal["original", "pruned"]


class IntervalRecord(Record):
    """A ratio of the two models, with its interval."""

    value: float
    low: float
    high: float
    confidence: float


class SideValues(Record):
    """One model's values, one per repeat; null where undefined."""

    median: Number | None
    values: list[Number | None]


class MetricRecord(Record):
    """One metric of both models. ``gain`` is the ratio turned so that above 1 is better; null where undefined."""

    role: Literal["primary", "exploratory"]
    unit: str
    better: Literal["lower", "higher"]
    formula: str
    original: SideValues
    pruned: SideValues
    ratio: IntervalRecord | None
    gain: IntervalRecord | None
    verdict: Verdict | None


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


class CauseRecord(Record):
    """Why the gain is not larger: ``text`` is ``message`` with its ``values`` put in."""

    cause: str
    message: str
    values: dict[str, Any]
    text: str


class PhaseRecord(Record):
    """The least that one phase takes of one model on this device."""

    flops_per_token: float
    bytes_per_token: float
    flops_per_byte: float
    bound: Literal["compute", "memory"]
    at_least_ms: float


class RooflineRecord(Record):
    """One phase of both models."""

    original: PhaseRecord
    pruned: PhaseRecord
    gain: float
    formula: str


class RunRecord(Record):
    """One repeat: which model was measured first, and what its engine told of each."""

    repeat: int
    order: list[Side]
    original: dict[str, Any]
    pruned: dict[str, Any] | None = None


class MeasurementRecord(Record):
    """One load. ``percentiles`` by time and side: percentile to ms, the median over repeats.

    ``cost`` is null without a price, and 0 where the price is 0.
    """

    workload: dict[str, Any]
    metrics: dict[str, MetricRecord]
    failed_requests: dict[Side, int]
    percentiles: dict[str, dict[Side, dict[str, Number] | None]]
    cost: CostRecord | float | None
    expected: dict[str, ExpectedRecord]
    runs: list[RunRecord]
    roofline: dict[Literal["prefill", "decode"], RooflineRecord] | None = None
    why_not_more: list[CauseRecord] | None = None


class GoodputRecord(Record):
    """The highest request rate at which a share of the requests, ``attainment``, met every limit."""

    slo_ms: dict[str, Number]
    attainment: float
    metrics: dict[str, MetricRecord]
    runs: list[RunRecord]


class DevicePeaksRecord(Record):
    """The highest rates reached on this device; see :class:`serving.forecast.device_probe.DevicePeaks`."""

    device: str
    dtype: str
    flops_per_s: float
    bytes_per_s: float


class FailedAttempt(Record):
    """A measurement that came to nothing and was made again."""

    repeat: int
    load: int
    side: Side
    failed: int
    error: str


class ResultsDocument(Document):
    """All of ``results.json``. ``pruned`` is missing where one running server was measured alone."""

    schema_version: Literal[1]
    kind: Literal["benchmark"]
    sentei_version: str
    engine: str
    primary_metric: str
    ratio_formula: str
    options: dict[str, Any]
    models: dict[Side, dict[str, Any]]
    sizes: dict[str, SizeRecord]
    measurements: list[MeasurementRecord]
    goodput: GoodputRecord | None
    device_peaks: DevicePeaksRecord | None
    gpu_state: str
    failed_attempts: list[FailedAttempt]
    environment: dict[str, Any]
