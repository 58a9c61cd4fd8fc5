"""Applies a plan: slices FFN weights and leaves removed parts out, on disk tensor by tensor or in a loaded model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from toolchain.architecture.families import Family
from toolchain.architecture.layout import LayerLayout, write_per_layer_config
from toolchain.checkpoint.directory import Checkpoint, TensorInfo, copy_companions, write_config, write_weights
from toolchain.model.loading import decoder_layers
from toolchain.progress import Progress, no_progress

KeptNeurons = Sequence[NDArray[np.int64]]


class PrunedTensors:
    """The tensors of a checkpoint as a plan leaves them: removed parts are absent, FFN weights are sliced.

    Attributes:
        shapes: Shape and dtype of each tensor, by name.
    """

    def __init__(
        self,
        source: Checkpoint,
        layout: Sequence[LayerLayout],
        kept_neurons: KeptNeurons,
        refitted: Mapping[str, TensorInfo] = MappingProxyType({}),
    ) -> None:
        """Reads nothing yet.

        Args:
            source: The unpruned checkpoint.
            layout: Each layer's shape after pruning.
            kept_neurons: int64 ``[intermediate_size]`` a layer, ascending indices into the source's neurons.
            refitted: Tensors that are not the source's any more, by name (:mod:`toolchain.prune.compensation`).
        """
        self._source, self._kept_neurons, self._refitted = source, kept_neurons, refitted
        self._cuts = {
            name: cut for name in source.tensors if (cut := _cut_of(name, source.family, layout)) is not _GONE
        }
        self.shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for name, cut in self._cuts.items():
            info = source.tensors[name]
            shape = list(info.shape)
            if cut is not None:
                shape[cut.dimension] = cut.entries * len(kept_neurons[cut.layer])
            self.shapes[name] = (tuple(shape), info.dtype)

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in the dtype it is stored in."""
        if name in self._refitted:
            return self._refitted[name].read(name)
        tensor, cut = self._source.read(name), self._cuts[name]
        if cut is None:
            return tensor
        index = _entries(self._kept_neurons[cut.layer], cut.entries, tensor.shape[cut.dimension])
        return tensor.index_select(cut.dimension, index)


def write_pruned(
    source: Checkpoint,
    layout: Sequence[LayerLayout],
    kept_neurons: KeptNeurons,
    directory: Path,
    *,
    refitted: Mapping[str, TensorInfo] = MappingProxyType({}),
    progress: Progress = no_progress,
) -> None:
    """Writes the pruned checkpoint, one tensor in memory at a time; same inputs, same bytes.

    Args:
        source: The unpruned checkpoint.
        layout: Each layer's shape after pruning.
        kept_neurons: int64 ``[intermediate_size]`` a layer, ascending indices into the source's neurons.
        directory: An existing directory.
        refitted: Tensors that are not the source's any more, by name (:mod:`toolchain.prune.compensation`).
        progress: Told of every tensor.
    """
    tensors = PrunedTensors(source, layout, kept_neurons, refitted)
    write_config(directory, pruned_config(source, layout))
    copy_companions(source.directory, directory)
    with progress("Writing the checkpoint", len(tensors.shapes)) as advance:
        write_weights(directory, tensors.shapes, tensors.read, on_tensor=lambda _name: advance())


def pruned_config(source: Checkpoint, layout: Sequence[LayerLayout]) -> dict[str, Any]:
    """The ``config.json`` of the pruned checkpoint; the source's own when nothing is removed."""
    config = dict(source.config)
    if overrides := write_per_layer_config(layout, config):
        config["architectures"] = [source.family.pruned_architecture]
        config["per_layer_config"] = overrides
    return config


def narrow_ffn(model: PreTrainedModel, family: Family, kept_neurons: KeptNeurons) -> None:
    """Slices every FFN of a loaded model in place (stage 1).

    Args:
        model: Changed in place.
        family: Where its FFN lives.
        kept_neurons: int64 ``[intermediate_size]`` a layer, ascending.
    """
    for layer, kept in zip(decoder_layers(model, family), kept_neurons, strict=True):
        narrow_layer(layer, family, kept)


