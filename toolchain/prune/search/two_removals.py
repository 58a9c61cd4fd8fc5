"""What removing two attentions would cost and gain, where a plan removes none: KV cache gains nothing then.

With grouped-query attention an attention is small beside an FFN, and the published formula removes none of them at most
sparsities. What two would cost is measured on the search's own windows, at the plan's sparsity: few tokens say which
ones are worth a closer look, more tokens which of those goes, and which of the others after it; the damage of both is
measured on all. On the way from the full widths to the plan's, FFNs stop where the two attentions make up for what they
keep.
"""

import math
from collections.abc import Sequence

import torch

from toolchain.architecture.layout import positive
from toolchain.checkpoint.directory import Checkpoint
from toolchain.metrics.token_metrics import KLDivergence, Metric, PerplexityMetric, measure
from toolchain.plan.plan import PruningPlan, top_neurons
from toolchain.plan.summary_document import TwoRemovalsSummary
from toolchain.prune.budget.allocation import BlockParameters, ladder
from toolchain.prune.search.attention import candidate_scores
from toolchain.prune.search.candidates import embedded_states
from toolchain.prune.search.two_stage import Search

_NUM_REMOVALS = 2
# So many tokens of each window say which two do least damage. Fewer say it wrongly: docs/decisions/search.md.
FEW_TOKENS = 256
# So many say which attentions are looked at closer: this share of all, those that do least damage alone.
_NUM_TOKENS_AT_FIRST = 64
_SHARE_LOOKED_AT_CLOSER = 1 / 3


def asks_for_two_removals(plan: PruningPlan) -> bool:
    """Whether the search removes no attention though nobody asked for that, and there are two that it may remove."""
    document = plan.document
    free = document.base_model.num_hidden_layers - len(document.protected.attention)
    return (
        not document.block_steps
        and document.target is None
        and bool(document.target_intermediate_size)
        and document.target_attention_removals == 0
        and document.attention_removals is None
        and document.stopped_because is None
        and free >= _NUM_REMOVALS
    )


@torch.inference_mode()
def two_removals(search: Search, checkpoint: Checkpoint, plan: PruningPlan) -> TwoRemovalsSummary:
    """Measures it.

    Args:
        search: Over the model, whatever was taken out of it; afterwards with other widths.
        checkpoint: The unpruned model.
        plan: What the search ended with.

    Raises:
        SenteiError: A metric is NaN or Inf, or memory does not suffice for one candidate.
    """
    walk, metric = search.walk, on_text(search.metric, search.windows)
    walk.layers.restore()
    widths = widths_with_removals(search.sizes, plan)
    with walk.only_neurons([top_neurons(*each) for each in zip(plan.importance, widths, strict=True)]):
        layers = _least_damaging(search, metric.ids[:, :FEW_TOKENS], plan.document.protected.attention)
        with_removals = measure(walk, metric, without_attention=layers[1:])
    walk.layers.restore()
    without = plan.document.metric_at_end
    if metric is not search.metric:
        with walk.only_neurons(plan.kept_neurons):
            without = measure(walk, metric)
    wider = (sum(widths) - sum(layer.intermediate_size for layer in plan.layout)) * search.sizes.neuron
    attentions = _NUM_REMOVALS * (search.sizes.attention + search.sizes.attention_norm)
    read, kv = _decode_parameters(checkpoint, plan), _kv_values_per_token(checkpoint)
    layers_left, size = len(plan.layout) - _NUM_REMOVALS, checkpoint.dtype.itemsize
    return TwoRemovalsSummary(
        layers=sorted(layers),
        metric=metric.name,
        metric_without_removals=without,
        metric_with_removals=with_removals,
        decode_weight_bytes_without_removals=read * size,
        decode_weight_bytes_with_removals=(read + wider - attentions) * size,
        kv_bytes_per_token_without_removals=kv * len(plan.layout) * size,
        kv_bytes_per_token_with_removals=kv * layers_left * size,
    )


def on_text(metric: Metric, windows: torch.Tensor) -> PerplexityMetric | KLDivergence:
    """The search's metric if it is of tokens; perplexity where it takes questions or a function of a person."""
    if isinstance(metric, PerplexityMetric | KLDivergence):
        return metric
    return PerplexityMetric(windows[:1])


def widths_with_removals(sizes: BlockParameters, plan: PruningPlan) -> tuple[int, ...]:
    """The plan's widths, on the way back to the full ones by what the attentions weigh, to a unit of one layer."""
    document, full = plan.document, sizes.intermediate_size
    target = document.target_intermediate_size
    enough = sum(target) + _NUM_REMOVALS * (sizes.attention + sizes.attention_norm) // sizes.neuron
    finest = max(max(full - width for width in target) // document.align, 1)
    rung = ladder(full, target, document.align)
    widths = list(rung(0, finest))
    for step in range(1, finest + 1):
        for layer, width in enumerate(rung(step, finest)):
            if sum(widths) <= enough:
                return tuple(widths)
            widths[layer] = width
    return tuple(widths)


def _least_damaging(search: Search, ids: torch.Tensor, protected: Sequence[int]) -> list[int]:
    """The attention that does least damage, and the one that does least after it; the first is removed."""
    walk, few = search.walk, ids[:, :_NUM_TOKENS_AT_FIRST]
    layers = [layer for layer in range(len(walk.layers)) if layer not in protected]
    num_closer = max(_NUM_REMOVALS, math.ceil(len(layers) * _SHARE_LOOKED_AT_CLOSER))
    with search.progress("If attentions went", len(layers) + 2 * num_closer - 1) as advance:

        def damages(candidates: Sequence[int], tokens: torch.Tensor) -> dict[int, float]:
            states = embedded_states(walk, tokens)
            return candidate_scores(walk, PerplexityMetric(tokens), sorted(candidates), states, advance)

        alone = damages(layers, few)
        closer = damages(sorted(layers, key=alone.__getitem__)[:num_closer], ids)
        first, *others = sorted(closer, key=closer.__getitem__)
        walk.layers.remove_attention(first)
        after = damages(others, ids)
    return [first, min(after, key=after.__getitem__)]


def _decode_parameters(checkpoint: Checkpoint, plan: PruningPlan) -> int:
    """Parameters that are read for each generated token: all but a table of embeddings of which one row is."""
    document = plan.document
    tied = checkpoint.config.get("tie_word_embeddings", False) or "lm_head.weight" not in checkpoint.tensors
    embeddings = 0 if tied else positive(checkpoint.config, "vocab_size") * positive(checkpoint.config, "hidden_size")
    outside = checkpoint.num_parameters - document.base_model.num_block_parameters
    return outside - embeddings + plan.steps[-1].num_block_parameters


def _kv_values_per_token(checkpoint: Checkpoint) -> int:
    """Of one layer: keys and values of one token."""
    heads = positive(checkpoint.config, "num_attention_heads")
    head_dim = checkpoint.config.get("head_dim") or positive(checkpoint.config, "hidden_size") // heads
    return int(2 * (checkpoint.config.get("num_key_value_heads") or heads) * head_dim)
