"""The highest request rate at which a server still meets its objectives: what decides how many GPUs to buy."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from serving.benchmark.metrics import Metric

# DistServe (arXiv 2401.09670) defines goodput as the rate at which this share of requests meets every objective.
ATTAINMENT = 0.9
# Under wide limits a short probe's queue never hurts anybody; a server that falls this far behind does not sustain it.
KEPT_UP = 0.5
_OCTAVES, _BISECTIONS = 7, 4
GOODPUT_METRICS = (
    Metric(
        name="max_request_rate", unit="requests/s", better="higher",
        formula=f"highest Poisson request rate tried at which {ATTAINMENT:.0%} of the requests met every objective and "
        f"at least {KEPT_UP:.0%} as many a second were answered as arrived; from the rate of 20 or more requests sent "
        "at once it is halved until they do, or doubled while they do, then four bisections on a logarithmic scale, so "
        "the rate found is up to 4.4 % below the highest; failed requests miss their objectives",
    ),
    Metric(
        name="request_goodput", unit="requests/s", better="higher",
        formula="requests that met every objective / wall-clock time, at that rate (vLLM's request_goodput)",
    ),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What one request rate came to.

    Attributes:
        met: Share of the requests that met every objective.
        request_goodput: Of them, a second.
        request_throughput: Requests answered a second.
    """

    met: float
    request_goodput: float
    request_throughput: float


def find_highest_rate(start: float, probe: Callable[[float], Probe], *, alone: Probe) -> dict[str, Any]:
    """Searches from a rate downwards until the objectives are met, or upwards while they are, then between the two.

    Args:
        start: Requests a second; a guess at what can be sustained.
        probe: Measures one request rate.
        alone: What requests sent one at a time came to. Where these miss the objectives every rate does, and the lower
            ones, whose requests take hours to arrive, are spared.

    Returns:
        ``max_request_rate`` and ``request_goodput`` there, both 0 if not even 1/128 of the start meets them, and
        ``tried``: every rate with what it came to, or that of requests one at a time if these missed them.
    """
    tried: list[dict[str, float]] = []
    if alone.met < ATTAINMENT:
        tried.append(_entry(alone.request_throughput, alone))
        return {"max_request_rate": 0.0, "request_goodput": 0.0, "tried": tried}

    def meets(rate: float) -> bool:
        found = probe(rate)
        tried.append(_entry(rate, found))
        return found.met >= ATTAINMENT and found.request_throughput >= KEPT_UP * rate

    low: float | None = None
    high: float | None = None
    rate = start
    for _ in range(_OCTAVES + 1):
        if meets(rate):
            low = rate
            if high:
                break
            rate *= 2
        else:
            high = rate
            if low:
                break
            rate /= 2
    if low is None:
        return {"max_request_rate": 0.0, "request_goodput": 0.0, "tried": tried}
    for _ in range(_BISECTIONS if high else 0):
        assert high is not None
        middle = (low * high) ** 0.5
        low, high = (middle, high) if meets(middle) else (low, middle)
    at_low = next(each for each in tried if each["request_rate"] == low)
    return {"max_request_rate": low, "request_goodput": at_low["request_goodput"], "tried": tried}


def _entry(rate: float, found: Probe) -> dict[str, float]:
    return {"request_rate": rate, **asdict(found)}
