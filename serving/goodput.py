"""The highest request rate at which a server still meets its objectives: what decides how many GPUs to buy."""

from collections.abc import Callable
from typing import Any

from serving.statistics import Metric

# DistServe (arXiv 2401.09670) defines goodput as the rate at which this share of requests meets every objective.
ATTAINMENT = 0.9
_HALVINGS, _BISECTIONS = 7, 4
GOODPUT_METRICS = (
    Metric(
        name="max_request_rate", unit="requests/s", better="higher",
        formula=f"highest Poisson request rate tried at which {ATTAINMENT:.0%} of the requests met every objective; "
        "the capacity (all requests at once) is halved until they do, then four bisections on a logarithmic scale, so "
        "the rate found is up to 4.4 % below the highest; failed requests miss their objectives",
    ),
    Metric(
        name="request_goodput", unit="requests/s", better="higher",
        formula="requests that met every objective / wall-clock time, at that rate (vLLM's request_goodput)",
    ),
)  # fmt: skip


def find_highest_rate(capacity: float, probe: Callable[[float], tuple[float, float]]) -> dict[str, Any]:
    """Searches downwards from the capacity.

    Args:
        capacity: Requests a second with all requests sent at once: no higher rate can be sustained.
        probe: Request rate to the share of requests that met every objective, and ``request_goodput``.

    Returns:
        ``max_request_rate`` and ``request_goodput`` there, both 0 if not even 1/128 of the capacity meets them, and
        ``tried``: every rate with the share that met them.
    """
    tried: list[dict[str, float]] = []

    def meets(rate: float) -> bool:
        share, goodput = probe(rate)
        tried.append({"request_rate": rate, "met": share, "request_goodput": goodput})
        return share >= ATTAINMENT

    high: float | None = None
    low = capacity
    for _ in range(_HALVINGS + 1):
        if meets(low):
            break
        high, low = low, low / 2
    else:
        return {"max_request_rate": 0.0, "request_goodput": 0.0, "tried": tried}
    for _ in range(_BISECTIONS if high else 0):
        assert high is not None
        middle = (low * high) ** 0.5
        low, high = (middle, high) if meets(middle) else (low, middle)
    at_low = next(each for each in tried if each["request_rate"] == low)
    return {"max_request_rate": low, "request_goodput": at_low["request_goodput"], "tried": tried}
