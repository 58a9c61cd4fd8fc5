"""``gate.yaml``: which servers are compared, over how long, and how much worse the candidate may be."""

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from toolchain.documents import Document, Number, Record

GATE_FILE = "gate.yaml"
# Twenty blocks of time, each with some scrapes in it; and no more than Prometheus usually keeps in memory.
LEAST_WINDOW_S, MOST_WINDOW_S = 120, 24 * 3600
_WINDOW = re.compile(r"([1-9][0-9]{0,4})([smh])")
_SECONDS = {"s": 1, "m": 60, "h": 3600}
_LABEL = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")


def _a_window(text: object) -> object:
    if (found := _WINDOW.fullmatch(str(text))) is None:
        raise ValueError("write a duration such as 90s, 30m or 2h")
    if not LEAST_WINDOW_S <= int(found[1]) * _SECONDS[found[2]] <= MOST_WINDOW_S:
        raise ValueError(f"a window has {LEAST_WINDOW_S} seconds at least, and 24 hours at most")
    return text


def _labels(labels: dict[str, str]) -> dict[str, str]:
    for name, value in labels.items():
        if not _LABEL.fullmatch(name) or name == "__name__":
            raise ValueError(f"{name!r} is no name of a label")
        if not value:
            raise ValueError(f"{name} is empty, which Prometheus takes for: has no such label")
    return labels


Share = Annotated[Number, Field(gt=0, lt=1)]
Labels = Annotated[dict[str, str], Field(min_length=1), AfterValidator(_labels)]


class ErrorLimits(Record):
    """Errors. ``max_increase`` is the candidate's share of requests that fail minus the original's; 0.005 is 0.5 %."""

    max_increase: Share = 0.005


class LatencyLimits(Record):
    """A time that users wait for.

    ``max_ratio`` is the candidate's mean, in multiples of the original's. A request is slow if it takes longer than
    ``slow_s`` seconds; without that, longer than 95 % of the original's requests take. ``max_slow_increase`` is the
    candidate's share of slow requests minus the original's.
    """

    max_ratio: Annotated[Number, Field(gt=1, le=10)] = 1.1
    slow_s: Annotated[Number, Field(gt=0, le=3600)] | None = None
    max_slow_increase: Share = 0.05


class QueueLimits(Record):
    """Requests that wait, per server: ``max_increase`` is the candidate's mean minus the original's."""

    max_increase: Annotated[Number, Field(gt=0, le=100_000)] = 1.0


class KvCacheLimits(Record):
    """The used share of the KV cache: ``max_increase`` is the candidate's mean minus the original's."""

    max_increase: Share = 0.1


class ShadowLimits(Record):
    """Your own prompts, which both sides answer.

    ``original`` and ``candidate`` are the URLs of a server of each, not of the router. ``prompts`` is a ``.jsonl``
    file, named from the directory of ``gate.yaml``; a line has ``prompt`` or ``messages``. Each answer is greedy and
    has at most ``max_tokens``. ``max_increase`` is the share of prompts to which the candidate answers otherwise than
    the original, minus the share to which the original answers otherwise when it is asked again.
    """

    original: str
    candidate: str
    prompts: str
    max_tokens: Annotated[int, Field(ge=1, le=256)] = 16
    max_increase: Share


class GateDocument(Document):
    """All of ``gate.yaml``.

    ``original`` and ``candidate`` are the labels by which Prometheus knows the servers of each. Fewer than
    ``min_requests`` of either in the ``window`` are never enough to promote. ``looks`` is how often you will ask during
    one roll-out: all of these answers together roll back an equal candidate at most 5 times in 100. With ``shadow`` the
    answers of both sides to your own prompts are compared too.
    """

    version: Literal[1]
    original: Labels
    candidate: Labels
    window: Annotated[str, BeforeValidator(_a_window)] = "30m"
    min_requests: Annotated[int, Field(ge=100, le=10_000_000)] = 1000
    looks: Annotated[int, Field(ge=1, le=10_000)] = 10
    errors: ErrorLimits = Field(default_factory=ErrorLimits)
    ttft: LatencyLimits = Field(default_factory=LatencyLimits)
    tpot: LatencyLimits = Field(default_factory=LatencyLimits)
    queue: QueueLimits = Field(default_factory=QueueLimits)
    kv_cache: KvCacheLimits = Field(default_factory=KvCacheLimits)
    shadow: ShadowLimits | None = None

    @model_validator(mode="after")
    def _two_sides(self) -> Self:
        shared = self.original.keys() & self.candidate.keys()
        if all(self.original[name] == self.candidate[name] for name in shared):
            raise ValueError(
                "original and candidate can name the same servers: give both a label whose values differ, such as job"
            )
        return self

    @property
    def window_s(self) -> int:
        """The window in seconds."""
        return int(self.window[:-1]) * _SECONDS[self.window[-1]]
