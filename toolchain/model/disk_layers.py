"""Models ready to run layer by layer, in memory or larger than it.

Of the latter, decoder layers are read from safetensors when they are needed, and dropped after. The only module that
moves weights. At most two layers are in memory then: the one that runs, and the next, which a thread reads meanwhile.
"""

import copy
import gc
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from toolchain.architecture.layout import LayerLayout
from toolchain.checkpoint.directory import Checkpoint
from toolchain.memory import give_back_freed_memory, keep_freed_memory
from toolchain.model.layer_walk import LayerWalk, cut_layer, without_neurons
from toolchain.model.loading import (
    check_complete,
    decoder_layers,
    load_model,
    read_generation_config,
    remove_attention,
    remove_ffn,
    transformers_class,
)
from toolchain.model.slicing import KeptNeurons, PrunedTensors, narrow_ffn


def open_walk(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: str,
    offload: bool,
    device_map: Mapping[str, str] | None = None,
) -> LayerWalk:
    """A model ready to run layer by layer: in memory, or on disk but for the layer that runs.

    With ``device_map`` it is spread over several GPUs; see :func:`toolchain.model.loading.load_model`.
    """
    if device_map is not None:
        # The hooks of a model that was spread before hold it in circles, which are not cleared away at once.
        gc.collect()
    # Weights, which come and go, are given back; activations, which come again with every layer, are kept.
    give_back_freed_memory()
    if offload:
        return open_offloaded(checkpoint, dtype=dtype, device=device)
    walk = LayerWalk(load_model(checkpoint, dtype=dtype, device=device, device_map=device_map), checkpoint.family)
    keep_freed_memory()
    return walk


def open_offloaded(checkpoint: Checkpoint, *, dtype: torch.dtype, device: str) -> LayerWalk:
    """A walk over a checkpoint of which only embeddings, final norm and head stay in memory.

    Args:
        checkpoint: Pruned or not.
        dtype: Computed in.
        device: Computed on.

    Raises:
        SenteiError: A tensor cannot be read.
    """
    model = _without_layers(checkpoint, dtype, device)
    return LayerWalk(model, checkpoint.family, DiskLayers(checkpoint, model, dtype))


