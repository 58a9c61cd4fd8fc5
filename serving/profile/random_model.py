"""Checkpoints of random weights with a real model's shape: speed does not depend on what a model has learnt."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from serving.forecast.estimate import planned_checkpoint
from toolchain.architecture.layout import LayerLayout
from toolchain.checkpoint.directory import Checkpoint, copy_companions, write_config, write_weights
from toolchain.model.slicing import pruned_config

# Larger than any cache, so that no two tensors that are read one after the other share what is cached.
_NUM_RANDOM = 16 * 1024 * 1024
_DEVIATION = 0.02


def write_random_model(
    checkpoint: Checkpoint, layout: Sequence[LayerLayout], directory: Path, *, dtype: torch.dtype
) -> None:
    """Writes a model with the embedding and head of another one, its first layers, and random weights.

    Matrices are normal numbers, each from another place of one sequence; norms and biases are 1. No two matrices are
    alike: ONNX Runtime keeps equal ones once, and what is read again and again is read from a cache. With equal layers
    decoding was measured at half of the time that trained weights take.

    Args:
        checkpoint: The unpruned model. None of its weights is read.
        layout: The layers, no more than it has.
        directory: An existing directory.
        dtype: Of the weights.
    """
    shallow = _first_layers(checkpoint, len(layout))
    write_config(directory, pruned_config(shallow, layout))
    copy_companions(checkpoint.directory, directory)
    shapes = {name: info.shape for name, info in planned_checkpoint(shallow, layout).tensors.items()}
    largest = max(torch.Size(shape).numel() for shape in shapes.values())
    generator = torch.Generator().manual_seed(0)
    sequence = (torch.randn(min(_NUM_RANDOM, largest), generator=generator) * _DEVIATION).to(dtype)
    twice = sequence.repeat(2)  # so that it can be read on from any place

    def load(name: str) -> torch.Tensor:
        shape = shapes[name]
        if len(shape) < 2:
            return torch.ones(shape, dtype=dtype)
        size, start = torch.Size(shape).numel(), _place_of(name) % len(sequence)
        read_on = twice[start : start + min(size, len(sequence))]
        return read_on.repeat(-(-size // len(sequence)))[:size].reshape(shape)

    write_weights(directory, {name: (shape, dtype) for name, shape in shapes.items()}, load)


def _place_of(name: str) -> int:
    """Where a tensor's numbers begin: another place for each name, and the same one wherever it is written."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def _first_layers(checkpoint: Checkpoint, num_layers: int) -> Checkpoint:
    """The same model cut off after so many layers."""
    prefix = f"{checkpoint.family.layers}."
    kept = {
        name: info
        for name, info in checkpoint.tensors.items()
        if not name.startswith(prefix) or int(name.removeprefix(prefix).partition(".")[0]) < num_layers
    }
    config: dict[str, Any] = {**checkpoint.config, "num_hidden_layers": num_layers}
    if isinstance(kinds := config.get("layer_types"), list):
        config["layer_types"] = kinds[:num_layers]
    return replace(checkpoint, config=config, layout=checkpoint.layout[:num_layers], tensors=kept)
