"""The rounded matrices inside an int4 ONNX export, read back as what they stand for."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from toolchain.errors import MissingDependencyError, SenteiError
from toolchain.rounding import RoundedMatrix, measure_rounding

_PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@torch.no_grad()
def replace_with_rounded(model: PreTrainedModel, graph: Path) -> list[RoundedMatrix]:
    """Puts an export's matrices into the source model, which then computes what the export should.

    Args:
        model: The source, float32; changed in place.
        graph: ``model.onnx``, its external weights beside it.

    Returns:
        How far each matrix was from the source's.

    Raises:
        SenteiError: The graph cannot be read, or its matrices are not those of the model.
        MissingDependencyError: onnx is not installed.
    """
    proto = _load(graph)
    shares_embedding = any(node.op_type == "GatherBlockQuantized" for node in proto.graph.node)
    found = []
    for name, bits, matrix in _matrices(proto):
        for part, weight in _split(model, name, matrix):
            linear = _linear(model, part, graph)
            if linear.weight.shape != weight.shape:
                raise SenteiError(
                    f"{graph}: {part} has shape {list(weight.shape)}, the checkpoint's {list(linear.weight.shape)}."
                )
            found.append(measure_rounding(f"{part}.weight", f"int{bits}", weight, linear.weight))
            # A new parameter, not new values in the old one: that may be the embedding's too.
            linear.weight = nn.Parameter(weight.to(linear.weight.device), requires_grad=False)
    if shares_embedding:
        model.get_input_embeddings().weight = model.get_output_embeddings().weight
    return found


def _load(graph: Path) -> Any:
    try:
        onnx: Any = importlib.import_module("onnx")
    except ImportError as error:
        raise MissingDependencyError("onnx", "onnx") from error
    try:
        return onnx.load(str(graph))
    except Exception as error:  # protobuf's, onnx's own and the system's errors have nothing in common
        raise SenteiError(f"{graph} cannot be read ({type(error).__name__}).", "Export the model again.") from error


def _matrices(proto: Any) -> Iterator[tuple[str, int, torch.Tensor]]:
    """Module name, bits and float32 ``[out, in]`` of every ``MatMulNBits``."""
    numpy_helper: Any = importlib.import_module("onnx.numpy_helper")
    stored = {each.name: each for each in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type != "MatMulNBits":
            continue
        settings = {attribute.name: attribute.i for attribute in node.attribute}
        packed, scales, *zero_points = (numpy_helper.to_array(stored[name]) for name in node.input[1:] if name)
        matrix = dequantise(
            packed,
            scales,
            zero_points[0] if zero_points else None,
            bits=settings["bits"],
            shape=(settings["N"], settings["K"]),
        )
        name = node.input[1].partition(".MatMul")[0].replace(".attn.", ".self_attn.")
        yield name, settings["bits"], torch.from_numpy(matrix)


def dequantise(
    packed: NDArray[np.uint8],
    scales: NDArray[np.float32],
    zero_points: NDArray[np.uint8] | None,
    *,
    bits: int,
    shape: tuple[int, int],
) -> NDArray[np.float32]:
    """What ``MatMulNBits`` takes its weights for (ONNX Runtime's contrib operators): ``(q - zero_point) * scale``.

    Args:
        packed: uint8 ``[out, blocks, bytes]``; of two 4-bit values in a byte the low half comes first.
        scales: ``[out, blocks]``, or flat.
        zero_points: Packed likewise along the blocks; ``None`` stands for the middle of the range.
        bits: 4 or 8.
        shape: ``(out, in)``.

    Returns:
        float32 ``[out, in]``.
    """
    out, blocks = packed.shape[:2]
    values = _unpack(packed, bits).astype(np.float32)
    middle: Any = float(1 << (bits - 1))
    if zero_points is not None:
        middle = _unpack(zero_points.reshape(out, -1), bits)[:, :blocks, None].astype(np.float32)
    weights = (values - middle) * scales.reshape(out, blocks, 1).astype(np.float32)
    return np.ascontiguousarray(weights.reshape(out, -1)[:, : shape[1]])


def _unpack(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    if bits == 8:
        return packed
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


def _split(model: PreTrainedModel, name: str, matrix: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The builder fuses projections that the checkpoint has apart."""
    parent, _, last = name.rpartition(".")
    parts = [f"{parent}.{part}" for part in _PARTS.get(last, ())]
    modules = dict(model.named_modules())
    if not parts or parts[0] not in modules:
        yield name, matrix
        return
    sizes = [modules[part].out_features for part in parts]
    yield from zip(parts, matrix.split(sizes), strict=True)


def _linear(model: PreTrainedModel, name: str, graph: Path) -> nn.Linear:
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise SenteiError(f"{graph} has a matrix {name}, which the checkpoint has not.") from error
    assert isinstance(module, nn.Linear), name
    return module
