"""The weights inside an ONNX export, compared with the checkpoint's, and rounded ones read back as what they stand for.

The vendor's builder stores a matrix as ``[in, out]``, stacks the projections of an attention into one, keeps those of
an FFN apart, and leaves out biases that are all zero.
"""

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from serving.onnx_export.graph_check import load_graph
from toolchain.architecture.families import FAMILIES
from toolchain.checkpoint.directory import same_bits
from toolchain.checkpoint.rounding_error import RoundedMatrix, measure_rounding
from toolchain.errors import SenteiError
from toolchain.onnx_libraries import import_onnx_library

_PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_FLOATS = {1: torch.float32, 10: torch.float16, 16: torch.bfloat16}  # onnx.TensorProto's numbers
_WEIGHT = re.compile(r"(?P<module>(model|lm_head)\b.*?)(?P<kind>\.MatMul\.weight|\.Add\.bias|\.weight)")


@torch.no_grad()
def count_differing(model: PreTrainedModel, graph: Path) -> int:
    """Counts the unrounded weights of an export that are not the source's, cast, and the source's that it lacks.

    Args:
        model: The source, float32.
        graph: ``model.onnx``, its external weights beside it.

    Raises:
        SenteiError: The graph cannot be read, or has a weight that the model has not.
        MissingDependencyError: onnx is not installed.
    """
    proto = _load(graph)
    differing = 0
    missing = {name for name, parameter in model.named_parameters() if parameter.count_nonzero()}
    for tensor in proto.graph.initializer:
        match = _WEIGHT.fullmatch(tensor.name)
        if match is None or tensor.data_type not in _FLOATS:
            continue
        found = _torch_tensor(tensor)
        expected, names = _source_tensor(model, match["module"], match["kind"], graph)
        missing -= names
        if found.shape != expected.shape or not same_bits(found, expected.to(found.dtype)):
            differing += 1
    for name, _, _ in _matrices(proto):
        missing -= {f"{module}.weight" for module, _ in _rows(model, name, graph)}
    if model.config.tie_word_embeddings:
        missing -= {name for name, parameter in model.named_parameters() if parameter is _head(model).weight}
    return differing + len(missing)


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
        start = 0
        for module, rows in _rows(model, name, graph):
            linear = model.get_submodule(module)
            source = linear.weight[rows]
            weight = matrix[start : start + len(source)]
            start += len(source)
            if source.shape != weight.shape:
                raise SenteiError(
                    f"{graph}: {name} has shape {list(matrix.shape)}, which does not fit the checkpoint's "
                    f"{module} {list(linear.weight.shape)}."
                )
            found.append(measure_rounding(f"{module}.weight", f"int{bits}", weight, source))
            # A new parameter, not new values in the old one: that may be the embedding's too.
            replaced = linear.weight.clone()
            replaced[rows] = weight.to(replaced.device)
            linear.weight = nn.Parameter(replaced, requires_grad=False)
    if shares_embedding:
        model.get_input_embeddings().weight = _head(model).weight
    return found


def _source_tensor(model: PreTrainedModel, module: str, kind: str, graph: Path) -> tuple[torch.Tensor, set[str]]:
    """What a graph's tensor should be, float32, and the parameters it is made of."""
    family = FAMILIES[model.config.model_type]
    if kind == ".MatMul.weight":
        rows = _rows(model, _module_name(module), graph)
        parts = [model.get_submodule(name).weight[part] for name, part in rows]
        return torch.cat(parts).T, {f"{name}.weight" for name, _ in rows}
    if kind == ".Add.bias":
        rows = _rows(model, _module_name(module), graph)
        parts = [model.get_submodule(name).bias[part] for name, part in rows]
        return torch.cat(parts), {f"{name}.bias" for name, _ in rows}
    if module == "model.embed_tokens":
        return model.get_input_embeddings().weight, {f"{module}.weight"}
    name = _module_name(module).replace("_norm.layernorm", "_norm")
    if name.endswith(".final_norm_layernorm"):
        name = family.final_norm
    weight = _submodule(model, name, graph).weight
    assert isinstance(weight, torch.Tensor)
    return weight + family.norm_offset, {f"{name}.weight"}


def _module_name(name: str) -> str:
    return name.replace(".attn.", ".self_attn.")


def _head(model: PreTrainedModel) -> nn.Linear:
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    return head


def _torch_tensor(tensor: Any) -> torch.Tensor:
    """A float initializer as it is stored; numpy has no bfloat16."""
    numpy_helper: Any = importlib.import_module("onnx.numpy_helper")
    dtype = _FLOATS[tensor.data_type]
    array = numpy_helper.to_array(tensor)
    if dtype == torch.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(dtype)
    return torch.from_numpy(array.copy())


def _load(graph: Path) -> Any:
    import_onnx_library("onnx")
    external: Any = importlib.import_module("onnx.external_data_helper")
    proto = load_graph(graph.parent, graph.name)
    weights: Path | None = None
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                # Checked above. onnx refuses links, as which the hub's cache keeps a snapshot's files.
                weights = (graph.parent / entry.value).resolve()
                entry.value = weights.name
    try:
        if weights is not None:
            external.load_external_data_for_model(proto, str(weights.parent))
        return proto
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
        yield _module_name(node.input[1].partition(".MatMul")[0]), settings["bits"], torch.from_numpy(matrix)


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


def _rows(model: PreTrainedModel, name: str, graph: Path) -> list[tuple[str, slice]]:
    """The modules, and which of their rows, that a matrix of the graph stacks."""
    modules = dict(model.named_modules())
    if name in modules:
        return [(name, slice(None))]
    parent, _, last = name.rpartition(".")
    if last in _PARTS:
        parts = [f"{parent}.{part}" for part in _PARTS[last]]
        if all(part in modules for part in parts):
            return [(part, slice(None)) for part in parts]
    fused = f"{parent}.gate_up_proj"
    if last in _PARTS["gate_up_proj"] and fused in modules:
        width = modules[fused].out_features // 2
        start = width * _PARTS["gate_up_proj"].index(last)
        return [(fused, slice(start, start + width))]
    raise SenteiError(f"{graph} has a matrix {name}, which the checkpoint has not.")


def _submodule(model: PreTrainedModel, name: str, graph: Path) -> nn.Module:
    try:
        module = model.get_submodule(name)
        module.get_parameter("weight")  # what is removed leaves a module without one
        return module
    except AttributeError as error:
        raise SenteiError(f"{graph} has a weight {name}, which the checkpoint has not.") from error
