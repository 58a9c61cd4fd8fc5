"""One measured metric of both models, as ``results.json`` and ``comparison.json`` hold it."""

from typing import Literal

from toolchain.documents import Number, Record
from toolchain.significance import Verdict


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
