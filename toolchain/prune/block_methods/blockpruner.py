"""BlockPruner (arXiv 2406.10594): attentions and FFNs go one by one, each time the one that hurts perplexity least."""

from collections.abc import Callable, Collection, Iterator

from toolchain.architecture.parts import PARTS, SubBlock
from toolchain.metrics.token_metrics import StateMetric
from toolchain.model.layer_walk import LayerWalk
from toolchain.prune.search.attention import sub_block_scores
from toolchain.prune.search.candidates import embedded_states
from toolchain.ranks.ranks import ALONE, Ranks


def removals(
    walk: LayerWalk,
    metric: StateMetric,
    *,
    removed: Collection[SubBlock] = (),
    ranks: Ranks = ALONE,
    on_candidate: Callable[[], None] = lambda: None,
) -> Iterator[tuple[SubBlock, dict[SubBlock, float]]]:
    """Removes attentions and FFNs greedily (section 3.3), one a ``next()``.

    Block importance is the perplexity without the block (section 3.2). Ties go to the lower layer, and there to the
    attention. Unlike the public code, what lies below a candidate is computed once
    (:mod:`toolchain.prune.search.candidates`).

    Args:
        walk: Over the model without ``removed``. Each removal is made in it before it is yielded.
        metric: Perplexity on calibration text; lower is better.
        removed: What is gone already.
        ranks: Who shares the candidates; all of them make the same removals.
        on_candidate: Called after each candidate, for progress.

    Yields:
        What was removed, and the metric without each candidate, until nothing is left.

    Raises:
        SenteiError: The metric is NaN or Inf, or memory does not suffice for one candidate.
    """
    remaining = [
        each for layer in range(len(walk.layers)) for part in PARTS if (each := SubBlock(layer, part)) not in removed
    ]
    states = embedded_states(walk, metric.ids)
    while remaining:
        scores = sub_block_scores(walk, metric, remaining, states, on_candidate, ranks)
        best = min(remaining, key=scores.__getitem__)
        walk.remove([best])
        states.forget_above(best.layer)
        remaining.remove(best)
        yield best, scores
