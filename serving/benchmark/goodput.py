"""The highest request rate at which a server still meets its objectives: what decides how many GPUs to buy."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, stdev
from typing import Any

from serving.benchmark.metrics import Metric
from toolchain.significance import t_margin, wilson_interval

# DistServe (arXiv 2401.09670) defines goodput as the rate at which this share of requests meets every objective.
ATTAINMENT = 0.9
# A server that answers less than this share of what arrives has a queue that grows for as long as requests come.
KEPT_UP = 0.95
# Nothing that was sent or answered in this first part of a probe's arrivals says whether the server keeps up: at the
# start it is empty, and answers are still to come.
_RAMP_UP = 0.25
_BATCHES = 10
_OCTAVES, _BISECTIONS = 7, 5
PROBE_SECONDS, LONGEST_PROBE_SECONDS = 30.0, 300.0
MIN_PROBE_PROMPTS, MAX_PROBE_PROMPTS = 40, 3000
# An undecided probe is made again, this much longer.
_LONGER = 4
# Half an interval's width at which a probe is precise enough to decide: of the share that misses the objectives, and of
# the arrivals.
_MET_NARROW, _ANSWERED_NARROW = 0.25, 0.08
# A probe lasts at least this many times as long as one request alone.
_REQUESTS_LONG = 8


RATE_FORMULA = (
    "requests answered per second after ramp-up, at the highest Poisson request rate tried at which the share "
    "'attainment' of the requests met every objective and at least 95 % as many were answered as arrived; ramp-up is "
    "the first quarter of the arrivals. From the rate of 40 or more requests sent at once it is halved until they do, "
    "or doubled while they do, then five bisections on a logarithmic scale, so the rate found is up to 2.2 % below the "
    "highest. A probe lasts 30 s and 40 requests at least; it is made again four times as long, up to 3000 requests or "
    "300 s, until the 95 % intervals of both shares leave their limits out or are narrow (± 8 % of the arrivals, ± a "
    "quarter of the misses allowed). Failed requests miss their objectives"
)
GOODPUT_FORMULA = "requests that met every objective and were answered after ramp-up, per second, at that rate"
GOODPUT_METRICS = (
    Metric(name="max_request_rate", unit="requests/s", better="higher", formula=RATE_FORMULA),
    Metric(name="request_goodput", unit="requests/s", better="higher", formula=GOODPUT_FORMULA),
)


@dataclass(frozen=True, kw_only=True)
class AskedRequest:
    """One request of a probe.

    Attributes:
        sent_s: When it was sent, on any clock.
        ended_s: When its answer was whole; ``None`` where it failed.
        met: Whether it met every objective.
    """

    sent_s: float
    ended_s: float | None
    met: bool


@dataclass(frozen=True, kw_only=True)
class Share:
    """A share with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What one request rate came to, after ramp-up.

    Attributes:
        met: Share of the requests that met every objective.
        answered: Answers over arrivals, both in the time from the end of the ramp-up to the last arrival. Above 1 where
            a queue of the ramp-up was worked off.
        num_requests: All that were sent, ramp-up included.
    """

    met: Share
    answered: Share
    num_requests: int


def read_probe(requests: Sequence[AskedRequest], *, rate: float) -> Probe:
    """Whether a server kept up with a rate, from what became of each request.

    The interval of ``answered`` is Student's, over ten stretches of equal length, of how many more arrived than were
    answered. That of ``met`` is Wilson's, with as many fewer requests as these are alike: requests that wait in the
    same queue are late together.

    Args:
        requests: All of one probe; two at least.
        rate: Requests per second that were asked for. Where the load generator itself fell behind, what it did not
            send in time counts as not answered.
    """
    ordered = sorted(requests, key=lambda each: each.sent_s)
    first_s, last_s = ordered[0].sent_s, ordered[-1].sent_s
    start_s = first_s + _RAMP_UP * (last_s - first_s)
    behind = max(1.0, rate * (last_s - first_s) / len(ordered))
    edges = [start_s + i * (last_s - start_s) / _BATCHES for i in range(_BATCHES + 1)]
    sent = _counts([each.sent_s for each in ordered], edges)
    ended = _counts([each.ended_s for each in ordered if each.ended_s is not None], edges)
    met = [each.met for each in ordered if each.sent_s > start_s]
    return Probe(
        met=_met_share(met), answered=_answered_share(sent, ended, behind), num_requests=len(ordered)
    )  # fmt: skip


def _counts(times_s: Sequence[float], edges: Sequence[float]) -> list[int]:
    """How many fall into each stretch: after its left edge, up to its right."""
    return [sum(left < time <= right for time in times_s) for left, right in pairwise(edges)]


def _answered_share(sent: Sequence[int], ended: Sequence[int], behind: float) -> Share:
    arrived = sum(sent)
    left_over = [before - after for before, after in zip(sent, ended, strict=True)]
    value = sum(ended) / arrived
    margin = t_margin(stdev(left_over) / math.sqrt(_BATCHES), _BATCHES - 1) * _BATCHES / arrived
    return Share(value=value / behind, low=(value - margin) / behind, high=(value + margin) / behind)


def _met_share(met: Sequence[bool]) -> Share:
    count, right = len(met), sum(met)
    size = max(1, count // _BATCHES)
    batches = [fmean(met[i : i + size]) for i in range(0, size * (count // size), size)]
    alone = right / count * (1 - right / count) / size
    alike = max(1.0, stdev(batches) ** 2 / alone) if alone and len(batches) > 1 else 1.0
    fewer = max(1, round(count / alike))
    low, high = wilson_interval(round(fewer * right / count), fewer)
    return Share(value=right / count, low=low, high=high)


def probe_prompts(rate: float, alone_s: float) -> list[int]:
    """How many requests to send at a rate, and how many if that leaves it open, from the shortest probe on.

    Args:
        rate: Requests per second.
        alone_s: How long one request takes when nothing else is asked.
    """
    most = min(MAX_PROBE_PROMPTS, max(MIN_PROBE_PROMPTS, math.ceil(LONGEST_PROBE_SECONDS * rate)))
    first = max(MIN_PROBE_PROMPTS, math.ceil(max(PROBE_SECONDS, _REQUESTS_LONG * alone_s) * rate))
    lengths = [min(first, MAX_PROBE_PROMPTS)]
    while lengths[-1] < most:
        lengths.append(min(_LONGER * lengths[-1], most))
    return lengths


def alone_prompts(attainment: float) -> int:
    """How many requests to send one at a time: so many that one that is late by chance does not end the search."""
    return max(20, math.ceil(2 / (1 - attainment) - 1e-9))


def find_highest_rate(
    start: float,
    probe: Callable[[float, int], Probe],
    *,
    alone_met: float,
    alone_s: float,
    attainment: float = ATTAINMENT,
) -> dict[str, Any]:
    """Searches from a rate downwards until the objectives are met, or upwards while they are, then between the two.

    Args:
        start: Requests a second; a guess at what can be sustained.
        probe: Measures one request rate with a number of requests.
        alone_met: Share of requests that met the objectives when they were sent one at a time. Where these miss them
            every rate does, and the lower ones, whose requests take hours to arrive, are spared.
        alone_s: How long such a request took.
        attainment: The share that must meet every objective.

    Returns:
        ``max_request_rate`` and ``request_goodput``, both 0 if not even 1/128 of the start meets them, and ``tried``:
        every probe with what it came to; empty if requests one at a time missed the objectives.
    """
    tried: list[dict[str, Any]] = []
    best: dict[str, Any] | None = None

    def holds(rate: float, skipped: int = 0) -> tuple[bool, int]:
        nonlocal best
        lengths = probe_prompts(rate, alone_s)
        number = min(skipped, len(lengths) - 1)
        while True:
            found = probe(rate, lengths[number])
            verdict = _holds(found, attainment, must_decide=number == len(lengths) - 1)
            tried.append(_entry(rate, found, verdict))
            if verdict is not None:
                break
            number += 1
        if verdict and (best is None or rate > best["request_rate"]):
            best = tried[-1]
        return verdict, number

    if alone_met >= attainment:
        low, high = _bracket(start, lambda rate: holds(rate)[0])
        skipped = 0
        for _ in range(_BISECTIONS if low and high else 0):
            assert low and high
            middle = (low * high) ** 0.5
            # Each is nearer to the highest rate than the one before, and what was too short for that is for this one.
            held, skipped = holds(middle, skipped)
            low, high = (middle, high) if held else (low, middle)
    answered = min(1.0, best["answered"]) * best["request_rate"] if best else 0.0
    return {
        "max_request_rate": answered,
        "request_goodput": best["met"] * answered if best else 0.0,
        "tried": tried,
    }


def _bracket(start: float, holds: Callable[[float], bool]) -> tuple[float | None, float | None]:
    """The highest rate that holds and the lowest that does not, a factor of 2 apart; ``None`` for what was not met."""
    low: float | None = None
    high: float | None = None
    rate = start
    for _ in range(_OCTAVES + 1):
        if holds(rate):
            low = rate
            if high:
                break
            rate *= 2
        else:
            high = rate
            if low:
                break
            rate /= 2
    return low, high


def _holds(found: Probe, attainment: float, *, must_decide: bool) -> bool | None:
    """Whether a rate holds; ``None`` where its intervals leave that open and a longer probe is possible."""
    limits = ((found.met, attainment), (found.answered, KEPT_UP))
    if any(share.high < limit for share, limit in limits):
        return False
    narrow = (_MET_NARROW * (1 - attainment), _ANSWERED_NARROW)
    precise = all((share.high - share.low) / 2 <= width for (share, _), width in zip(limits, narrow, strict=True))
    if precise or must_decide or all(share.low >= limit for share, limit in limits):
        return all(share.value >= limit for share, limit in limits)
    return None


def _entry(rate: float, found: Probe, verdict: bool | None) -> dict[str, Any]:
    return {
        "request_rate": rate,
        "num_requests": found.num_requests,
        "met": found.met.value,
        "met_interval": [found.met.low, found.met.high],
        "answered": found.answered.value,
        "answered_interval": [found.answered.low, found.answered.high],
        "holds": verdict,
    }
