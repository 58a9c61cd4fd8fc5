"""From the samples of Prometheus to what happened in each block of the window, on one side.

Counters are added up from their raw samples. PromQL's ``increase`` would do two things that a gate must not: it guesses
what lies between the samples and the ends of the window, and it passes over the first errors of a server, since the
series of errors begins with them.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from serving.gate.intervals import Blocks
from serving.gate.prometheus import Series, Window

BLOCKS, STEPS_PER_BLOCK = 20, 6
# vLLM lets the client library choose a format. Asked for OpenMetrics, as Prometheus does, some versions of it write an
# underscore for the colon.
_COLON = "[:_]"
# What every server of either kind has from its start; it says which servers there are.
_PRESENCE = "vllm:generation_tokens_total"
_HTTP, _ENDED = "http_requests_total", "vllm:request_success_total"
_TTFT, _TPOT = "vllm:time_to_first_token_seconds", "vllm:request_time_per_output_token_seconds"
_WAITING, _KV_CACHE = "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"
_ALL = (
    _PRESENCE, _HTTP, _ENDED, _WAITING, _KV_CACHE,
    *(f"{name}_{part}" for name in (_TTFT, _TPOT) for part in ("bucket", "sum", "count")),
)  # fmt: skip
# Regular expressions.
NAMES = tuple(name.replace(":", _COLON) for name in _ALL)
# Requests that did not get their answer: the server failed, or the client waited no longer.
_UNFINISHED = ("abort", "error")
# A server of which the last two steps know nothing is gone.
_GONE_STEPS = 2


@dataclass(frozen=True, kw_only=True)
class Latency:
    """A histogram of Prometheus.

    Attributes:
        sums_s: Seconds, float64 [blocks].
        counts: Requests, float64 [blocks].
        within: Requests that took at most so many seconds, by these: float64 [blocks].
    """

    sums_s: Blocks
    counts: Blocks
    within: dict[float, Blocks]


@dataclass(frozen=True, kw_only=True)
class Side:
    """What happened on the servers of one side; arrays are float64 [blocks].

    Attributes:
        answers: HTTP answers to requests for text.
        error_answers: Those with a status of 4xx or 5xx.
        ended: Requests that the engine has ended.
        unfinished: Those that ended without their answer.
        ttft: Time to first token.
        tpot: Time per output token after the first, each request's mean.
        waiting: Mean number of requests that wait, per server; NaN where nothing is known.
        kv_cache: Mean share of the KV cache that is used; likewise.
        servers: How many were seen.
        servers_now: How many are there at the end.
        restarts: How often one began anew.
    """

    answers: Blocks
    error_answers: Blocks
    ended: Blocks
    unfinished: Blocks
    ttft: Latency
    tpot: Latency
    waiting: Blocks
    kv_cache: Blocks
    servers: int
    servers_now: int
    restarts: int


def count(found: Sequence[Series], window: Window) -> Side:
    """Adds up what Prometheus knows of one side.

    Args:
        found: Series of :data:`NAMES`.
        window: The window that they are of.
    """
    by_name: dict[str, list[Series]] = defaultdict(list)
    for each in found:
        if each.samples:
            name = each.labels.get("__name__", "")
            by_name[re.sub("^vllm_", "vllm:", name)].append(each)
    presence = by_name[_PRESENCE]
    first_seen_s: dict[tuple[str, str], float] = {}
    for each in presence:
        first_seen_s[_server(each)] = min(each.samples[0][0], first_seen_s.get(_server(each), window.end_s))
    adding = _Adding(window, first_seen_s)
    http = [each for each in by_name[_HTTP] if _asks_for_text(each.labels.get("handler", ""))]
    there_until = window.end_s - _GONE_STEPS * window.step_s
    return Side(
        answers=adding.total(http),
        error_answers=adding.total(each for each in http if each.labels.get("status", "")[:1] in ("4", "5")),
        ended=adding.total(by_name[_ENDED]),
        unfinished=adding.total(each for each in by_name[_ENDED] if each.labels.get("finished_reason") in _UNFINISHED),
        ttft=_latency(by_name, _TTFT, adding),
        tpot=_latency(by_name, _TPOT, adding),
        waiting=adding.mean(by_name[_WAITING]),
        kv_cache=adding.mean(by_name[_KV_CACHE]),
        servers=len(first_seen_s),
        servers_now=len({_server(each) for each in presence if each.samples[-1][0] >= there_until}),
        restarts=sum(
            later < earlier
            for each in presence
            for (_, earlier), (_, later) in zip(each.samples, each.samples[1:], strict=False)
        ),
    )


class _Adding:
    """Adds up counters and levels in the blocks of a window."""

    def __init__(self, window: Window, first_seen_s: dict[tuple[str, str], float]) -> None:
        self._window, self._first_seen_s = window, first_seen_s

    def total(self, counters: Iterable[Series]) -> Blocks:
        """How much the counters grew in each block, all together."""
        grown = np.zeros(BLOCKS)
        for each in counters:
            (first_s, before), *rest = each.samples
            if first_s > self._first_seen_s.get(_server(each), first_s):
                # Its server was there already, so it began at 0: the client library makes a series at the first event.
                grown[self._block(first_s)] += before
            for time_s, value in rest:
                grown[self._block(time_s)] += value - before if value >= before else value
                before = value
        return grown

    def mean(self, levels: Iterable[Series]) -> Blocks:
        """The mean over time and servers in each block; NaN where there is no sample."""
        sums, counts = np.zeros(BLOCKS), np.zeros(BLOCKS)
        for each in levels:
            for time_s, value in each.samples:
                block = self._block(time_s)
                sums[block] += value
                counts[block] += 1
        with np.errstate(invalid="ignore"):
            return sums / counts

    def _block(self, time_s: float) -> int:
        # What a counter shows at the end of a block happened in that block.
        place = int(np.ceil((time_s - self._window.start_s) / self._window.length_s * BLOCKS)) - 1
        return min(max(place, 0), BLOCKS - 1)


def _latency(by_name: dict[str, list[Series]], name: str, adding: _Adding) -> Latency:
    buckets: dict[float, list[Series]] = defaultdict(list)
    for each in by_name[f"{name}_bucket"]:
        try:
            buckets[float(each.labels.get("le", ""))].append(each)
        except ValueError:
            continue
    counts = adding.total(by_name[f"{name}_count"])
    return Latency(
        sums_s=adding.total(by_name[f"{name}_sum"]),
        counts=counts,
        # Two scrapes may lie between a bucket and the count.
        within={bound: np.minimum(adding.total(buckets[bound]), counts) for bound in sorted(buckets)},
    )


def _server(each: Series) -> tuple[str, str]:
    return each.labels.get("job", ""), each.labels.get("instance", "")


def _asks_for_text(handler: str) -> bool:
    return handler.startswith("/v1/") and not handler.startswith("/v1/models")
