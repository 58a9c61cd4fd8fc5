"""A directory that stock vLLM serves with the sentei plugin: dtype, shards, and shapes that fit the parallelism."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from toolchain.architecture.families import check_vllm_follows
from toolchain.checkpoint.directory import (
    MAX_SHARD_BYTES,
    Checkpoint,
    copy_companions,
    dtype_name,
    open_checkpoint,
    same_bits,
    write_config,
    write_weights,
)
from toolchain.checkpoint.tensor_parallel import head_counts, ranks_for_heads
from toolchain.checkpoint.verification_document import VERIFICATION_FILE, CheckRecord, ExportVerification
from toolchain.errors import CheckFailedError, SenteiError
from toolchain.outputs import check_output_directory, new_directory, writes_directory

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CARRIED = ("plan.json", "README.md")


@writes_directory
def export_vllm(
    directory: Path,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    tensor_parallel: int = 1,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    force: bool = False,
    on_tensor: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """Writes a deployable checkpoint, reads it back, and compares every tensor bit by bit with its source.

    Args:
        directory: A checkpoint, pruned or not.
        out: The directory to create.
        dtype: Stored in; by default what it is.
        tensor_parallel: GPUs the server will split each layer over.
        max_shard_bytes: No weight file is larger, unless a single tensor is.
        force: Replace ``out`` if it is not empty.
        on_tensor: Called with each tensor's name once it is written, and again once it is compared.

    Returns:
        What ``verification.json`` holds.

    Raises:
        SenteiError: Not a good checkpoint, something that vLLM's class has no place for, a width or head count that
            ``tensor_parallel`` does not divide, or a weight that the dtype cannot hold.
        CheckFailedError: What was read back differs from what should have been written.
    """
    check_output_directory(out, force=force, inputs=[directory])
    if max_shard_bytes < 1:
        raise SenteiError(f"The largest shard is {max_shard_bytes} bytes.", "Give a positive size.")
    if dtype is not None and dtype not in _DTYPES:
        raise SenteiError(f"dtype {dtype} is not supported.", f"Use {', '.join(map(dtype_name, _DTYPES))}.")
    checkpoint = open_checkpoint(directory)
    check_vllm_follows(checkpoint.config)
    check_tensor_parallel(checkpoint, tensor_parallel)
    stored = dtype or checkpoint.dtype
    with new_directory(out, force=force) as partial:
        _write(checkpoint, partial, dtype, max_shard_bytes, on_tensor)
        num_tensors = _compare(checkpoint, partial, dtype, on_tensor)
        verification = ExportVerification(
            schema_version=1,
            sentei_version=version("sentei"),
            passed=True,
            engine="safetensors",
            dtype=dtype_name(stored),
            tensor_parallel=tensor_parallel,
            source_fingerprint=checkpoint.fingerprint,
            num_tensors=num_tensors,
            tolerances={"max_difference": 0.0},
            max_difference=0.0,
            checks={"differing_tensors": CheckRecord(passed=True, value=0, limit=0)},
        )
        (partial / VERIFICATION_FILE).write_text(verification.to_json(), encoding="utf-8")
    return verification.content()


def check_tensor_parallel(checkpoint: Checkpoint, tensor_parallel: int) -> None:
    """Checks that heads and every layer's width can be split evenly.

    Raises:
        SenteiError: They cannot; names the layers and what would have to change.
    """
    if tensor_parallel < 1:
        raise SenteiError(f"tensor_parallel is {tensor_parallel}; it must be at least 1.")
    if tensor_parallel not in (fitting := ranks_for_heads(checkpoint)):
        heads, kv_heads = head_counts(checkpoint)
        raise SenteiError(
            f"{checkpoint.directory}: {heads} attention heads and {kv_heads} key-value heads cannot be split over "
            f"tensor_parallel = {tensor_parallel}.",
            f"Possible here: {', '.join(map(str, fitting))}.",
        )
    widths = [layer.intermediate_size for layer in checkpoint.layout]
    if odd := [index for index, width in enumerate(widths) if width % tensor_parallel]:
        layers = ", ".join(f"{index} ({widths[index]})" for index in odd[:8]) + (", ..." if len(odd) > 8 else "")
        raise SenteiError(
            f"{checkpoint.directory}: tensor_parallel = {tensor_parallel} does not divide intermediate_size of "
            f"{len(odd)} layers: {layers}.",
            f"Prune again with --tensor-parallel {tensor_parallel}, or edit the plan to multiples of that.",
        )


def _write(
    checkpoint: Checkpoint,
    out: Path,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    on_tensor: Callable[[str], None],
) -> None:
    tensors = {name: (info.shape, dtype or info.dtype) for name, info in checkpoint.tensors.items()}
    write_weights(
        out, tensors, lambda name: _cast(checkpoint, name, dtype), max_shard_bytes=max_shard_bytes, on_tensor=on_tensor
    )
    write_config(out, _with_dtype(checkpoint.config, dtype))
    copy_companions(checkpoint.directory, out)
    for name in _CARRIED:
        if (checkpoint.directory / name).is_file():
            shutil.copyfile(checkpoint.directory / name, out / name)


def _cast(checkpoint: Checkpoint, name: str, dtype: torch.dtype | None) -> torch.Tensor:
    tensor = checkpoint.read(name)
    if dtype is None or tensor.dtype == dtype:
        return tensor
    cast = tensor.to(dtype)
    if tensor.isfinite().all() and not cast.isfinite().all():
        raise SenteiError(
            f"{checkpoint.directory}: {name} holds {tensor.abs().max():.3g}, more than {dtype_name(dtype)} can.",
            "Export as bfloat16 or float32.",
        )
    return cast


def _with_dtype(config: Mapping[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """The config with ``dtype``, and Transformers 4's ``torch_dtype`` where it was used, naming what is stored."""
    if dtype is None:
        return dict(config)
    named = {"dtype": dtype_name(dtype)} | ({"torch_dtype": dtype_name(dtype)} if "torch_dtype" in config else {})
    return {**config, **named}


def _compare(checkpoint: Checkpoint, out: Path, dtype: torch.dtype | None, on_tensor: Callable[[str], None]) -> int:
    """Opens what was written as any reader would, and compares it; returns the number of tensors."""
    written = open_checkpoint(out)
    if written.layout != checkpoint.layout or set(written.tensors) != set(checkpoint.tensors):
        raise CheckFailedError(f"{out} does not read back with the layers and tensors of {checkpoint.directory}.")
    for name in _differing(checkpoint, written, dtype, on_tensor):
        raise CheckFailedError(
            f"{name} reads back different from {checkpoint.directory}: the disk may be failing.", "Export again."
        )
    return len(written.tensors)


def _differing(
    checkpoint: Checkpoint, written: Checkpoint, dtype: torch.dtype | None, on_tensor: Callable[[str], None]
) -> Iterator[str]:
    for name in written.tensors:
        expected, found = _cast(checkpoint, name, dtype), written.read(name)
        if not same_bits(expected, found):
            yield name
        on_tensor(name)
