"""Two servers whose truth is known, and what a gate would count of them."""

from dataclasses import dataclass

import numpy as np

from serving.gate.counts import BLOCKS, Latency, Side
from serving.gate.document import GateDocument
from serving.server.onnx import metrics

TTFT_BOUNDS, TPOT_BOUNDS = metrics._FIRST_TOKEN_S, metrics._BETWEEN_TOKENS_S


def asked(**changes: object) -> GateDocument:
    settings = {"version": 1, "original": {"job": "original"}, "candidate": {"job": "candidate"}, "looks": 1}
    return GateDocument.model_validate(settings | changes)


@dataclass(frozen=True, kw_only=True)
class Truth:
    """How a server is. Times are log-normal; ``own_swing`` is what only this server has in a block (its queue)."""

    ttft_s: float = 0.12
    tpot_s: float = 0.03
    errors: float = 0.001
    waiting: float = 0.3
    kv_cache: float = 0.5
    own_swing: float = 0.05


def served(rng: np.random.Generator, truth: Truth, per_block: float, shared_swing: np.ndarray) -> Side:
    """What is counted of one server over a window, ``shared_swing`` [blocks] being that of the traffic."""
    blocks = len(shared_swing)
    requests = rng.poisson(per_block, blocks).astype(float)
    swing = np.exp(shared_swing + truth.own_swing * rng.standard_normal(blocks))
    errors = rng.binomial(requests.astype(int), truth.errors).astype(float)
    return Side(
        answers=requests, error_answers=errors, ended=requests,
        unfinished=rng.binomial(requests.astype(int), truth.errors).astype(float),
        ttft=_latency(rng, truth.ttft_s * swing, requests, TTFT_BOUNDS, 0.8),
        tpot=_latency(rng, truth.tpot_s * swing, requests, TPOT_BOUNDS, 0.25),
        waiting=truth.waiting * swing, kv_cache=np.minimum(1, truth.kv_cache * swing ** 0.3),
        servers=1, servers_now=1, restarts=0,
    )  # fmt: skip


def pair(
    rng: np.random.Generator, original: Truth, candidate: Truth, *, requests: tuple[int, int] = (8000, 8000),
    blocks: int = BLOCKS,
) -> tuple[Side, Side]:  # fmt: skip
    swing = 0.2 * rng.standard_normal(blocks)
    return tuple(
        served(rng, truth, number / BLOCKS, swing)
        for truth, number in zip((original, candidate), requests, strict=True)
    )  # type: ignore[return-value]


def cut(side: Side, begin: int) -> Side:
    """A window of a longer record."""
    part = slice(begin, begin + BLOCKS)

    def latency(whole: Latency) -> Latency:
        return Latency(
            sums_s=whole.sums_s[part], counts=whole.counts[part],
            within={bound: each[part] for bound, each in whole.within.items()},
        )  # fmt: skip

    arrays = ("answers", "error_answers", "ended", "unfinished", "waiting", "kv_cache")
    return Side(
        **{name: getattr(side, name)[part] for name in arrays}, ttft=latency(side.ttft), tpot=latency(side.tpot),
        servers=side.servers, servers_now=side.servers_now, restarts=side.restarts,
    )  # fmt: skip


def _latency(
    rng: np.random.Generator, means_s: np.ndarray, requests: np.ndarray, bounds: tuple[float, ...], sigma: float
) -> Latency:
    counts = requests.astype(int)
    block = np.repeat(np.arange(len(counts)), counts)
    took = means_s[block] * np.exp(sigma * rng.standard_normal(counts.sum()) - sigma**2 / 2)
    within = {
        bound: np.bincount(block[took <= bound], minlength=len(counts)).astype(float) for bound in (*bounds, np.inf)
    }
    return Latency(
        sums_s=np.bincount(block, weights=took, minlength=len(counts)), counts=requests.copy(), within=within
    )
