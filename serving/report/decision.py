"""The report's first part: what to do, how the guard rails stand, which candidates are worth a look, what it takes."""

from collections.abc import Sequence
from typing import Any

from serving.decision.document import (
    CandidateRecord,
    CapacityInputs,
    CapacityRow,
    Interval,
    LightRecord,
    ReasonRecord,
    VerdictDocument,
)
from serving.decision.pareto import points_of, worst_loss
from serving.decision.verdict import PERCENT
from serving.report.decision_charts import pareto_chart
from serving.report.format import format_bytes
from serving.report.translate import Say

# How a light looks: the class of a tag in the style sheet.
_TAGS = {"green": "good", "red": "bad", "cannot be told": "open"}
_ENGINES = {"onnx": "ONNX Runtime", "vllm": "vLLM"}
KINDS = ("pruned", "quantised", "pruned and quantised", "sibling")
STATUSES = tuple(_TAGS)
# The name of each guard rail, and what it allows.
RAILS = {
    "perplexity": ("Perplexity on %(subject)s", "at most %(limit)s times the original's"),
    "accuracy": ("Your questions", "at least %(limit)s %% right"),
    "group": ("Questions: %(subject)s", "at least %(limit)s %% right"),
    "least_metric": ("%(subject)s", "at least %(limit)s %%"),
    "most_metric": ("%(subject)s", "at most %(limit)s %%"),
    "gain": ("Speed", "at least %(limit)s times the original's"),
    "memory": ("Memory", "at most %(limit)s"),
    "verified": ("Export", "gives its checkpoint's answers"),
}
FASTER = "more than the original's"
GAIN_METRICS = {
    "output_throughput": "output tokens per second",
    "max_request_rate": "the highest request rate within the limits",
}
INPUTS = {
    "price_per_hour": "Price per hour of one GPU or machine",
    "peak_requests_per_s": "Peak load, requests per second",
    "conversation_tokens": "Tokens of a conversation",
    "memory_gb": "Memory of one GPU, GB",
}


def verdict_text(document: VerdictDocument, say: Say) -> str:
    """The verdict for a terminal or a mail: a sentence, and what it rests on."""
    first, *more = (say(each.message, **each.values) for each in document.reasons)
    return "\n".join([first, *(f"  - {each}" for each in more)])


def decision_view(document: VerdictDocument, say: Say) -> dict[str, Any]:
    """What the template prints of a verdict.

    Raises:
        MissingDependencyError: plotly is not installed.
    """
    candidates = document.candidates
    headline, *reasons = (_sentence(each, say) for each in document.reasons)
    points = points_of(candidates, document.original.memory_bytes)
    load = document.workload
    return {
        "deploys": document.decision == "deploy",
        "headline": headline,
        "reasons": reasons,
        "model": document.model,
        "measured": say(
            "Speed is %(metric)s, measured with %(engine)s: %(input)s tokens in, %(output)s out, %(count)s at a time, "
            "original and candidate in turn.",
            metric=say(GAIN_METRICS.get(document.gain_metric, document.gain_metric)), engine=_ENGINES[document.engine],
            input=load["input_len"], output=load["output_len"], count=load["concurrency"],
        ),
        "rails": [_rail(light, say) for light in _rails_of(candidates)],
        "lights": [_lights(each, _rails_of(candidates), say) for each in candidates],
        "rows": [_row(each, say) for each in candidates],
        "charts": [pareto_chart(points, axis, say) for axis in ("speed", "memory")] if len(points) > 1 else [],
        "capacity": _capacity(document.capacity, document.capacity_inputs, say),
        "goodput": document.gain_metric == "max_request_rate",
    }  # fmt: skip


def _sentence(reason: ReasonRecord, say: Say) -> str:
    return say(reason.message, **reason.values)


def _rails_of(candidates: Sequence[CandidateRecord]) -> list[LightRecord]:
    """One light for each guard rail, as columns: those of the candidate that has the most."""
    return max((each.lights for each in candidates), key=len, default=[])