class DiskLayers:
    """Decoder layers that stay in a checkpoint; see :class:`toolchain.model.layer_walk.Layers`."""

    resident = False

    def __init__(self, checkpoint: Checkpoint, model: PreTrainedModel, dtype: torch.dtype) -> None:
        """``model`` has the layers without their weights, on the meta device."""
        self._checkpoint, self._model, self._dtype = checkpoint, model, dtype
        self._layers = decoder_layers(model, checkpoint.family)
        # Shapes alone: nothing is taken out of these.
        self._whole = copy.deepcopy(self._layers)
        self._next: tuple[int, Future[dict[str, torch.Tensor]]] | None = None
        self._last = -1
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-layer")
        self._start_whole()

    def _start_whole(self) -> None:
        self._layout = list(self._checkpoint.layout)
        self._kept = [np.arange(layer.intermediate_size) for layer in self._layout]
        self._reshaped()

    def __len__(self) -> int:
        """How many there are."""
        return len(self._layers)

    @contextmanager
    def layer(self, index: int, *, read_ahead: bool = True) -> Iterator[nn.Module]:
        """See :class:`toolchain.model.layer_walk.Layers`; reads the layer, and meanwhile the next either way."""
        number, reading = self._next or (index, self._reader.submit(self._read, index))
        if number != index:
            reading = self._reader.submit(self._read, index)
        weights = reading.result()
        following = index - 1 if self._last == index + 1 else index + 1
        self._next, self._last = None, index
        if read_ahead and 0 <= following < len(self):
            self._next = following, self._reader.submit(self._read, following)
        module = self._layers[index]
        module.load_state_dict(self._ready(weights), assign=True)
        del weights, reading
        try:
            yield module
        finally:
            module.to("meta")

    def narrow(self, kept_neurons: KeptNeurons) -> None:
        """See :class:`toolchain.model.layer_walk.Layers`."""
        narrow_ffn(self._model, self._checkpoint.family, kept_neurons)
        self._kept = [before[kept] for before, kept in zip(self._kept, kept_neurons, strict=True)]
        self._layout = [
            LayerLayout(attention=layer.attention, intermediate_size=len(kept))
            for layer, kept in zip(self._layout, self._kept, strict=True)
        ]
        for index in without_neurons(kept_neurons):
            remove_ffn(self._layers[index], self._checkpoint.family)
        self._reshaped()

    def remove_attention(self, index: int) -> None:
        """See :class:`toolchain.model.layer_walk.Layers`."""
        remove_attention(self._layers[index], self._checkpoint.family)
        self._layout[index] = LayerLayout(attention=False, intermediate_size=self._layout[index].intermediate_size)
        self._reshaped()

    def remove_ffn(self, index: int) -> None:
        """See :class:`toolchain.model.layer_walk.Layers`."""
        remove_ffn(self._layers[index], self._checkpoint.family)
        self._layout[index] = LayerLayout(attention=self._layout[index].attention, intermediate_size=0)
        self._kept = [each[:0] if layer == index else each for layer, each in enumerate(self._kept)]
        self._reshaped()

    def restore(self) -> None:
        """See :class:`toolchain.model.layer_walk.Layers`; what was cut is whole on disk, too."""
        for index, layer in enumerate(copy.deepcopy(self._whole)):
            self._layers[index] = layer
        self._start_whole()

    def cut(self, index: int, kept: NDArray[np.int64], *, attention: bool) -> None:
        """See :class:`toolchain.model.layer_walk.Layers`."""
        cut_layer(self._layers[index], self._checkpoint.family, kept, attention=attention)
        self._kept[index] = self._kept[index][kept]
        self._layout[index] = LayerLayout(attention=attention, intermediate_size=len(kept))
        # The layers that a thread reads meanwhile are others.
        self._tensors = PrunedTensors(self._checkpoint, self._layout, self._kept)

    def _reshaped(self) -> None:
        self._tensors = PrunedTensors(self._checkpoint, self._layout, self._kept)
        self._next = None

    def _read(self, index: int) -> dict[str, torch.Tensor]:
        prefix = f"{self._checkpoint.family.layers}.{index}."
        tensors = self._tensors
        names = [name for name in tensors.shapes if name.startswith(prefix)]
        # Not wider than stored: what waits takes the memory, and the way to a GPU the time, of that.
        in_memory = torch.Tensor.pin_memory if self._model.device.type == "cuda" else torch.clone
        return {name.removeprefix(prefix): in_memory(self._narrowed(tensors.read(name))) for name in names}

    def _narrowed(self, weight: torch.Tensor) -> torch.Tensor:
        """In the narrower of the dtypes that it is stored and computed in."""
        return weight.to(self._dtype) if self._dtype.itemsize < weight.dtype.itemsize else weight

    def _ready(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """To be computed with; takes each tensor out of ``weights``, so that no two kinds of all are there at once."""
        device, ready = self._model.device, {}
        while weights:
            name, weight = weights.popitem()
            ready[name] = weight.to(device, non_blocking=True).to(self._dtype)
        return ready


def _without_layers(checkpoint: Checkpoint, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """The model with embeddings, final norm and head from the checkpoint, and decoder layers on the meta device."""
    whole = check_complete(checkpoint)
    config, outside = whole.config, copy.deepcopy(whole.config)
    outside.num_hidden_layers = 0
    model = transformers_class(checkpoint.family).from_pretrained(
        checkpoint.directory,
        config=outside,
        generation_config=read_generation_config(checkpoint.directory, outside),
        dtype=dtype,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
    )
    model.to(device)
    parent, _, name = checkpoint.family.layers.rpartition(".")
    setattr(model.get_submodule(parent), name, decoder_layers(whole, checkpoint.family))
    model.config.num_hidden_layers = config.num_hidden_layers
    return model.eval()
