"""One step of the search: a model without each candidate's attention, the work below a candidate done once.

Removing the attention of layer *i* changes nothing below it. So a candidate joins the walk at its layer, and from there
all candidates of a step go up together: each layer is visited once a step, and its weights are read once.
"""

from collections.abc import Callable
from typing import TypeVar

import torch

from toolchain.errors import SenteiError
from toolchain.layer_walk import LayerWalk
from toolchain.memory import available_bytes, is_out_of_memory

# The rest is for what a layer and the head need while they run.
_SHARE_FOR_STATES = 0.4

Found = TypeVar("Found")


class EnteringStates:
    """The current model's hidden states where they are known: what enters layer 0, and as many others as fit.

    Attributes:
        nbytes: Of one state.
        num_tokens: Of one state.
    """

    def __init__(self, embedded: torch.Tensor) -> None:
        """``embedded``: what enters layer 0, ``[num_sequences, seq_len, hidden_size]``."""
        self._states = {0: embedded}
        self.nbytes = embedded.nbytes
        self.num_tokens = embedded.shape[0] * embedded.shape[1]

    def starting(self, num_tokens: int) -> "EnteringStates":
        """The same for the first ``num_tokens`` tokens alone, which do not depend on those that follow."""
        part = EnteringStates(self._states[0][:, :num_tokens])
        part._states = {layer: state[:, :num_tokens] for layer, state in self._states.items()}
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

    def offer(self, layer: int, state: torch.Tensor, capacity: int) -> None:
        """Keeps a state if there is room for it."""
        if len(self._states) < capacity:
            self._states[layer] = state

    def forget_above(self, layer: int) -> None:
        """Drops what a change in ``layer`` has made wrong."""
        self._states = {known: state for known, state in self._states.items() if known <= layer}

    def __len__(self) -> int:
        """How many are known."""
        return len(self._states)


@torch.inference_mode()
def embedded_states(walk: LayerWalk, ids: torch.Tensor) -> EnteringStates:
    """States to begin with: what enters the first layer."""
    return EnteringStates(walk.embed(ids))


@torch.inference_mode()
def without_each(
    walk: LayerWalk, candidates: list[int], states: EnteringStates, look: Callable[[torch.Tensor], Found]
) -> dict[int, Found]:
    """What ``look`` makes of the last hidden state without each candidate's attention, in turn.

    As many candidates go up together as memory holds.

    Args:
        walk: Over the model as it is.
        candidates: Layers, ascending.
        states: Of the model as it is.
        look: Given ``[num_sequences, seq_len, hidden_size]``.

    Raises:
        SenteiError: Memory does not suffice for one candidate.
    """
    results: dict[int, Found] = {}
    free = available_bytes(walk.model.device) + (len(states) - 1) * states.nbytes
    room = max(2, int(_SHARE_FOR_STATES * free / states.nbytes))
    size = min(len(candidates), room - 1)
    while len(results) < len(candidates):
        group = candidates[len(results) : len(results) + size]
        try:
            found = _without_group(walk, group, states, look, capacity=max(1, room - size))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if size == 1:
                raise SenteiError(
                    f"Memory does not suffice to run {states.num_tokens} tokens through one layer.",
                    "Use a smaller --seq-len, --offload, or a larger device.",
                ) from error
            states.forget_above(0)
            size, room = max(1, size // 2), 2
            continue
        results |= found
    return results


def _without_group(
    walk: LayerWalk,
    group: list[int],
    states: EnteringStates,
    look: Callable[[torch.Tensor], Found],
    *,
    capacity: int,
) -> dict[int, Found]:
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
    return {candidate: look(rows.pop(candidate)) for candidate in group}
