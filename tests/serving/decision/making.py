"""Candidates with numbers written by hand."""

from typing import Any

from serving.decision.capacity import capacity_rows
from serving.decision.document import (
    CandidateRecord,
    CapacityInputs,
    GuardRails,
    Interval,
    LoadRecord,
    OriginalRecord,
    ReasonRecord,
)
from serving.decision.lights import lights_of
from serving.decision.verdict import decide

RAILS = GuardRails(most_perplexity=1.2, least_gain=1.1)
ORIGINAL = OriginalRecord(
    load=LoadRecord(requests_per_s=Interval(value=2.1, low=2.0, high=2.2), goodput=True), memory_bytes=10**9
)
# Asked one request at a time, with no limit on how long an answer takes.
WITHOUT_LIMITS = OriginalRecord(
    load=LoadRecord(requests_per_s=Interval(value=0.14, low=0.13, high=0.15), goodput=False), memory_bytes=10**9
)
INPUTS = CapacityInputs(price_per_hour=2.0, peak_requests_per_s=10)


def interval(value: float, spread: float = 0.02) -> Interval:
    return Interval(value=value, low=value * (1 - spread), high=value * (1 + spread))


def candidate(name: str = "25 %", **measured: Any) -> CandidateRecord:
    """A good one, but for what is given."""
    good: dict[str, Any] = {
        "kind": "pruned", "sparsity": 0.25, "verified": True, "perplexity": {"own.txt": interval(1.1)},
        "gain": interval(1.3), "memory_bytes": 800_000_000, "weight_bytes": 700_000_000,
    }  # fmt: skip
    return CandidateRecord(name=name, **(good | measured))


def judged(
    *candidates: CandidateRecord,
    rails: GuardRails = RAILS,
    inputs: CapacityInputs = INPUTS,
    original: OriginalRecord = ORIGINAL,
) -> tuple[str, str | None, list[ReasonRecord]]:
    lit = [each.model_copy(update={"lights": lights_of(each, rails)}) for each in candidates]
    return decide(lit, capacity_rows(original, lit, inputs, output_len=100))


def said(reasons: list[ReasonRecord]) -> str:
    return "\n".join(each.text for each in reasons)
