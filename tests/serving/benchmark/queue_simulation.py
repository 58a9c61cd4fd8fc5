"""A queue in front of servers, event by event: what a search for the highest rate is tried on.

Nothing here knows how the search decides. Arrivals are those of vLLM's client: a Poisson process, given that its last
of n arrivals comes after n / rate seconds. Each server takes the next request in the order of arrival.
"""

import heapq
from collections import deque
from dataclasses import dataclass

import numpy as np

ARRIVAL, DEPARTURE = 0, 1
# Seconds of work per request, all with mean 1.
SERVICES = {
    "deterministic": lambda random: 1.0,
    "exponential": lambda random: random.exponential(),
    "uniform": lambda random: random.uniform(0.5, 1.5),
    # One request in ten is long: squared coefficient of variation 2.25, as where answers differ in length.
    "two lengths": lambda random: 5.5 if random.random() < 0.1 else 0.5,
}


@dataclass(frozen=True)
class Served:
    arrived_s: float
    started_s: float
    ended_s: float


def simulate(*, rate, num_requests, num_servers, service, mean_s, seed):
    """Requests that arrive at ``rate``, each served for ``mean_s`` on average by one of the servers."""
    random = np.random.default_rng(seed)
    gaps = random.exponential(size=num_requests)
    arrivals = (np.cumsum(gaps) * (num_requests / rate) / gaps.sum()).tolist()
    events = [(at, ARRIVAL, number) for number, at in enumerate(arrivals)]
    heapq.heapify(events)
    waiting, free, started, ended = deque(), num_servers, {}, {}
    while events:
        now, kind, number = heapq.heappop(events)
        if kind == ARRIVAL:
            waiting.append(number)
        else:
            ended[number] = now
            free += 1
        while free and waiting:
            begun = waiting.popleft()
            free -= 1
            started[begun] = now
            heapq.heappush(events, (now + mean_s * float(SERVICES[service](random)), DEPARTURE, begun))
    return [Served(arrivals[i], started[i], ended[i]) for i in range(num_requests)]
