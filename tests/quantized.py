"""Quantised directories made by hand, in the format that llm-compressor writes, without llm-compressor."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from toolchain.checkpoint.directory import copy_companions, open_checkpoint, write_config

GROUP_SIZE = 32
_8_BITS = {"num_bits": 8, "group_size": None, "symmetric": True, "actorder": None, "block_structure": None}
_FORMATS: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    "int8": (
        "int-quantized",
        {**_8_BITS, "type": "int", "strategy": "channel", "dynamic": False},
        {**_8_BITS, "type": "int", "strategy": "token", "dynamic": True},
    ),
    "fp8": (
        "float-quantized",
        {**_8_BITS, "type": "float", "strategy": "channel", "dynamic": False},
        {**_8_BITS, "type": "float", "strategy": "token", "dynamic": True},
    ),
    "w4a16": (
        "pack-quantized",
        {**_8_BITS, "num_bits": 4, "group_size": GROUP_SIZE, "type": "int", "strategy": "group", "dynamic": False},
        None,
    ),
}
SCHEMES = tuple(_FORMATS)


def quantization_config(scheme: str) -> dict[str, Any]:
    """The entry of ``config.json``."""
    layout, weights, inputs = _FORMATS[scheme]
    group = {"format": layout, "targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "config_groups": {"group_0": group | {"output_activations": None}},
        "format": layout,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def round_matrix(matrix: torch.Tensor, scheme: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Rounds to nearest; returns the tensors to store, and the float32 matrix they stand for."""
    values, out = matrix.float(), len(matrix)
    if scheme != "w4a16":
        largest = 127.0 if scheme == "int8" else 448.0
        scale = (values.abs().amax(1, keepdim=True) / largest).to(matrix.dtype)
        scaled = (values / scale.float()).clamp(-largest, largest)
        stored = scaled.round().to(torch.int8) if scheme == "int8" else scaled.to(torch.float8_e4m3fn)
        return {"weight": stored, "weight_scale": scale}, stored.float() * scale.float()
    groups = values.view(out, -1, GROUP_SIZE)
    scale = (groups.abs().amax(2) / 7).to(matrix.dtype)
    rounded = (groups / scale.float()[..., None]).round().clamp(-8, 7)
    parts = {
        "weight_packed": _pack(rounded.view(out, -1).to(torch.int64).numpy()),
        "weight_scale": scale,
        "weight_shape": torch.tensor(matrix.shape),
    }
    return parts, (rounded * scale.float()[..., None]).view(out, -1)


def write_quantized(
    source: Path,
    directory: Path,
    scheme: str,
    *,
    change: Callable[[dict[str, torch.Tensor]], object] = lambda tensors: None,
) -> dict[str, torch.Tensor]:
    """Rounds a checkpoint's matrices.

    Args:
        source: A checkpoint.
        directory: To create; may exist.
        scheme: One of :data:`SCHEMES`.
        change: Called with the tensors before they are written, to spoil some.

    Returns:
        What the rounded matrices stand for, float32, by the names of the weights.
    """
    checkpoint = open_checkpoint(source)
    tensors: dict[str, torch.Tensor] = {}
    meant: dict[str, torch.Tensor] = {}
    for name in checkpoint.tensors:
        tensor = checkpoint.read(name)
        if not name.startswith("model.layers.") or tensor.dim() < 2:
            tensors[name] = tensor
            continue
        parts, meant[name] = round_matrix(tensor, scheme)
        tensors |= {f"{name.removesuffix('.weight')}.{part}": stored for part, stored in parts.items()}
    change(tensors)
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    write_config(directory, {**checkpoint.config, "quantization_config": quantization_config(scheme)})
    copy_companions(source, directory)
    return meant


def _pack(values: np.ndarray) -> torch.Tensor:
    """Eight 4-bit numbers, moved up by 8, in one int32; the first in the lowest bits."""
    words = np.zeros((values.shape[0], values.shape[1] // 8), dtype=np.uint32)
    for place in range(8):
        words |= ((values[:, place::8] + 8).astype(np.uint32)) << np.uint32(4 * place)
    return torch.from_numpy(words.view(np.int32))
