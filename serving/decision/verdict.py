"""The verdict: deploy a candidate, or do not prune, and why; each sentence with its number and its interval.

The dearest mistake is to deploy what hurts or gains nothing. So a candidate is deployed only where every guard rail is
shown to hold, a gain in speed among them; whatever cannot be told, or was not measured, says "do not prune".
"""

import math
from collections.abc import Sequence

from serving.decision.capacity import gpus_saved
from serving.decision.document import CandidateRecord, CapacityRow, Interval, LightRecord, Rail, ReasonRecord
from serving.decision.lights import GB, all_green, was_seen
from serving.decision.pareto import worst_loss

DEPLOY = "Deploy %(candidate)s: it runs at %(gain)s times the original's speed (95 %% interval %(interval)s)."
INSTEAD = (
    "Do not prune: %(candidate)s is the better choice. It runs at %(gain)s times the original's speed (95 %% interval "
    "%(interval)s)."
)
DO_NOT = "Do not prune: no candidate is shown to be within all guard rails."
NO_CANDIDATE = "Do not prune: no candidate was measured."
SAVED = "At the peak load it saves %(saved)s of %(all)s GPUs (95 %% interval %(interval)s)."
KEPT = "On %(text)s its perplexity is %(value)s times the original's (95 %% interval %(interval)s)."
BEATEN = (
    "%(candidate)s is within the guard rails too, with %(gain)s times the original's speed (95 %% interval "
    "%(interval)s) and %(loss)s times its perplexity."
)
# By guard rail: shown to be broken, and not shown to hold.
BROKEN = {
    "perplexity": "%(candidate)s: on %(subject)s perplexity is %(value)s times the original's (95 %% interval "
    "%(interval)s), and %(limit)s is the most allowed.",
    "accuracy": "%(candidate)s: %(value)s %% of your questions are answered correctly (95 %% interval "
    "%(interval)s %%), and %(limit)s %% is the least allowed.",
    "group": "%(candidate)s: %(value)s %% of the questions in group %(subject)s are answered correctly (95 %% interval "
    "%(interval)s %%), and %(limit)s %% is the least allowed.",
    "least_metric": "%(candidate)s: %(subject)s is %(value)s %% (95 %% interval %(interval)s %%), and %(limit)s %% is "
    "the least allowed.",
    "most_metric": "%(candidate)s: %(subject)s is %(value)s %% (95 %% interval %(interval)s %%), and %(limit)s %% is "
    "the most allowed.",
    "gain": "%(candidate)s: the speed is %(value)s times the original's (95 %% interval %(interval)s), and %(limit)s "
    "is the least asked for.",
    "memory": "%(candidate)s takes %(value)s GB of memory, and %(limit)s GB is the most allowed.",
    "verified": "%(candidate)s: the export does not give its checkpoint's answers.",
}
OPEN = {
    "perplexity": "%(candidate)s: whether perplexity on %(subject)s is within %(limit)s times the original's cannot be "
    "told: %(value)s (95 %% interval %(interval)s). Evaluate on more windows.",
    "accuracy": "%(candidate)s: whether %(limit)s %% of your questions are answered correctly cannot be told: "
    "%(value)s %% (95 %% interval %(interval)s %%). Add questions.",
    "group": "%(candidate)s: whether %(limit)s %% of the questions in group %(subject)s are answered correctly cannot "
    "be told: %(value)s %% (95 %% interval %(interval)s %%). Add questions to it.",
    "least_metric": "%(candidate)s: whether %(subject)s is at least %(limit)s %% cannot be told: %(value)s %% (95 %% "
    "interval %(interval)s %%). Add questions to its file.",
    "most_metric": "%(candidate)s: whether %(subject)s is at most %(limit)s %% cannot be told: %(value)s %% (95 %% "
    "interval %(interval)s %%). Add questions to its file.",
    "gain": "%(candidate)s: more than %(limit)s times the original's speed is not shown: %(value)s times (95 %% "
    "interval %(interval)s).",
}
SEEN = (
    "%(candidate)s: whether perplexity on %(subject)s is within %(limit)s times the original's cannot be told: "
    "%(share)s %% of that text was read in calibration or healing, where the model looks too good. Evaluate on "
    "other text than the calibration text."
)
NOT_MEASURED = {
    "perplexity": "%(candidate)s: perplexity was not measured. %(why)s",
    "accuracy": "%(candidate)s: your questions were not asked. %(why)s",
    "group": "%(candidate)s: no question of group %(subject)s was asked. %(why)s",
    "least_metric": "%(candidate)s: %(subject)s was not measured. %(why)s",
    "most_metric": "%(candidate)s: %(subject)s was not measured. %(why)s",
    "gain": "%(candidate)s: the speed was not measured. %(why)s",
    "memory": "%(candidate)s: the memory was not measured. %(why)s",
    "verified": "%(candidate)s: the export was not verified. %(why)s",
}
MESSAGES = (
    DEPLOY, INSTEAD, DO_NOT, NO_CANDIDATE, SAVED, KEPT, BEATEN, SEEN,
    *BROKEN.values(), *OPEN.values(), *NOT_MEASURED.values(),
)  # fmt: skip
# Measured as shares, and said in percent.
PERCENT: tuple[Rail, ...] = ("accuracy", "group", "least_metric", "most_metric")


