"""The checkpoint an export came from, one layer in memory at a time: what the export's answers are compared with."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from serving.verify.answers import Sequences
from serving.verify.rounded import HEAD, RoundedMatrices, carry, round_inputs
from toolchain.checkpoint.directory import Checkpoint
from toolchain.memory import available_bytes
from toolchain.model.disk_layers import open_walk
from toolchain.model.layer_walk import LayerWalk
from toolchain.progress import Progress, no_progress

# Beside the weights: activations, the logits of the longest prompt, and what the libraries need.
_FILLED_BY_WEIGHTS = 0.8
_ROWS = 64  # of log-probabilities, normalised together


class CheckpointReference:
    """A checkpoint with weights of its own or an export's rounded ones.

    All sequences go through a layer before the next one is read, so each pass reads the checkpoint once, and more than
    one layer in memory would save nothing.

    Attributes:
        dtype: Computed in.
    """

    def __init__(self, walk: LayerWalk, *, dtype: torch.dtype, on_layer: Callable[[], None] = lambda: None) -> None:
        """Takes a checkpoint that is ready to run; ``on_layer`` is called when a layer has been run."""
        self._walk, self.dtype, self._on_layer = walk, dtype, on_layer
        self._rounded: RoundedMatrices | None = None

    def carry(self, rounded: RoundedMatrices) -> None:
        """From now on computes with an export's matrices, and rounds what goes into them as it does."""
        walk = self._walk
        self._rounded = rounded
        # Layers get theirs when they are read.
        carry(walk.model, rounded, outside=f"{walk.family.layers}.")
        round_inputs(walk.model, rounded)
        if HEAD in rounded.shapes and rounded.round_inputs is not None:
            # The walk multiplies with the head's matrix itself, without its hooks.
            walk.final_norm.register_forward_hook(lambda module, inputs, normed: rounded.round_inputs(normed))

    @torch.no_grad()
    def log_probabilities(self, sequences: Sequences) -> Iterator[torch.Tensor]:
        """See :class:`serving.verify.answers.Reference`; float64 where that is computed in."""
        walk = self._walk
        hidden = [walk.embed(torch.tensor([list(each)])) for each in sequences]
        for index in range(len(walk.layers)):
            with walk.layers.layer(index) as module:
                if self._rounded is not None:
                    carry(module, self._rounded, prefix=f"{walk.family.layers}.{index}.")
                hidden = [walk.run(module, index, each) for each in hidden]
            self._on_layer()
        for each in hidden:
            yield self._normalised(each[0])

    def _normalised(self, states: torch.Tensor) -> torch.Tensor:
        """Log-probabilities in one tensor of their size: with a large vocabulary, copies are what memory goes into."""
        dtype = torch.promote_types(self.dtype, torch.float32)
        found = states.new_empty(len(states), self._walk.vocab_size, dtype=dtype)
        for entries, logits in self._walk.logits(states):
            found[:, entries] = logits
        for rows in found.split(_ROWS):
            rows.copy_(rows.log_softmax(-1))
        return found

    def close(self) -> None:
        """Frees the model."""
        del self._walk


@dataclass(frozen=True, kw_only=True)
class Computing:
    """Where and how references are computed.

    Attributes:
        device: cpu, cuda, cuda:1 ...
        dtype: What the export is compared in.
        offload: The export, too, has one layer in memory at a time where Transformers runs it, even if all would fit.
        progress: Told of every layer that was run.
    """

    device: str
    dtype: torch.dtype
    offload: bool
    progress: Progress = no_progress

    def open(
        self, checkpoint: Checkpoint, dtype: torch.dtype, on_layer: Callable[[], None] = lambda: None
    ) -> CheckpointReference:
        """A checkpoint in a dtype."""
        walk = open_walk(checkpoint, dtype=dtype, device=self.device, offload=True)
        return CheckpointReference(walk, dtype=dtype, on_layer=on_layer)

    def fits(self, checkpoint: Checkpoint, dtype: torch.dtype) -> bool:
        """Whether all layers of an export may be in memory at once."""
        free = available_bytes(torch.device(self.device))
        return not self.offload and checkpoint.num_parameters * dtype.itemsize <= _FILLED_BY_WEIGHTS * free
