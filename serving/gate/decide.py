"""Promote, wait or roll back, from what was counted on both sides. A pure function.

Each check asks how much worse the candidate is, and has an interval. It is *worse* if the whole interval lies above
what is allowed, *fine* if the whole interval lies below, else *open*. One check that is worse rolls back, all fine
promote, and everything else waits for more requests.

An equal candidate is rolled back with a probability of at most :data:`FALSE_ALARMS`, over all checks and all looks
(Bonferroni): each interval has its part of that as its error. A candidate that is worse than allowed in any one check
is promoted with at most this check's part.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from serving.gate.counts import Latency, Side
from serving.gate.document import GateDocument, LatencyLimits
from serving.gate.intervals import Blocks, Interval, level_increase, mean_ratio, share_increase
from serving.gate.shadow import Shadow

FALSE_ALARMS = 0.05
# A request is slow if it takes longer than this share of the original's.
_USUAL = 0.95
Answer = Literal["promote", "wait", "roll back"]
State = Literal["fine", "open", "worse"]
Unit = Literal["share", "s", "requests"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One question and what the counts say to it.

    Attributes:
        name: For machines.
        title: For people, of what is compared.
        unit: Of both sides' values.
        is_ratio: Whether the value is a ratio, and else a difference.
        allowed: What the value may be at most.
        interval: ``None`` where there is too little to compare.
        state: See the module.
    """

    name: str
    title: str
    unit: Unit
    is_ratio: bool
    allowed: float
    interval: Interval | None
    state: State


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The answer, the checks behind it, and the requests of each side.

    ``reason`` is why no check was asked, if none was: nobody is there to compare.
    """

    answer: Answer
    reason: str
    checks: tuple[Check, ...]
    requests: tuple[int, int]


def decide(original: Side, candidate: Side, asked: GateDocument, shadow: Shadow | None = None) -> Decision:
    """Decides.

    Args:
        original: What was counted on the original's servers.
        candidate: Likewise on the candidate's.
        asked: Limits, traffic and looks.
        shadow: How both answered the operator's prompts; needed where ``asked`` has a limit for it.
    """
    requests = int(original.ttft.counts.sum()), int(candidate.ttft.counts.sum())
    if (without := _without_servers(original, candidate)) is not None:
        answer, reason = without
        return Decision(answer=answer, reason=reason, checks=(), requests=requests)
    checks = _checks(original, candidate, asked, shadow, has_traffic=min(requests) >= asked.min_requests)
    states = {check.state for check in checks}
    answer = "roll back" if "worse" in states else "promote" if states == {"fine"} else "wait"
    return Decision(answer=answer, reason="", checks=checks, requests=requests)


def _without_servers(original: Side, candidate: Side) -> tuple[Answer, str] | None:
    for side, name in ((original, "original"), (candidate, "candidate")):
        if not side.servers:
            return "wait", f"Prometheus has seen no server of the {name}: check its labels, and whether it has started"
    if not original.servers_now:
        return "wait", "Prometheus sees no server of the original any more, so there is nothing to compare with"
    if not candidate.servers_now:
        return "roll back", "the candidate's servers are gone"
    if candidate.restarts > original.restarts:
        often = _times(candidate.restarts), _times(original.restarts)
        return "roll back", f"the candidate's servers restarted {often[0]}, the original's {often[1]}"
    return None


def _times(number: int) -> str:
    return {0: "never", 1: "once"}.get(number, f"{number} times")


def _checks(
    original: Side, candidate: Side, asked: GateDocument, shadow: Shadow | None, *, has_traffic: bool
) -> tuple[Check, ...]:
    limits = asked.errors.max_increase

    def share(name: str, title: str, *counts: tuple[Blocks, Blocks]) -> "_Question":
        return _Question(
            name, title, "share", limits, lambda error: share_increase(*counts, error=error, in_clusters=False),
            is_exact=True,
        )  # fmt: skip

    questions = [
        share(
            "error_answers", "answers with status 4xx or 5xx",
            (original.error_answers, candidate.error_answers), (original.answers, candidate.answers),
        ),
        share(
            "unfinished", "requests that ended without an answer",
            (original.unfinished, candidate.unfinished), (original.ended, candidate.ended),
        ),
        *_latency("ttft", "time to first token", (original.ttft, candidate.ttft), asked.ttft),
        *_latency("tpot", "time per output token", (original.tpot, candidate.tpot), asked.tpot),
        _Question(
            "queue", "requests that wait, per server", "requests", asked.queue.max_increase,
            lambda error: level_increase((original.waiting, candidate.waiting), error=error),
        ),
        _Question(
            "kv_cache", "used part of the KV cache", "share", asked.kv_cache.max_increase,
            lambda error: level_increase((original.kv_cache, candidate.kv_cache), error=error),
        ),
    ]  # fmt: skip
    if asked.shadow:
        assert shadow is not None
        questions.append(
            _Question(
                "shadow", "own prompts that are answered otherwise", "share", asked.shadow.max_increase,
                lambda error: share_increase(*shadow.counts(), error=error, in_clusters=False), is_exact=True,
            )
        )  # fmt: skip
    error = FALSE_ALARMS / (len(questions) * asked.looks)
    return tuple(each.asked(error, may_judge=has_traffic) for each in questions)


@dataclass(frozen=True)
class _Question:
    name: str
    title: str
    unit: Unit
    allowed: float
    interval: Callable[[float], Interval | None]
    is_ratio: bool = False
    is_exact: bool = False

    def asked(self, error: float, *, may_judge: bool) -> Check:
        """Without enough traffic nothing is fine, and only what has exact intervals may be worse."""
        found = self.interval(error)
        state: State = "open"
        if found is not None:
            if found.low > self.allowed and (may_judge or self.is_exact):
                state = "worse"
            elif found.high <= self.allowed and may_judge:
                state = "fine"
        return Check(
            name=self.name, title=self.title, unit=self.unit, is_ratio=self.is_ratio, allowed=self.allowed,
            interval=found, state=state,
        )  # fmt: skip


def _latency(name: str, title: str, sides: tuple[Latency, Latency], limits: LatencyLimits) -> list["_Question"]:
    original, candidate = sides
    sums, counts = (original.sums_s, candidate.sums_s), (original.counts, candidate.counts)
    bound = _slow_bound(original, candidate, limits.slow_s)

    def slow(error: float) -> Interval | None:
        if bound is None:
            return None
        slower = original.counts - original.within[bound], candidate.counts - candidate.within[bound]
        return share_increase(slower, counts, error=error, in_clusters=True)

    than = "longer than usual" if bound is None else f"longer than {bound:g} s"
    return [
        _Question(
            name, f"mean {title}", "s", limits.max_ratio, lambda error: mean_ratio(sums, counts, error=error), True
        ),
        _Question(f"{name}_slow", f"requests whose {title} is {than}", "share", limits.max_slow_increase, slow),
    ]


def _slow_bound(original: Latency, candidate: Latency, asked_s: float | None) -> float | None:
    """The bound of a bucket, s: the largest that is not above what was asked, or one that most of the original keep."""
    shared = [bound for bound in original.within if bound in candidate.within and bound != float("inf")]
    if asked_s is not None:
        return max((bound for bound in shared if bound <= asked_s), default=None)
    total = original.counts.sum()
    return next((bound for bound in shared if total and original.within[bound].sum() >= _USUAL * total), None)
