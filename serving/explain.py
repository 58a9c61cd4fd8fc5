"""Why a measured gain falls short of the expected one: each cause that shows in the numbers, with those numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

from serving.model_facts import ModelFacts
from toolchain.layout import LayerLayout

TILE = 64
_SHARE, _OVERHEAD, _BUSY_CORES = 0.25, 0.5, 0.9
_SHOWN_LAYERS = 6


def explain(
    facts: Mapping[str, ModelFacts],
    roofline: Mapping[str, Mapping[str, Any]],
    medians: Mapping[str, Mapping[str, float | None]],
    *,
    layout: Sequence[LayerLayout],
    context: int,
    concurrency: int,
    kv_cache_tokens: Mapping[str, int | None],
    client_cpu_cores: float | None,
    not_compiled: str | None,
) -> list[dict[str, str]]:
    """Every cause found; an empty list says that nothing here explains a shortfall.

    Args:
        facts: By side.
        roofline: See :func:`serving.roofline.roofline`.
        medians: By side, metric to median.
        layout: The pruned model's layers; empty if not known.
        context: Mean tokens of a sequence while it is decoded.
        concurrency: Sequences decoded together.
        kv_cache_tokens: By side, tokens that the server's cache holds.
        client_cpu_cores: Processor seconds a second of the load generator.
        not_compiled: The line of the server's log that says so.

    Returns:
        ``cause`` (a fixed word) and ``text`` each.
    """
    texts = {
        "untileable_widths": _untileable(layout),
        "head": _head(facts["pruned"], context, concurrency),
        "kv_cache": _kv_cache(facts["pruned"], context, concurrency),
        "kv_cache_full": _kv_full(kv_cache_tokens, context, concurrency),
        "overhead": _overhead(roofline["decode"], medians, concurrency),
        "client": _client(client_cpu_cores),
        "not_compiled": not_compiled and f"The server ran without compiled kernels: {not_compiled}",
    }
    return [{"cause": cause, "text": text} for cause, text in texts.items() if text]


def _untileable(layout: Sequence[LayerLayout]) -> str | None:
    odd = {i: layer.intermediate_size for i, layer in enumerate(layout) if layer.intermediate_size % TILE}
    if not odd:
        return None
    named = [f"layer {i}: {width} (would tile: {_tiled(width)})" for i, width in list(odd.items())[:_SHOWN_LAYERS]]
    more = f", and {len(odd) - _SHOWN_LAYERS} more" if len(odd) > _SHOWN_LAYERS else ""
    listed = ", ".join(named)
    return f"FFN widths of {len(odd)} layers are no multiples of {TILE}, which matrix units want: {listed}{more}."


def _tiled(width: int) -> int:
    return max(TILE, round(width / TILE) * TILE)


def _head(facts: ModelFacts, context: int, concurrency: int) -> str | None:
    head = facts.head_parameters / (facts.head_parameters + facts.block_matrix_parameters)
    cached = concurrency * facts.kv_bytes_per_token * context
    share = head * facts.decode_weight_bytes / (facts.decode_weight_bytes + cached)
    if share < _SHARE:
        return None
    return (
        f"The output head is {share:.0%} of what the pruned model reads in a decode step; pruning does not change it."
    )


def _kv_cache(facts: ModelFacts, context: int, concurrency: int) -> str | None:
    cached = concurrency * facts.kv_bytes_per_token * context
    share = cached / (cached + facts.decode_weight_bytes)
    if share < _SHARE:
        return None
    return (
        f"The KV cache is {share:.0%} of what the pruned model reads in a decode step ({concurrency} sequences of "
        f"{context} tokens): narrower FFNs do not change it, attentions removed do."
    )


def _kv_full(tokens: Mapping[str, int | None], context: int, concurrency: int) -> str | None:
    short = [side for side, held in tokens.items() if held is not None and held < concurrency * context]
    if not short:
        return None
    return (
        f"The KV cache of the {' and the '.join(short)} model's server does not hold {concurrency} sequences of "
        f"{context} tokens: requests wait for each other."
    )


def _overhead(
    decode: Mapping[str, Any], medians: Mapping[str, Mapping[str, float | None]], concurrency: int
) -> str | None:
    tpot, least = medians["pruned"]["mean_tpot_ms"], decode["pruned"]["at_least_ms"]
    if not tpot or (rest := tpot - least) < _OVERHEAD * tpot:
        return None
    without_gain = (decode["original"]["at_least_ms"] + rest) / (least + rest)
    batch = "at batch 1, starting kernels and scheduling weigh most" if concurrency == 1 else "kernels below their peak"
    return (
        f"Of {tpot:.3g} ms a token, the roofline accounts for {least:.3g} ms. The rest is launches, scheduling, the "
        f"server, or kernels that do not reach the peak ({batch}). If the original spends as much on it, the gain in "
        f"decode is {without_gain:.2f}x."
    )


def _client(cores: float | None) -> str | None:
    if cores is None or cores < _BUSY_CORES:
        return None
    return f"The load generator used {cores:.1f} processor cores: it may have been the limit, not the server."
