"""One step of the search: a model without each candidate, the work below a candidate done once.

A candidate is a layer's attention or its FFN. Removing a part of layer *i* changes nothing below it.
So a candidate joins the walk at its layer, and from there all candidates of a step go up together: each layer is
visited once a step, and its weights are read once. And once a part of layer *r* is gone for good, candidates below *r*
are what they were up to there: in the next step they join the walk at *r*.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from toolchain.architecture.parts import SubBlock
from toolchain.errors import SenteiError, is_out_of_memory
from toolchain.model.layer_walk import LayerWalk

# The rest is for what a layer and the head need while they run.
_SHARE_FOR_STATES = 0.4

Found = TypeVar("Found")


class EnteringStates:
    """Hidden states where they are known: what enters layer 0, and as many others as fit.

    Of the current model, and of the candidates of the last step, which are the current model without one part.

    Attributes:
        nbytes: Of one state.
        num_tokens: Of one state.
    """

    def __init__(self, embedded: torch.Tensor) -> None:
        """``embedded``: what enters layer 0, ``[num_sequences, seq_len, hidden_size]``."""
        self._states = {0: embedded}
        self._of_candidates: dict[SubBlock, dict[int, torch.Tensor]] = {}
        self.nbytes = embedded.nbytes
        self.num_tokens = embedded.shape[0] * embedded.shape[1]

    def starting(self, num_tokens: int) -> "EnteringStates":
        """The same for the first ``num_tokens`` tokens alone, which do not depend on those that follow."""
        part = EnteringStates(self._states[0][:, :num_tokens])
        part._states = {layer: state[:, :num_tokens] for layer, state in self._states.items()}
        part._of_candidates = {
            candidate: {layer: state[:, :num_tokens] for layer, state in known.items()}
            for candidate, known in self._of_candidates.items()
        }
        return part

    def nearest(self, layer: int) -> int:
        """The highest layer, at most ``layer``, whose entering state is known."""
        return max(known for known in self._states if known <= layer)

    def __getitem__(self, layer: int) -> torch.Tensor:
        """A known state."""
        return self._states[layer]

    def get(self, layer: int) -> torch.Tensor | None:
        """A state, if it is known."""
        return self._states.get(layer)

    def of_candidate(self, candidate: SubBlock) -> tuple[int, torch.Tensor] | None:
        """The highest layer above a candidate's own whose entering state is known without it, and that."""
        known = self._of_candidates.get(candidate)
        return max(known.items(), key=lambda item: item[0]) if known else None

    def offer(self, layer: int, state: torch.Tensor, capacity: int) -> None:
        """Keeps a state of the current model if there is room for it."""
        if len(self._states) < capacity:
            self._states[layer] = state

    def places(self, candidates: Sequence[SubBlock]) -> list[int]:
        """The layers that :meth:`of_candidate` names, 0 where none is known."""
        return [found[0] if (found := self.of_candidate(each)) else 0 for each in candidates]

    def keep_of_candidate(self, candidate: SubBlock, layer: int, state: torch.Tensor) -> None:
        """Keeps a state without a candidate."""
        self._of_candidates.setdefault(candidate, {})[layer] = state

    def forget_above(self, layer: int) -> None:
        """Drops what a change in ``layer`` has made wrong."""
        self._states = {known: state for known, state in self._states.items() if known <= layer}
        self._of_candidates = {
            candidate: {known: state for known, state in states.items() if known <= layer}
            for candidate, states in self._of_candidates.items()
        }

    def __len__(self) -> int:
        """How many are known."""
        return len(self._states) + sum(map(len, self._of_candidates.values()))


@torch.inference_mode()
def embedded_states(walk: LayerWalk, ids: torch.Tensor) -> EnteringStates:
    """States to begin with: what enters the first layer."""
    return EnteringStates(walk.embed(ids))


