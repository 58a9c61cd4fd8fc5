"""One step of the search in several ranks: each runs a range of the candidates, and all learn what came out.

A candidate at layer *i* goes through all layers from *i* on, or through those from where it is known since the step
before; then through the head. The current model itself has to be walked up to the last candidate that branches off from
it, in each rank that has such a candidate. So every rank takes a range of neighbours, and the ranges cost the same.
Where a range has grown since the step before, states are handed over: that takes far less than a layer.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise

import torch

from toolchain.architecture.parts import SubBlock
from toolchain.model.layer_walk import LayerWalk
from toolchain.model.loading import decoder_layers
from toolchain.prune.search.candidates import EnteringStates, without_each
from toolchain.ranks.ranks import Ranks

_CLOSE_ENOUGH = 1e-3


def divided(
    walk: LayerWalk,
    candidates: list[SubBlock],
    states: EnteringStates,
    look: Callable[[torch.Tensor], torch.Tensor],
    ranks: Ranks,
) -> dict[SubBlock, torch.Tensor]:
    """What ``look`` makes of the last hidden state without each candidate, in all ranks the same.

    Args:
        walk: Over the model as it is.
        candidates: By layer, ascending.
        states: Of the model as it is; each rank has its own.
        look: Makes float64 numbers, of one shape for all candidates.
        ranks: Who shares the work.

    Raises:
        SenteiError: Memory does not suffice for one candidate.
    """
    if not ranks.several:
        return without_each(walk, candidates, states, look)
    places = torch.stack(ranks.gather(torch.tensor(states.places(candidates))))
    below = _costs_below(walk, states[0].shape[1])
    known = places.max(0).values.tolist()
    costs = [below[-1] - below[place or each.layer] for each, place in zip(candidates, known, strict=True)]
    branches = [None if place else below[each.layer] for each, place in zip(candidates, known, strict=True)]
    ends = even_ranges(costs, branches, ranks.size)
    _hand_over(walk, candidates, places, ends, states, ranks)
    ends = [0, *ends]
    found = without_each(walk, candidates[ends[ranks.rank] : ends[ranks.rank + 1]], states, look)
    own = torch.stack([each.flatten().cpu() for each in found.values()]) if found else None
    rows = ranks.gather_rows(own, [end - start for start, end in pairwise(ends)])
    return dict(zip(candidates, torch.cat(rows), strict=True))


def _costs_below(walk: LayerWalk, seq_len: int) -> list[float]:
    """What a token has cost when it enters each layer, and last when it has left the head: multiplications.

    Each parameter is one. Attention adds its products with the tokens before, half of the window on average, twice.
    """
    family, costs = walk.family, [0.0]
    for layer in decoder_layers(walk.model, family):
        cost = float(sum(each.numel() for each in layer.parameters()))
        with suppress(AttributeError):  # its attention was removed
            cost += seq_len * layer.get_submodule(family.attention_output).get_parameter("weight").shape[1]
        costs.append(costs[-1] + cost)
    costs[-1] += walk.model.get_output_embeddings().weight.numel()
    return costs


def even_ranges(costs: Sequence[float], branches: Sequence[float | None], num_ranks: int) -> list[int]:
    """Ranges of neighbours whose costs are as even as can be.

    Args:
        costs: Of each candidate.
        branches: What the current model costs up to the layer in which each branches off, ascending; ``None`` for those
            that go on from a state of their own.
        num_ranks: How many ranges.

    Returns:
        Where each range ends, and the next begins; the last ones are empty if there are fewer candidates than ranks.
    """
    # Every rank knows the current model up to the layer that was changed last, where the first branches off.
    base = min((place for place in branches if place is not None), default=0.0)

    def ends_within(most: float) -> list[int]:
        ends: list[int] = []
        own = walked = 0.0
        for number, (cost, place) in enumerate(zip(costs, branches, strict=True)):
            up_to = walked if place is None else place - base
            if own and own + cost + up_to > most:
                ends.append(number)
                own = 0.0
                up_to = 0.0 if place is None else place - base
            own, walked = own + cost, up_to
        return [*ends, len(costs)]

    low, high = 0.0, sum(costs) + max((place for place in branches if place is not None), default=0.0)
    while high - low > _CLOSE_ENOUGH * high:
        middle = (low + high) / 2
        low, high = (low, middle) if len(ends_within(middle)) <= num_ranks else (middle, high)
    ends = ends_within(high)
    return [*ends, *[len(costs)] * (num_ranks - len(ends))]


def _hand_over(
    walk: LayerWalk,
    candidates: list[SubBlock],
    places: torch.Tensor,
    ends: Sequence[int],
    states: EnteringStates,
    ranks: Ranks,
) -> None:
    """Gives each rank the furthest states of its candidates, where it does not have them itself."""
    moves = []
    for number, candidate in enumerate(candidates):
        to = next(rank for rank, end in enumerate(ends) if number < end)
        furthest = int(places[:, number].max())
        if places[to, number] < furthest:
            source = int((places[:, number] == furthest).nonzero()[0])
            moves.append((source, to, candidate, furthest))
    if not moves:
        return
    sent: dict[int, list[torch.Tensor]] = {}
    for source, to, candidate, _ in moves:
        if source == ranks.rank:
            found = states.of_candidate(candidate)
            assert found is not None
            sent.setdefault(to, []).append(found[1])
    incoming = sorted((move for move in moves if move[1] == ranks.rank), key=lambda move: move[0])
    counts = [sum(source == rank for source, *_ in incoming) for rank in range(ranks.size)]
    like, layers = states[0], decoder_layers(walk.model, walk.family)
    for (_, _, candidate, place), content in zip(incoming, ranks.exchange(sent, counts), strict=True):
        state = content.view(like.dtype).view(like.shape)
        states.keep_of_candidate(candidate, place, state.to(walk.device_of(layers[place])))
