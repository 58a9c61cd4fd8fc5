"""A decision in a sentence for people, and as an object for machines."""

from dataclasses import asdict
from typing import Any

from serving.gate.decide import Check, Decision
from serving.gate.document import GateDocument


def sentence(decision: Decision, asked: GateDocument) -> str:
    """The answer and why, with numbers and intervals."""
    begin = decision.answer.capitalize()
    if decision.reason:
        return f"{begin}: {decision.reason}."
    original, candidate = decision.requests
    over = f"over {asked.window}, {candidate:,} requests of the candidate and {original:,} of the original"
    if decision.answer == "promote":
        return f"{begin}: {over}: {'; '.join(map(_short, decision.checks))}."
    if decision.answer == "roll back":
        return f"{begin}: {over}: {'; '.join(_short(each) for each in decision.checks if each.state == 'worse')}."
    if min(decision.requests) < asked.min_requests:
        return f"{begin}: {over}, and {asked.min_requests:,} of each are needed."
    return f"{begin}: {over}, and this is open: {'; '.join(_short(e) for e in decision.checks if e.state == 'open')}."


def _short(check: Check) -> str:
    if (found := check.interval) is None:
        return f"{check.title}: too little to compare"
    if check.is_ratio:
        return (
            f"{check.title} {found.value:.2f} times the original's ({found.low:.2f} to {found.high:.2f}; "
            f"{check.allowed:g} allowed)"
        )
    if check.unit == "share":
        value, low, high, allowed = (100 * each for each in (found.value, found.low, found.high, check.allowed))
        return f"{check.title} {value:+.2f} points ({low:+.2f} to {high:+.2f}; {allowed:+g} allowed)"
    return f"{check.title} {found.value:+.2f} ({found.low:+.2f} to {found.high:+.2f}; {check.allowed:+g} allowed)"


def table(decision: Decision) -> list[tuple[str, ...]]:
    """A row for each check: what, original, candidate, how much worse, state."""
    rows: list[tuple[str, ...]] = []
    for check in decision.checks:
        found = check.interval
        before, after = ("", "") if found is None else (_level(found.original, check), _level(found.candidate, check))
        rows.append((check.title, before, after, _short(check).removeprefix(check.title).strip(" :"), check.state))
    return rows


def _level(value: float, check: Check) -> str:
    return f"{100 * value:.2f} %" if check.unit == "share" else f"{value:.4g} {check.unit if check.unit == 's' else ''}"


def as_object(decision: Decision, asked: GateDocument) -> dict[str, Any]:
    """For ``--json``."""
    original, candidate = decision.requests
    return {
        "decision": decision.answer.replace(" ", "_"),
        "sentence": sentence(decision, asked),
        "window_s": asked.window_s,
        "requests": {"original": original, "candidate": candidate},
        "checks": [asdict(check) for check in decision.checks],
    }