@torch.inference_mode()
def without_each(
    walk: LayerWalk, candidates: list[SubBlock], states: EnteringStates, look: Callable[[torch.Tensor], Found]
) -> dict[SubBlock, Found]:
    """What ``look`` makes of the last hidden state without each candidate, in turn.

    As many candidates go up together as memory holds.

    Args:
        walk: Over the model as it is.
        candidates: By layer, ascending; none will do.
        states: Of the model as it is.
        look: Given ``[num_sequences, seq_len, hidden_size]``.

    Raises:
        SenteiError: Memory does not suffice for one candidate.
    """
    results: dict[SubBlock, Found] = {}
    if not candidates:
        return results
    free = walk.free_bytes() + (len(states) - 1) * states.nbytes
    room = max(2, int(_SHARE_FOR_STATES * free / states.nbytes))
    size = min(len(candidates), room - 1)
    # In flight are the candidates; of the model itself there is at most one state a layer.
    # Layers stay on disk where memory is scarce, and are read in any case: nothing is kept of candidates then.
    spare = room - len(candidates) - len(walk.layers) if walk.layers.resident else 0
    stride = _stride(len(candidates), len(walk.layers), spare)
    while len(results) < len(candidates):
        group = candidates[len(results) : len(results) + size]
        try:
            found = _without_group(walk, group, states, look, capacity=max(1, room - size), stride=stride)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if size == 1:
                raise SenteiError(
                    f"There is not enough memory to run {states.num_tokens} tokens through one layer.",
                    "Use a smaller --seq-len, --offload, or a larger device.",
                ) from error
            states.forget_above(0)
            size, room, stride = max(1, size // 2), 2, None
            continue
        results |= found
    return results


@torch.inference_mode()
def last_states(walk: LayerWalk, ids: torch.Tensor, models: Sequence[frozenset[SubBlock]]) -> Iterator[torch.Tensor]:
    """What leaves the last layer of several models that differ in what is removed; up to there, two run as one.

    Args:
        walk: Over the unpruned model.
        ids: int64 ``[num_sequences, seq_len]``.
        models: What is removed of each.

    Yields:
        ``[num_sequences, seq_len, hidden_size]`` of each model in turn.
    """
    embedded = walk.embed(ids)
    # In a layer, what enters it and what leaves it are there of each model.
    together = max(1, int(_SHARE_FOR_STATES * walk.free_bytes() / (2 * embedded.nbytes)))
    for start in range(0, len(models), together):
        group = models[start : start + together]
        states = {frozenset[SubBlock](): embedded}
        for index in range(len(walk.layers)):
            below = dict.fromkeys(frozenset(each for each in model if each.layer <= index) for model in group)
            with walk.layers.layer(index) as module:
                states = {
                    removed: walk.run_without(
                        [each.part for each in removed if each.layer == index],
                        module,
                        index,
                        states[frozenset(each for each in removed if each.layer < index)],
                    )
                    for removed in below
                }
        yield from (states[model] for model in group)


def _without_group(
    walk: LayerWalk,
    group: list[SubBlock],
    states: EnteringStates,
    look: Callable[[torch.Tensor], Found],
    *,
    capacity: int,
    stride: int | None,
) -> dict[SubBlock, Found]:
    """Walks the candidates of ``group`` (ascending) up together, each from where it is known."""
    resumed = {candidate: place for candidate in group if (place := states.of_candidate(candidate))}
    fresh = [candidate for candidate in group if candidate not in resumed]
    # The current model itself is walked up to the last candidate that branches off from it.
    base, last = (states.nearest(fresh[0].layer), fresh[-1].layer) if fresh else (len(walk.layers), -1)
    current = states.get(base)
    rows: dict[SubBlock, torch.Tensor] = {}
    for index in range(min([base, *(layer for layer, _ in resumed.values())]), len(walk.layers)):
        with walk.layers.layer(index) as module:
            for candidate in rows:
                rows[candidate] = walk.run(module, index, rows[candidate])
            for candidate, (layer, state) in resumed.items():
                if layer == index:
                    rows[candidate] = walk.run(module, index, state)
            for candidate in fresh:
                if candidate.layer == index:
                    assert current is not None
                    rows[candidate] = walk.run_without((candidate.part,), module, index, current)
            if base <= index < last:
                if (known := states.get(index + 1)) is None:
                    assert current is not None
                    current = walk.run(module, index, current)
                    states.offer(index + 1, current, capacity)
                else:
                    current = known
        if stride and (index + 1) % stride == 0 and index + 1 < len(walk.layers):
            for candidate, state in rows.items():
                states.keep_of_candidate(candidate, index + 1, state)
    return {candidate: look(rows.pop(candidate)) for candidate in group}


def _stride(num_candidates: int, num_layers: int, spare: int) -> int | None:
    """Every how many layers a candidate's state can be kept, if there is room for ``spare`` states of all candidates.

    A candidate goes through half of the layers on average. ``None``: there is no room for one state of each.
    """
    if spare < num_candidates:
        return None
    return max(1, math.ceil(num_candidates * num_layers / 2 / spare))
