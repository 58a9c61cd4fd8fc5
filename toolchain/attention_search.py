"""Stage 2 of 2SSP: removes attention submodules one by one, each time the one whose removal hurts least."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import torch

from toolchain.errors import SenteiError
from toolchain.layer_walk import LayerWalk
from toolchain.memory import available_bytes, is_out_of_memory
from toolchain.metrics import Metric, finite

# The rest is for what a layer and the head need while they run.
_SHARE_FOR_STATES = 0.4


@dataclass(frozen=True, kw_only=True)
class Tried:
    """One step: the attention removed, and what each candidate's removal made of the metric.

    Attributes:
        removed: Layer.
        candidates: Metric by layer.
    """

    removed: int
    candidates: dict[int, float]


def removals(
    walk: LayerWalk,
    metric: Metric,
    *,
    removed: Collection[int] = (),
    protected: Collection[int] = (),
    on_candidate: Callable[[], None] = lambda: None,
) -> Iterator[Tried]:
    """Removes attentions greedily (arXiv 2501.17771, section 3.2), one a ``next()``; ties go to the lower layer.

    Removing the attention of layer *i* changes nothing below it. So a candidate joins the walk at its layer, and from
    there all candidates of a step go up together: each layer is visited once a step, and its weights are read once.

    Args:
        walk: Over the model with its FFNs already narrowed. Each removal is made in it before it is yielded.
        metric: Decides; the removal that leaves the best value wins.
        removed: Layers that have lost their attention already.
        protected: Layers whose attention is never tried.
        on_candidate: Called after each candidate, for progress.

    Yields:
        The removal made, with every candidate's metric, until none is left.

    Raises:
        SenteiError: The metric is NaN or Inf or the same for every candidate, or memory does not suffice for one.
    """
    remaining = [layer for layer in range(len(walk.layers)) if layer not in removed and layer not in protected]
    with torch.inference_mode():
        states = _EnteringStates(walk.embed(metric.ids))
    while remaining:
        with torch.inference_mode():
            scores = _score_all(walk, metric, remaining, states, on_candidate)
        if len(scores) > 1 and len(set(scores.values())) == 1:
            raise SenteiError(
                f"The {metric.name} is {next(iter(scores.values())):g} for every candidate: it cannot tell them apart.",
                "Use a finer metric or more text.",
            )
        sign = -1 if metric.higher_is_better else 1
        best = min(scores, key=lambda layer: (sign * scores[layer], layer))
        walk.layers.remove_attention(best)
        states.forget_above(best)
        remaining.remove(best)
        yield Tried(removed=best, candidates=scores)


def num_candidates(num_layers: int, num_removals: int) -> int:
    """How many candidates the search will try in all."""
    return sum(num_layers - step for step in range(num_removals))


class _EnteringStates:
    """The current model's hidden states where they are known: what enters layer 0, and as many others as fit."""

    def __init__(self, embedded: torch.Tensor) -> None:
        self._states = {0: embedded}
        self.nbytes = embedded.nbytes

    def nearest(self, layer: int) -> int:
        """The highest layer, at most ``layer``, whose entering state is known."""
        return max(known for known in self._states if known <= layer)

    def __getitem__(self, layer: int) -> torch.Tensor:
        return self._states[layer]

    def get(self, layer: int) -> torch.Tensor | None:
        return self._states.get(layer)

    def offer(self, layer: int, state: torch.Tensor, capacity: int) -> None:
        """Keeps a state if there is room for it."""
        if len(self._states) < capacity:
            self._states[layer] = state

    def forget_above(self, layer: int) -> None:
        """Drops what a change in ``layer`` has made wrong."""
        self._states = {known: state for known, state in self._states.items() if known <= layer}

    def __len__(self) -> int:
        return len(self._states)


def _score_all(
    walk: LayerWalk,
    metric: Metric,
    remaining: list[int],
    states: _EnteringStates,
    on_candidate: Callable[[], None],
) -> dict[int, float]:
    scores: dict[int, float] = {}
    free = available_bytes(walk.model.device) + (len(states) - 1) * states.nbytes
    room = max(2, int(_SHARE_FOR_STATES * free / states.nbytes))
    size = min(len(remaining), room - 1)
    while len(scores) < len(remaining):
        group = remaining[len(scores) : len(scores) + size]
        try:
            found = _score_group(walk, metric, group, states, capacity=max(1, room - size), on_candidate=on_candidate)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if size == 1:
                raise SenteiError(
                    f"Memory does not suffice to run {metric.ids.numel()} tokens through one layer.",
                    "Use a smaller --seq-len, --offload, or a larger device.",
                ) from error
            states.forget_above(0)
            size, room = max(1, size // 2), 2
            continue
        scores |= found
    return scores


def _score_group(
    walk: LayerWalk,
    metric: Metric,
    group: list[int],
    states: _EnteringStates,
    *,
    capacity: int,
    on_candidate: Callable[[], None],
) -> dict[int, float]:
    """Walks the candidates of ``group`` (ascending) up together, each from its layer on."""
    rows: dict[int, torch.Tensor] = {}
    first, last = states.nearest(group[0]), group[-1]
    current: torch.Tensor | None = states[first]
    for index in range(first, len(walk.layers)):
        with walk.layers.layer(index) as module:
            for candidate in rows:
                rows[candidate] = walk.run(module, index, rows[candidate])
            if index in group:
                assert current is not None
                rows[index] = walk.run_without_attention(module, index, current)
            if index < last:
                if (known := states.get(index + 1)) is None:
                    assert current is not None
                    current = walk.run(module, index, current)
                    states.offer(index + 1, current, capacity)
                else:
                    current = known
    scores = {}
    for candidate in group:
        scores[candidate] = finite(metric(walk, rows.pop(candidate)), metric.name, walk)
        on_candidate()
    return scores