def _rail(light: LightRecord, say: Say) -> dict[str, str]:
    name, allowed = RAILS[light.rail]
    if light.rail == "gain" and light.limit == 1:
        allowed = FASTER
    limit = "" if light.limit is None else _limit(light)
    return {"name": say(name, subject=light.subject or say("text")), "allowed": say(allowed, limit=limit)}


def _limit(light: LightRecord) -> str:
    assert light.limit is not None
    if light.rail == "memory":
        return format_bytes(round(light.limit))
    return f"{100 * light.limit:g}" if light.rail in PERCENT else f"{light.limit:g}"


def _lights(candidate: CandidateRecord, rails: Sequence[LightRecord], say: Say) -> dict[str, Any]:
    by_rail = {(each.rail, each.subject): each for each in candidate.lights}
    cells = []
    for rail in rails:
        # Where nothing was evaluated there is one light for all texts.
        light = by_rail.get((rail.rail, rail.subject)) or by_rail.get((rail.rail, None))
        status = light.status if light else "cannot be told"
        cells.append({"status": say(status), "tag": _TAGS[status], "measured": _of_light(light, say) if light else ""})
    return {"name": candidate.name, "kind": say(candidate.kind), "cells": cells, "why": candidate.not_measured}


def _of_light(light: LightRecord, say: Say) -> str:
    if light.measured is None:
        return "" if light.rail == "verified" else say("not measured")
    if light.rail == "memory":
        return format_bytes(round(light.measured.value))
    return _percent(light.measured) if light.rail in PERCENT else _times(light.measured, say)


def _row(candidate: CandidateRecord, say: Say) -> dict[str, Any]:
    worst = worst_loss(candidate)
    return {
        "name": candidate.name,
        "kind": say(candidate.kind),
        "loss": _times(worst, say) if worst else say("not measured"),
        "speed": _times(candidate.gain, say) if candidate.gain else say("not measured"),
        "memory": format_bytes(candidate.memory_bytes) if candidate.memory_bytes else say("not measured"),
        "accuracy": _percent(candidate.accuracy) if candidate.accuracy else "",
        "change": _points(candidate.accuracy_change, say) if candidate.accuracy_change else "",
        "better": [say(each) for each in candidate.better],
    }


def _times(interval: Interval, say: Say) -> str:
    return say("%(value)sx", value=f"{interval.value:.2f}") + _ends(interval, 1, 2)


def _percent(interval: Interval) -> str:
    return f"{100 * interval.value:.1f} %" + _ends(interval, 100, 1)


def _points(interval: Interval, say: Say) -> str:
    ends = (
        ""
        if interval.low is None or interval.high is None
        else f" ({100 * interval.low:+.1f}…{100 * interval.high:+.1f})"
    )
    return (say("%(points)s points", points=f"{100 * interval.value:+.1f}") + ends).replace("-", "−")


def _ends(interval: Interval, scale: float, digits: int) -> str:
    if interval.low is None or interval.high is None:
        return ""
    return f" ({interval.low * scale:.{digits}f}–{interval.high * scale:.{digits}f})"


def _capacity(rows: Sequence[CapacityRow], inputs: CapacityInputs, say: Say) -> dict[str, Any]:
    return {
        "currency": inputs.currency,
        "has_gpus": any(row.gpus for row in rows),
        "has_cost": any(row.cost_per_million_tokens for row in rows),
        "has_conversations": any(row.conversations is not None for row in rows),
        "rows": [
            {
                "name": say(row.name),
                "rate": _significant(row.requests_per_s),
                "gpus": _significant(row.gpus),
                "cost": _significant(row.cost_per_million_tokens),
                "conversations": "" if row.conversations is None else f"{row.conversations:,}",
            }
            for row in rows
        ],
        "inputs": [
            (say(INPUTS[name]), f"{value:g}" + (f" {inputs.currency}" if name == "price_per_hour" else ""))
            for name in INPUTS
            if (value := getattr(inputs, name)) is not None
        ],
    }


def _significant(interval: Interval | None) -> str:
    if interval is None:
        return ""
    if interval.low is None or interval.high is None or interval.low == interval.high:
        return f"{interval.value:.3g}"
    return f"{interval.value:.3g} ({interval.low:.3g}–{interval.high:.3g})"
