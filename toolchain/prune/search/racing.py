"""Races between candidates: whoever falls behind on few tokens is not run on all of them.

A causal model's loss on the first tokens of a window does not depend on the rest, so a short run is an exact part of
the long one. After a heat only the better half or quarter goes on (successive halving, arXiv 1502.07943), and of those
only who is not clearly behind the leader. That is judged token by token, which takes away what is hard about a token
for all of them (paired differences, as in racing algorithms since Maron and Moore, "Hoeffding races", NIPS 1993).
"""

import math
from dataclasses import dataclass

import torch

from toolchain.architecture.parts import SubBlock
from toolchain.metrics.token_metrics import TokenMetric
from toolchain.model.layer_walk import LayerWalk
from toolchain.plan.document import Dropped
from toolchain.prune.search.candidates import EnteringStates
from toolchain.prune.search.divided_candidates import divided
from toolchain.ranks.ranks import ALONE, Ranks

# Behind means: the mean difference from the leader is more than this many of its standard errors.
_STANDARD_ERRORS = 2.0
_HIGHEST = 1e150


@dataclass(frozen=True, kw_only=True)
class Heat:
    """A part of the window, and the share of all candidates that may go on after it."""

    window: float
    going_on: float


_HEATS = (Heat(window=1 / 16, going_on=1 / 2), Heat(window=1 / 4, going_on=1 / 6))


@torch.inference_mode()
def run_heats(
    walk: LayerWalk, metric: TokenMetric, candidates: list[int], states: EnteringStates, ranks: Ranks = ALONE
) -> tuple[list[int], dict[int, Dropped]]:
    """Drops candidates that are behind.

    Args:
        walk: Over the model as it is.
        metric: Lower is better.
        candidates: Layers, ascending.
        states: Of the model as it is.
        ranks: Who shares the candidates.

    Returns:
        Those to be measured on the whole window, ascending, and what is known of the others.
    """
    racing, dropped = list(candidates), {}
    for heat in _HEATS:
        num_tokens = int(metric.ids.shape[1] * heat.window)
        if num_tokens < 2 or len(racing) < 2:
            continue
        values = _values(walk, metric, racing, states, num_tokens, ranks)
        order = sorted(racing, key=lambda layer: float(values[layer].mean()))
        leader = values[order[0]]
        places = math.ceil(len(candidates) * heat.going_on)
        for place, layer in enumerate(order):
            if place >= places or _is_behind(values[layer], leader):
                dropped[layer] = Dropped(
                    num_tokens=num_tokens,
                    metric=_written(metric.combine(values[layer])),
                    best=_written(metric.combine(leader)),
                )
        racing = [layer for layer in racing if layer not in dropped]
    return racing, dropped


def _written(metric: float) -> float:
    """JSON has no infinity, and plans are read with bounds; a perplexity of few tokens can be beyond both."""
    return metric if metric < _HIGHEST else _HIGHEST


def _values(
    walk: LayerWalk, metric: TokenMetric, racing: list[int], states: EnteringStates, num_tokens: int, ranks: Ranks
) -> dict[int, torch.Tensor]:
    walk.embed(metric.ids[:, :num_tokens])
    found = divided(
        walk,
        [SubBlock(layer, "attention") for layer in racing],
        states.starting(num_tokens),
        lambda hidden: metric.of_tokens(walk, hidden).double().flatten(),
        ranks,
    )
    return {each.layer: values for each, values in found.items()}


def _is_behind(values: torch.Tensor, leader: torch.Tensor) -> bool:
    behind = values - leader
    return float(behind.mean()) > _STANDARD_ERRORS * float(behind.std()) / len(behind) ** 0.5
