"""Stage 2 of 2SSP: removes attention submodules one by one, each time the one whose removal hurts least."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import cast

import torch

from toolchain.architecture.parts import SubBlock
from toolchain.errors import SenteiError
from toolchain.metrics.model_metric import ModelMetric
from toolchain.metrics.question_metrics import CountingMetric
from toolchain.metrics.token_metrics import Metric, PerplexityMetric, StateMetric, TokenMetric, finite, measure
from toolchain.model.layer_walk import LayerWalk
from toolchain.plan.document import Dropped
from toolchain.prune.search.candidates import EnteringStates, embedded_states
from toolchain.prune.search.divided_candidates import divided
from toolchain.prune.search.racing import run_heats
from toolchain.ranks.ranks import ALONE, Ranks


@dataclass(frozen=True, kw_only=True)
class Tried:
    """One step: the attention removed, and what each candidate's removal made of the metric.

    Attributes:
        removed: Layer.
        candidates: Metric by layer.
        dropped: Those that lost a race before they were measured on everything.
        ties: The perplexity, by layer, of those that had the best metric together; empty where one alone had.
    """

    removed: int
    candidates: dict[int, float]
    dropped: dict[int, Dropped] = field(default_factory=dict)
    ties: dict[int, float] = field(default_factory=dict)


def removals(
    walk: LayerWalk,
    metric: Metric,
    *,
    removed: Collection[int] = (),
    protected: Collection[int] = (),
    race: bool = False,
    tie_breaker: PerplexityMetric | None = None,
    ranks: Ranks = ALONE,
    on_candidate: Callable[[], None] = lambda: None,
) -> Iterator[Tried]:
    """Removes attentions greedily (arXiv 2501.17771, section 3.2), one a ``next()``.

    A metric that counts has few values, and candidates share them: of those with the best one, the tie breaker decides,
    and if that is the same too, the lower layer goes.

    Args:
        walk: Over the model with its FFNs already narrowed. Each removal is made in it before it is yielded.
        metric: Decides; the removal that leaves the best value wins.
        removed: Layers that have lost their attention already.
        protected: Layers whose attention is never tried.
        race: Drop candidates that fall behind early (:mod:`toolchain.prune.search.racing`), not measuring all of them.
        tie_breaker: Decides among candidates with the same metric, unless the metric is one like it.
        ranks: Who shares the candidates; all of them make the same removals.
        on_candidate: Called after each candidate, for progress.

    Yields:
        The removal made, with the candidates' metrics, until none is left.

    Raises:
        SenteiError: The metric is NaN or Inf, or the same for every candidate though it does not count questions; or
            memory does not suffice for one candidate.
    """
    remaining = [layer for layer in range(len(walk.layers)) if layer not in removed and layer not in protected]
    states: EnteringStates | None = None
    while remaining:
        dropped: dict[int, Dropped] = {}
        if isinstance(metric, ModelMetric):
            scores = scores_of_models(walk, metric, remaining, on_candidate, ranks)
        else:
            states = states or embedded_states(walk, metric.ids)
            finalists = remaining
            if race:
                finalists, dropped = run_heats(walk, cast(TokenMetric, metric), remaining, states, ranks)
            scores = candidate_scores(walk, metric, finalists, states, on_candidate, ranks)
            for _ in dropped:
                on_candidate()
        tied = _best(metric, scores)
        ties = {}
        if len(tied) > 1 and tie_breaker is not None and not isinstance(metric, PerplexityMetric):
            ties = candidate_scores(walk, tie_breaker, tied, embedded_states(walk, tie_breaker.ids), ranks=ranks)
        best = min(tied, key=lambda layer: (ties.get(layer, 0.0), layer))
        walk.layers.remove_attention(best)
        if states is not None:
            states.forget_above(best)
        remaining.remove(best)
        yield Tried(removed=best, candidates=scores, dropped=dropped, ties=ties)


def _best(metric: Metric, scores: dict[int, float]) -> list[int]:
    """The layers with the best value, ascending."""
    if len(scores) > 1 and len(set(scores.values())) == 1 and not isinstance(metric, CountingMetric):
        raise SenteiError(
            f"The {metric.name} is {next(iter(scores.values())):g} for every candidate: it cannot tell them apart.",
            "Use a finer metric or more text.",
        )
    best = (max if metric.higher_is_better else min)(scores.values())
    return sorted(layer for layer, value in scores.items() if value == best)


def scores_of_models(
    walk: LayerWalk,
    metric: ModelMetric,
    candidates: list[int],
    on_candidate: Callable[[], None] = lambda: None,
    ranks: Ranks = ALONE,
) -> dict[int, float]:
    """The metric of each candidate's removal, by a metric that runs the model itself."""
    scores = torch.zeros(len(candidates), dtype=torch.float64)
    own = ranks.share(len(candidates))
    for number in own:
        scores[number] = measure(walk, metric, without_attention=[candidates[number]])
        on_candidate()
    for _ in range(len(candidates) - len(own)):
        on_candidate()
    # What a rank did not measure is 0.
    return dict(zip(candidates, torch.stack(ranks.gather(scores)).sum(0).tolist(), strict=True))


def num_candidates(num_layers: int, num_removals: int) -> int:
    """How many candidates the search will try in all."""
    return sum(num_layers - step for step in range(num_removals))


def candidate_scores(
    walk: LayerWalk,
    metric: StateMetric,
    candidates: list[int],
    states: EnteringStates,
    on_candidate: Callable[[], None] = lambda: None,
    ranks: Ranks = ALONE,
) -> dict[int, float]:
    """The metric of each attention's removal, in all ranks the same.

    Raises:
        SenteiError: The metric is NaN or Inf, or memory does not suffice for one candidate.
    """
    attentions = [SubBlock(layer, "attention") for layer in candidates]
    scores = sub_block_scores(walk, metric, attentions, states, on_candidate, ranks)
    return {each.layer: value for each, value in scores.items()}


def sub_block_scores(
    walk: LayerWalk,
    metric: StateMetric,
    candidates: list[SubBlock],
    states: EnteringStates,
    on_candidate: Callable[[], None] = lambda: None,
    ranks: Ranks = ALONE,
) -> dict[SubBlock, float]:
    """The metric of each candidate's removal; see :func:`candidate_scores`."""
    num_own = 0

    def score(hidden: torch.Tensor) -> torch.Tensor:
        nonlocal num_own
        value = finite(metric(walk, hidden), metric.name, walk)
        num_own += 1
        on_candidate()
        return torch.tensor([value], dtype=torch.float64)

    scores = divided(walk, candidates, states, score, ranks)
    for _ in range(len(candidates) - num_own):
        on_candidate()
    return {candidate: float(value) for candidate, value in scores.items()}
