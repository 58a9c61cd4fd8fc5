"""What keeps a gain small, and what stood in the way of measuring it: each with the numbers in which it shows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from serving.forecast.model_facts import ModelFacts
from toolchain.architecture.layout import LayerLayout

TILE = 64
_SHARE, _BUSY_CORES = 0.25, 0.9
_SHOWN_LAYERS = 6
UNTILEABLE = (
    "FFN widths of %(count)s layers are no multiples of %(tile)s, which matrix units want (layer: width → nearest that "
    "would tile): %(listed)s."
)
HEAD = "The output head is %(share)s %% of what the pruned model reads in a decode step; pruning does not change it."
KV_CACHE = (
    "The KV cache is %(share)s %% of what the pruned model reads in a decode step (%(concurrency)s at a time, "
    "%(context)s tokens each): narrower FFNs do not change it, attentions removed do."
)
KV_FULL = {
    side: f"The KV cache of the {side} model's server does not hold %(concurrency)s sequences of %(context)s tokens: "
    "requests wait for each other."
    for side in ("original", "pruned")
}
KV_FULL_BOTH = (
    "The KV caches of both servers do not hold %(concurrency)s sequences of %(context)s tokens: requests wait for each "
    "other."
)
CLIENT = "The load generator used %(cores)s processor cores: it may have been the limit, not the server."
NOT_COMPILED = "The server ran without compiled kernels: %(said)s"
THROTTLED = "A GPU slowed itself down while it was measured (%(reasons)s), which blurs every ratio."
# In files from before shares were measured: there this stood for every gap, and only where it was half of the time.
FORMER_MESSAGES = (
    "Of %(tpot)s ms a token, the roofline accounts for %(least)s ms. The rest is launches, scheduling, the server, or "
    "kernels that do not reach the peak (at batch 1, starting kernels and scheduling weigh most). If the original "
    "spends as much on it, the gain in decode is %(gain)sx.",
    "Of %(tpot)s ms a token, the roofline accounts for %(least)s ms. The rest is launches, scheduling, the server, or "
    "kernels that do not reach the peak. If the original spends as much on it, the gain in decode is %(gain)sx.",
)
MESSAGES = (
    UNTILEABLE, HEAD, KV_CACHE, *KV_FULL.values(), KV_FULL_BOTH, CLIENT, NOT_COMPILED, THROTTLED, *FORMER_MESSAGES,
)  # fmt: skip


Told = tuple[str, dict[str, Any]]  # a message, and the values that go into it


@dataclass(frozen=True, kw_only=True)
class Observations:
    """What was seen while both models were measured; nothing by default, as where nothing ran.

    Attributes:
        kv_cache_tokens: By side, tokens that the server's cache holds.
        client_cpu_cores: Processor seconds a second of the load generator.
        not_compiled: The line of the server's log that says so.
        throttled: What slowed a GPU down; see :mod:`serving.benchmark.gpu_watch`.
    """

    kv_cache_tokens: Mapping[str, int | None] = field(default_factory=dict)
    client_cpu_cores: float | None = None
    not_compiled: str | None = None
    throttled: Sequence[str] = ()


def limits_of_plan(
    pruned: ModelFacts, *, layout: Sequence[LayerLayout], context: int, concurrency: int
) -> list[dict[str, Any]]:
    """What will keep a gain down, by shapes alone.

    Args:
        pruned: The pruned model's facts.
        layout: Its layers; empty if not known.
        context: Mean tokens of a sequence while it is decoded.
        concurrency: Sequences decoded together.

    Returns:
        ``cause`` (a fixed word), ``message`` with its ``values`` put in as ``text``, so that it can be said in another
        language too.
    """
    return told({"untileable_widths": untileable(layout), **_shares_read(pruned, context, concurrency)})


def limits_of_measurement(
    pruned: ModelFacts, seen: Observations, *, context: int, concurrency: int
) -> list[dict[str, Any]]:
    """What keeps the expectation itself down, and what blurs the measurement, whichever way it came out.

    Args:
        pruned: The pruned model's facts.
        seen: While both models were measured.
        context: Mean tokens of a sequence while it is decoded.
        concurrency: Sequences decoded together.

    Returns:
        See :func:`limits_of_plan`.
    """
    return told({
        **_shares_read(pruned, context, concurrency),
        "client": _client(seen.client_cpu_cores),
        "throttled": (THROTTLED, {"reasons": ", ".join(seen.throttled)}) if seen.throttled else None,
    })  # fmt: skip


def told(found: Mapping[str, Told | None]) -> list[dict[str, Any]]:
    """Causes as JSON has them, without those that were not found."""
    return [
        {"cause": cause, "message": each[0], "values": each[1], "text": each[0] % each[1]}
        for cause, each in found.items()
        if each
    ]


def _shares_read(pruned: ModelFacts, context: int, concurrency: int) -> dict[str, Told | None]:
    return {"head": _head(pruned, context, concurrency), "kv_cache": _kv_cache(pruned, context, concurrency)}


def untileable(layout: Sequence[LayerLayout]) -> Told | None:
    """The widths that matrix units do not like."""
    odd = {i: layer.intermediate_size for i, layer in enumerate(layout) if layer.intermediate_size % TILE}
    if not odd:
        return None
    named = [f"{i}: {width} → {_tiled(width)}" for i, width in list(odd.items())[:_SHOWN_LAYERS]]
    more = ", …" if len(odd) > _SHOWN_LAYERS else ""
    return UNTILEABLE, {"count": len(odd), "tile": TILE, "listed": ", ".join(named) + more}


def _tiled(width: int) -> int:
    return max(TILE, round(width / TILE) * TILE)


def _head(facts: ModelFacts, context: int, concurrency: int) -> Told | None:
    head = facts.head_parameters / (facts.head_parameters + facts.block_matrix_parameters)
    cached = concurrency * facts.kv_bytes(context)
    share = head * facts.decode_weight_bytes / (facts.decode_weight_bytes + cached)
    return (HEAD, {"share": f"{100 * share:.0f}"}) if share >= _SHARE else None


def _kv_cache(facts: ModelFacts, context: int, concurrency: int) -> Told | None:
    cached = concurrency * facts.kv_bytes(context)
    share = cached / (cached + facts.decode_weight_bytes)
    if share < _SHARE:
        return None
    return KV_CACHE, {"share": f"{100 * share:.0f}", "concurrency": concurrency, "context": context}


def kv_full(tokens: Mapping[str, int | None], context: int, concurrency: int) -> Told | None:
    """Whose server cannot hold all sequences at once."""
    short = [side for side, held in tokens.items() if held is not None and held < concurrency * context]
    if not short:
        return None
    message = KV_FULL_BOTH if len(short) == 2 else KV_FULL[short[0]]
    return message, {"concurrency": concurrency, "context": context}


def _client(cores: float | None) -> Told | None:
    return (CLIENT, {"cores": f"{cores:.1f}"}) if cores is not None and cores >= _BUSY_CORES else None
