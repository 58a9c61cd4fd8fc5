"""Writes a safetensors file one tensor at a time; the library's own writer wants all of them in memory at once.

The format: the header's length as 8 little-endian bytes, the header as JSON, then the tensors' bytes without gaps
(https://github.com/huggingface/safetensors#format).
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8


def write_safetensors(
    path: Path,
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    load: Callable[[str], torch.Tensor],
    *,
    on_tensor: Callable[[str], None] = lambda name: None,
) -> None:
    """Writes one file; holds one tensor in memory.

    Args:
        path: The file.
        tensors: Shape and dtype by name.
        load: Returns a tensor of that name, shape and dtype.
        on_tensor: Called after each tensor, for progress.

    Raises:
        OSError: The disk is full or not writable.
    """
    # The widest dtype first keeps every tensor aligned to its own size.
    order = sorted(tensors, key=lambda name: -tensors[name][1].itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        shape, dtype = tensors[name]
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in order:
            tensor = load(name)
            assert (tuple(tensor.shape), tensor.dtype) == tensors[name], name
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            on_tensor(name)
