"""What each choice of widths and of a number of attentions is predicted to do to the loss, before any is made.

FFNs: the gradients' slopes of the neurons that a layer loses, summed over the layers, say which layers give neurons;
how much damage a sum means is measured, at a few widths. Attentions: measured, with those that hurt least alone gone,
by the first tokens of each window.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from toolchain.metrics.token_metrics import PerplexityMetric, measure
from toolchain.plan.plan import PruningPlan, top_neurons
from toolchain.prune.budget.least_damage import Damages
from toolchain.prune.budget.ranked_widths import ranked_widths
from toolchain.prune.search.attention import candidate_scores
from toolchain.prune.search.candidates import embedded_states
from toolchain.prune.search.two_removals import FEW_TOKENS, on_text
from toolchain.prune.search.two_stage import Search

# Shares of all neurons without which the damage is measured: to about where models stop being of use.
_MEASURED_SHARES = (1 / 8, 1 / 4, 1 / 2)


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """Damages, and the attentions that they are without: the least damaging ones first."""

    damages: Damages
    order: tuple[int, ...]


def predict_damages(search: Search, plan: PruningPlan, widths: Sequence[int], most_removals: int) -> Predicted:
    """Predicts the damage of every choice that a target may lead to.

    Args:
        search: Over the unpruned model, which it leaves as it was.
        plan: Removes nothing yet; says what is protected.
        widths: That a layer may have, ascending; the last is the full one.
        most_removals: Attentions that may go.

    Raises:
        SenteiError: A metric is NaN or Inf, or memory does not suffice for one candidate.
    """
    protected = plan.document.protected
    scores = _scores(search.sensitivity.slope, widths)
    for layer in protected.ffn:
        scores[layer, :-1] = np.inf
    metric = on_text(search.metric, search.windows)
    metric.prepare(search.walk)
    free = [layer for layer in range(len(scores)) if layer not in protected.attention]
    with search.progress("Damage of attentions", len(free) + most_removals) as advance:
        few = PerplexityMetric(metric.ids[:, :FEW_TOKENS])
        alone = candidate_scores(search.walk, few, free, embedded_states(search.walk, few.ids), advance)
        order = sorted(free, key=alone.__getitem__)[:most_removals]
        original = measure(search.walk, metric)

        def nats(value: float) -> float:
            return math.log(value / original) if isinstance(metric, PerplexityMetric) else value - original

        attentions = [0.0]
        for number in range(1, len(order) + 1):
            attentions.append(nats(measure(search.walk, metric, without_attention=order[:number])))
            advance()
    curve = [(0.0, 0.0)]
    with search.progress("Damage of FFNs", len(_MEASURED_SHARES)) as advance:
        for share in _MEASURED_SHARES:
            narrowed = _narrowed(search, plan, widths, share)
            places = [list(widths).index(width) for width in narrowed]
            kept = [top_neurons(*each) for each in zip(plan.importance, narrowed, strict=True)]
            with search.walk.only_neurons(kept):
                curve.append((float(scores[np.arange(len(places)), places].sum()), nats(measure(search.walk, metric))))
            advance()
    return Predicted(
        damages=Damages(widths=tuple(widths), scores=scores, curve=tuple(sorted(curve)), attentions=tuple(attentions)),
        order=tuple(order),
    )


def _scores(slope: Sequence[NDArray[np.float32]], widths: Sequence[int]) -> NDArray[np.float64]:
    """Summed slopes of the neurons that each layer loses at each width: the least of them."""
    lost = [len(slope[0]) - width for width in widths]
    sums = (np.concatenate([[0.0], np.cumsum(np.sort(each.astype(np.float64)))]) for each in slope)
    return np.array([each[lost] for each in sums])


def _narrowed(search: Search, plan: PruningPlan, widths: Sequence[int], share: float) -> tuple[int, ...]:
    """Ranked widths without about this share of the neurons, out of those that a layer may have."""
    full, protected = widths[-1], frozenset(plan.document.protected.ffn)
    near = min(widths, key=lambda width: abs(width - (1 - share) * full))
    even = [full if layer in protected else near for layer in range(len(plan.importance))]
    ranked = ranked_widths(search.sensitivity.slope, even, plan.document.align, protected)
    return tuple(min(widths, key=lambda width: abs(width - each)) for each in ranked)