def narrow_layer(layer: nn.Module, family: Family, kept: NDArray[np.int64]) -> list[Callable[[], None]]:
    """Slices the FFN of one layer in place.

    Args:
        layer: Changed in place.
        family: Where its FFN lives.
        kept: int64 ``[intermediate_size]``, ascending.

    Returns:
        What gives the neurons back, each to be called once. It holds the weights that were cut off, so that nothing is
        in memory twice; drop it to forget them.
    """
    output = layer.get_submodule(family.ffn_output)
    assert isinstance(output, nn.Linear)
    if len(kept) == output.in_features:
        return []
    undo = []
    for name in family.ffn_inputs:
        linear = layer.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        rows = _entries(kept, family.ffn_input_parts, linear.out_features)
        undo.append(_narrow(linear, "weight", 0, rows))
        if linear.bias is not None:
            undo.append(_narrow(linear, "bias", 0, rows))
        undo.append(_resized(linear, "out_features", len(rows)))
    undo.append(_narrow(output, "weight", 1, torch.from_numpy(kept)))
    undo.append(_resized(output, "in_features", len(kept)))
    return undo


def _narrow(linear: nn.Linear, name: str, dimension: int, kept: torch.Tensor) -> Callable[[], None]:
    """Keeps some entries of a parameter; returns what puts the others back where they were."""
    whole = linear.get_parameter(name).data
    size, kept = whole.shape[dimension], kept.to(whole.device)
    is_gone = torch.ones(size, dtype=torch.bool, device=kept.device)
    is_gone[kept] = False
    gone = is_gone.nonzero().squeeze(1) if kept.device.type != "meta" else kept.new_empty(size - len(kept))
    rest = whole.index_select(dimension, gone)
    setattr(linear, name, nn.Parameter(whole.index_select(dimension, kept), requires_grad=False))

    def put_back() -> None:
        part = linear.get_parameter(name).data
        shape = list(part.shape)
        shape[dimension] = size
        joined = part.new_empty(shape)
        joined.index_copy_(dimension, kept, part).index_copy_(dimension, gone, rest)
        setattr(linear, name, nn.Parameter(joined, requires_grad=False))

    return put_back


def _resized(linear: nn.Linear, name: str, size: int) -> Callable[[], None]:
    """Sets what a linear layer says of its size; returns what sets it back."""
    before = getattr(linear, name)
    setattr(linear, name, size)
    return lambda: setattr(linear, name, before)


@dataclass(frozen=True, kw_only=True)
class _Cut:
    """Where a tensor is cut: the dimension that holds neurons, and how many entries each has there."""

    layer: int
    dimension: int
    entries: int


_GONE = object()


def _cut_of(name: str, family: Family, layout: Sequence[LayerLayout]) -> Any:
    """Where a tensor is cut, ``None`` for not at all, or ``_GONE``."""
    prefix = f"{family.layers}."
    if not name.startswith(prefix):
        return None
    number, _, rest = name.removeprefix(prefix).partition(".")
    layer = int(number)
    module, _, _ = rest.partition(".")
    if not layout[layer].attention and module in family.attention_parts:
        return _GONE
    if layout[layer].intermediate_size == 0 and module in family.ffn_parts:
        return _GONE
    if (side := family.neuron_side(rest)) is None:
        return None
    return _Cut(layer=layer, dimension=side[0], entries=side[1])


def _entries(kept: NDArray[np.int64], entries: int, size: int) -> torch.Tensor:
    """Indices of the kept neurons' entries in a dimension of ``size``, whose stacked parts hold one entry of each."""
    part = size // entries
    return torch.cat([torch.from_numpy(kept) + part * number for number in range(entries)])