def decide(
    candidates: Sequence[CandidateRecord], capacity: Sequence[CapacityRow]
) -> tuple[str, str | None, list[ReasonRecord]]:
    """What to do, with which candidate, and why.

    Of the candidates whose lights are all green, it is the fastest; and where others are not shown to be slower than
    that, the one of them with the lowest perplexity. If that is not pruned, pruning is not the answer.

    Args:
        candidates: With their lights.
        capacity: See :func:`serving.decision.capacity.capacity_rows`.

    Returns:
        ``deploy`` or ``do not prune``; the candidate's name, or ``None``; and the reasons, of which the first says all.
    """
    if not candidates:
        return "do not prune", None, [_said(NO_CANDIDATE)]
    best = _best([each for each in candidates if all_green(each)])
    if best is None:
        return "do not prune", None, [_said(DO_NOT), *_obstacles(candidates)]
    is_pruned = best.kind in ("pruned", "pruned and quantised")
    reasons = [_gain(DEPLOY if is_pruned else INSTEAD, best)]
    if found := gpus_saved(capacity, best.name):
        saved, before = found
        values = {"saved": _number(saved.value), "all": str(before), "interval": _ends(saved)}
        reasons.append(_said(SAVED, values, best, measured=saved))
    reasons += [
        _said(KEPT, {"text": text, **_measured(each)}, best, measured=each) for text, each in best.perplexity.items()
    ]
    reasons += [_beaten(each) for each in candidates if all_green(each) and each.name != best.name]
    if not is_pruned:
        reasons += _obstacles([each for each in candidates if each.kind == "pruned"])
    return "deploy" if is_pruned else "do not prune", best.name, reasons


def _best(allowed: Sequence[CandidateRecord]) -> CandidateRecord | None:
    measured = [(each, each.gain) for each in allowed if each.gain is not None]
    if not measured:
        return None
    fastest = max((gain for _, gain in measured), key=lambda gain: gain.value)
    as_fast = [each for each, gain in measured if not _is_slower(gain, fastest)]
    return min(as_fast, key=_loss)


def _loss(candidate: CandidateRecord) -> float:
    worst = worst_loss(candidate)
    return math.inf if worst is None else worst.value


def _is_slower(gain: Interval, fastest: Interval) -> bool:
    """Whether two gains, measured independently, differ by more than both intervals allow together."""
    if not (gain.low and fastest.low):
        return gain.value < fastest.value
    margins = [math.log(each.value / each.low) for each in (gain, fastest) if each.low]
    return math.log(fastest.value / gain.value) > math.hypot(*margins)


def _obstacles(candidates: Sequence[CandidateRecord]) -> list[ReasonRecord]:
    """What stands in each candidate's way, of those with the fewest red lights first.

    Lights that are red or crossed by an interval; only where there are none, the first thing that was not measured, and
    why: the others follow from it.
    """
    ordered = sorted(candidates, key=lambda each: sum(light.status == "red" for light in each.lights))
    found = []
    for each in ordered:
        others = [light for light in each.lights if light.status != "green"]
        told = [light for light in others if light.status == "red" or light.measured is not None]
        told = told or others[:1]
        found += [_obstacle(each, light) for light in sorted(told, key=lambda light: light.status != "red")]
    return found


def _obstacle(candidate: CandidateRecord, light: LightRecord) -> ReasonRecord:
    if light.measured is None and light.status != "red":
        values = {"why": candidate.not_measured, "subject": light.subject or ""}
        return _said(NOT_MEASURED[light.rail], values, candidate, light=light)
    if light.rail == "verified":
        return _said(BROKEN["verified"], {}, candidate, light=light)
    assert light.measured is not None and light.limit is not None
    message = (BROKEN if light.status == "red" else OPEN)[light.rail]
    scale = 100 if light.rail in PERCENT else 1 / GB if light.rail == "memory" else 1
    values = {
        "subject": light.subject or "", "limit": f"{light.limit * scale:.6g}", **_measured(light.measured, scale),
    }  # fmt: skip
    if light.rail == "perplexity" and light.status != "red" and was_seen(candidate, light.subject):
        message, values["share"] = SEEN, f"{100 * candidate.seen[values['subject']]:.3g}"
    return _said(message, values, candidate, light=light)


def _gain(message: str, candidate: CandidateRecord) -> ReasonRecord:
    assert candidate.gain is not None
    values = {"gain": _number(candidate.gain.value), "interval": _ends(candidate.gain)}
    return _said(message, values, candidate, measured=candidate.gain)


def _beaten(candidate: CandidateRecord) -> ReasonRecord:
    assert candidate.gain is not None
    values = {
        "gain": _number(candidate.gain.value), "interval": _ends(candidate.gain), "loss": _number(_loss(candidate)),
    }  # fmt: skip
    return _said(BEATEN, values, candidate, measured=candidate.gain)


def _said(
    message: str,
    values: dict[str, str] | None = None,
    candidate: CandidateRecord | None = None,
    *,
    measured: Interval | None = None,
    light: LightRecord | None = None,
) -> ReasonRecord:
    return ReasonRecord(
        message=message,
        values={**({"candidate": candidate.name} if candidate else {}), **(values or {})},
        candidate=candidate.name if candidate else None,
        rail=light.rail if light else None,
        measured=light.measured if light else measured,
    )


def _measured(measured: Interval, scale: float = 1) -> dict[str, str]:
    return {"value": _number(measured.value * scale), "interval": _ends(measured, scale)}


def _ends(measured: Interval, scale: float = 1) -> str:
    if measured.low is None or measured.high is None:
        return "?"
    return f"{_number(measured.low * scale)}–{_number(measured.high * scale)}"


def _number(value: float) -> str:
    """Three digits, and more where a number is close to 1, of which the distance counts."""
    if abs(value) >= 100 or value == round(value):
        return f"{value:.0f}"
    return f"{value:.3f}" if 0.9 < value < 1.1 else f"{value:.3g}"
