"""The checkpoint an export was made from, run layer by layer: what the export's answers are compared with."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from serving.verify.answers import Sequences
from serving.verify.rounded import HEAD, RoundedMatrices, carry, round_inputs
from toolchain.checkpoint.directory import Checkpoint
from toolchain.memory import available_bytes
from toolchain.model.disk_layers import open_walk
from toolchain.progress import Progress, no_progress

# Beside the weights: activations, the logits of the longest prompt, and what the libraries need.
_FILLED_BY_WEIGHTS = 0.8


class CheckpointReference:
    """A checkpoint with weights of its own or an export's rounded ones, in memory or one layer at a time.

    All sequences go through a layer before the next one is read: with ``offload`` each pass reads the checkpoint once.

    Attributes:
        dtype: Computed in.
        offloaded: Whether layers stay on disk.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype,
        device: str,
        offload: bool,
        on_layer: Callable[[], None] = lambda: None,
    ) -> None:
        """Loads the checkpoint, or what of it is no decoder layer; ``on_layer`` is called when one has been run."""
        self._checkpoint, self.dtype, self.offloaded, self._on_layer = checkpoint, dtype, offload, on_layer
        self._walk = open_walk(checkpoint, dtype=dtype, device=device, offload=offload)
        self._rounded: RoundedMatrices | None = None

    def carry(self, rounded: RoundedMatrices) -> None:
        """From now on computes with an export's matrices, and rounds what goes into them as it does."""
        walk, layers = self._walk, f"{self._checkpoint.family.layers}."
        self._rounded = rounded
        # Layers on disk get theirs when they are read.
        carry(walk.model, rounded, outside=None if walk.layers.resident else layers)
        round_inputs(walk.model, rounded)
        if HEAD in rounded.shapes and rounded.round_inputs is not None:
            # The walk multiplies with the head's matrix itself, without its hooks.
            walk.final_norm.register_forward_hook(lambda module, inputs, normed: rounded.round_inputs(normed))

    def log_probabilities(self, sequences: Sequences) -> Iterator[torch.Tensor]:
        """See :class:`serving.verify.answers.Reference`; float64 where that is computed in."""
        walk = self._walk
        with torch.no_grad():
            hidden = [walk.embed(torch.tensor([list(each)])) for each in sequences]
            for index in range(len(walk.layers)):
                with walk.layers.layer(index) as module:
                    if self._rounded is not None and not walk.layers.resident:
                        carry(module, self._rounded, prefix=f"{self._checkpoint.family.layers}.{index}.")
                    hidden = [walk.run(module, index, each) for each in hidden]
                self._on_layer()
            for each in hidden:
                logits = [some for _, some in walk.logits(each[0])]
                yield torch.cat(logits, dim=-1).log_softmax(-1)

    def close(self) -> None:
        """Frees the model."""
        del self._walk


@dataclass(frozen=True, kw_only=True)
class Computing:
    """Where and how references are computed.

    Attributes:
        device: cpu, cuda, cuda:1 ...
        dtype: What the export is compared in.
        offload: One layer in memory at a time, even where all fit.
        progress: Told of every layer that was run.
    """

    device: str
    dtype: torch.dtype
    offload: bool
    progress: Progress = no_progress

    def open(
        self, checkpoint: Checkpoint, dtype: torch.dtype, on_layer: Callable[[], None] = lambda: None
    ) -> CheckpointReference:
        """A checkpoint in a dtype, layer by layer where it does not fit into what is free."""
        offload = not self.fits(checkpoint, dtype)
        return CheckpointReference(checkpoint, dtype=dtype, device=self.device, offload=offload, on_layer=on_layer)

    def fits(self, checkpoint: Checkpoint, dtype: torch.dtype) -> bool:
        """Whether all layers may be in memory at once."""
        free = available_bytes(torch.device(self.device))
        return not self.offload and checkpoint.num_parameters * dtype.itemsize <= _FILLED_BY_WEIGHTS * free
