"""Why a measured gain falls short of the expected one: each cause that shows in the numbers, with those numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from serving.forecast.model_facts import ModelFacts
from toolchain.architecture.layout import LayerLayout

TILE = 64
_SHARE, _OVERHEAD, _BUSY_CORES = 0.25, 0.5, 0.9
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
OVERHEAD_ALONE = (
    "Of %(tpot)s ms a token, the roofline accounts for %(least)s ms. The rest is launches, scheduling, the server, or "
    "kernels that do not reach the peak (at batch 1, starting kernels and scheduling weigh most). If the original "
    "spends as much on it, the gain in decode is %(gain)sx."
)
OVERHEAD = (
    "Of %(tpot)s ms a token, the roofline accounts for %(least)s ms. The rest is launches, scheduling, the server, or "
    "kernels that do not reach the peak. If the original spends as much on it, the gain in decode is %(gain)sx."
)
CLIENT = "The load generator used %(cores)s processor cores: it may have been the limit, not the server."
NOT_COMPILED = "The server ran without compiled kernels: %(said)s"
THROTTLED = "A GPU slowed itself down while it was measured (%(reasons)s), which blurs every ratio."
MESSAGES = (
    UNTILEABLE, HEAD, KV_CACHE, *KV_FULL.values(), KV_FULL_BOTH, OVERHEAD_ALONE, OVERHEAD, CLIENT, NOT_COMPILED,
    THROTTLED,
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


_NOTHING = Observations()


def explain(
    facts: Mapping[str, ModelFacts],
    roofline: Mapping[str, Mapping[str, Any]],
    medians: Mapping[str, Mapping[str, float | None]],
    *,
    layout: Sequence[LayerLayout],
    context: int,
    concurrency: int,
    seen: Observations = _NOTHING,
) -> list[dict[str, Any]]:
    """Every cause found; an empty list says that nothing here explains a shortfall.

    Args:
        facts: By side.
        roofline: See :func:`serving.forecast.roofline.roofline`.
        medians: By side, metric to median.
        layout: The pruned model's layers; empty if not known.
        context: Mean tokens of a sequence while it is decoded.
        concurrency: Sequences decoded together.
        seen: While they were measured.

    Returns:
        ``cause`` (a fixed word), ``message`` with its ``values`` put in as ``text``, so that it can be said in another
        language too.
    """
    found = {
        "untileable_widths": _untileable(layout),
        "head": _head(facts["pruned"], context, concurrency),
        "kv_cache": _kv_cache(facts["pruned"], context, concurrency),
        "kv_cache_full": _kv_full(seen.kv_cache_tokens, context, concurrency),
        "overhead": _overhead(roofline["decode"], medians, concurrency),
        "client": _client(seen.client_cpu_cores),
        "throttled": (THROTTLED, {"reasons": ", ".join(seen.throttled)}) if seen.throttled else None,
        "not_compiled": (NOT_COMPILED, {"said": seen.not_compiled}) if seen.not_compiled else None,
    }
    return [
        {"cause": cause, "message": told[0], "values": told[1], "text": told[0] % told[1]}
        for cause, told in found.items()
        if told
    ]


def _untileable(layout: Sequence[LayerLayout]) -> Told | None:
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
    cached = concurrency * facts.kv_bytes_per_token * context
    share = head * facts.decode_weight_bytes / (facts.decode_weight_bytes + cached)
    return (HEAD, {"share": f"{100 * share:.0f}"}) if share >= _SHARE else None


def _kv_cache(facts: ModelFacts, context: int, concurrency: int) -> Told | None:
    cached = concurrency * facts.kv_bytes_per_token * context
    share = cached / (cached + facts.decode_weight_bytes)
    if share < _SHARE:
        return None
    return KV_CACHE, {"share": f"{100 * share:.0f}", "concurrency": concurrency, "context": context}


def _kv_full(tokens: Mapping[str, int | None], context: int, concurrency: int) -> Told | None:
    short = [side for side, held in tokens.items() if held is not None and held < concurrency * context]
    if not short:
        return None
    message = KV_FULL_BOTH if len(short) == 2 else KV_FULL[short[0]]
    return message, {"concurrency": concurrency, "context": context}


def _overhead(
    decode: Mapping[str, Any], medians: Mapping[str, Mapping[str, float | None]], concurrency: int
) -> Told | None:
    tpot, least = medians["pruned"]["mean_tpot_ms"], decode["pruned"]["at_least_ms"]
    if not tpot or (rest := tpot - least) < _OVERHEAD * tpot:
        return None
    without_gain = (decode["original"]["at_least_ms"] + rest) / (least + rest)
    message = OVERHEAD_ALONE if concurrency == 1 else OVERHEAD
    return message, {"tpot": f"{tpot:.3g}", "least": f"{least:.3g}", "gain": f"{without_gain:.2f}"}


def _client(cores: float | None) -> Told | None:
    return (CLIENT, {"cores": f"{cores:.1f}"}) if cores is not None and cores >= _BUSY_CORES else None
