"""The weights inside an ONNX export, compared with the checkpoint's, and rounded ones read back as what they stand for.

The vendor's builder stores a matrix as ``[in, out]``, stacks the projections of an attention into one, keeps those of
an FFN apart, and leaves out biases that are all zero.
"""

import functools
import importlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from serving.onnx_export.graph_check import load_graph
from serving.verify.rounded import HEAD, RoundedMatrices, source_weight
from toolchain.checkpoint.directory import Checkpoint, same_bits
from toolchain.errors import SenteiError
from toolchain.onnx_libraries import import_onnx_library

_PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_FLOATS = {1: torch.float32, 10: torch.float16, 16: torch.bfloat16}  # onnx.TensorProto's numbers
_HEAD, _EMBEDDING = "lm_head", "model.embed_tokens"
_INT8_INPUTS = 4  # an accuracy_level of ONNX Runtime's MatMulNBits
_WEIGHT = re.compile(r"(?P<module>(model|lm_head)\b.*?)(?P<kind>\.MatMul\.weight|\.Add\.bias|\.weight)")


class OnnxWeights:
    """The weights of an export beside those of the checkpoint it was made from; the graph's are in memory."""

    def __init__(self, source: Checkpoint, graph: Path) -> None:
        """Reads the graph.

        Args:
            source: The checkpoint.
            graph: ``model.onnx``, its external weights beside it.

        Raises:
            SenteiError: It cannot be read.
            MissingDependencyError: onnx is not installed.
        """
        self._source, self._graph = source, graph
        self._proto = _load(graph)
        self._modules = {name.rpartition(".")[0] for name in source.tensors}
        if source.config.get("tie_word_embeddings", False):
            self._modules.add(_HEAD)

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in: that of the KV cache."""
        kinds = [each.type.tensor_type.elem_type for each in self._proto.graph.input if each.name.startswith("past")]
        return _FLOATS[kinds[0]] if kinds else torch.float32

    def count_differing(self) -> int:
        """Counts the unrounded weights of the export that are not the source's, cast, and the source's that it lacks.

        Raises:
            SenteiError: The graph has a weight that the source has not.
        """
        differing = 0
        seen: set[str] = set()
        for tensor in self._proto.graph.initializer:
            match = _WEIGHT.fullmatch(tensor.name)
            if match is None or tensor.data_type not in _FLOATS:
                continue
            found = _torch_tensor(tensor)
            expected, names = self._source_tensor(match["module"], match["kind"])
            seen |= names
            if found.shape != expected.shape or not same_bits(found, expected.to(found.dtype)):
                differing += 1
        for node in self._rounding_nodes():
            seen |= {f"{module}.weight" for module, _ in self._rows(_matrix_name(node))}
        if self._source.config.get("tie_word_embeddings", False):
            seen |= {HEAD, f"{_EMBEDDING}.weight"}
        return differing + sum(bool(self._source.read(name).any()) for name in set(self._source.tensors) - seen)

    def rounded_matrices(self, *, on_cpu: bool = True) -> RoundedMatrices | None:
        """What the export rounded, ``None`` if nothing; matrices are computed when they are asked for.

        Args:
            on_cpu: Where the graph runs; there what goes into a matrix may be rounded too.

        Raises:
            SenteiError: The matrices are not those of the source.
        """
        parts: dict[str, list[tuple[slice, slice, Any]]] = {}
        for node in self._rounding_nodes():
            name, start = _matrix_name(node), 0
            settings = _settings(node)
            for module, rows in self._rows(name):
                out, width = self._shape(module)
                num_rows = len(range(*rows.indices(out)))
                if width != settings["K"]:
                    raise self._does_not_fit(name, node, module)
                parts.setdefault(f"{module}.weight", []).append((rows, slice(start, start + num_rows), node))
                start += num_rows
            if start != settings["N"]:
                raise self._does_not_fit(name, node, module)
        if not parts:
            return None
        stored = {each.name: each for each in self._proto.graph.initializer}

        def matrix(name: str) -> torch.Tensor:
            whole = source_weight(self._source, name).float()
            for rows, own, node in parts[name]:
                whole[rows] = _dequantised(node, stored)[own]
            return whole

        rounds = on_cpu and {_settings(node).get("accuracy_level") for node in self._rounding_nodes()} == {_INT8_INPUTS}
        blocks = {_settings(node)["block_size"] for node in self._rounding_nodes()}
        return RoundedMatrices(
            where=str(self._graph),
            shapes={name: self._shape(name.removesuffix(".weight")) for name in parts},
            formats={name: f"int{_settings(some[0][2])['bits']}" for name, some in parts.items()},
            matrix=matrix,
            round_inputs=functools.partial(round_inputs, block=max(blocks)) if rounds else None,
            embeds_with_head=any(node.op_type == "GatherBlockQuantized" for node in self._proto.graph.node),
        )

    def _does_not_fit(self, name: str, node: Any, module: str) -> SenteiError:
        settings = _settings(node)
        return SenteiError(
            f"{self._graph}: {name} has shape [{settings['N']}, {settings['K']}], which does not fit the checkpoint's "
            f"{module} {list(self._shape(module))}."
        )

    def _rounding_nodes(self) -> Iterator[Any]:
        return (node for node in self._proto.graph.node if node.op_type == "MatMulNBits")

    def _shape(self, module: str) -> tuple[int, int]:
        name = f"{module}.weight"
        shape = self._source.tensors[f"{_EMBEDDING}.weight" if self._is_tied(name) else name].shape
        return shape[0], shape[1]

    def _is_tied(self, name: str) -> bool:
        return name == HEAD and HEAD not in self._source.tensors

    def _source_tensor(self, module: str, kind: str) -> tuple[torch.Tensor, set[str]]:
        """What a graph's tensor should be, float32, and the weights it is made of."""
        word = {".MatMul.weight": "weight", ".Add.bias": "bias"}.get(kind)
        if word is not None:
            rows = self._rows(_module_name(module))
            names = [f"{name}.{word}" for name, _ in rows]
            parts = [self._read(name)[part] for name, (_, part) in zip(names, rows, strict=True)]
            return (torch.cat(parts).T if word == "weight" else torch.cat(parts)), set(names)
        if module == _EMBEDDING:
            return self._read(f"{module}.weight"), {f"{module}.weight"}
        name = _module_name(module).replace("_norm.layernorm", "_norm")
        if name.endswith(".final_norm_layernorm"):
            name = self._source.family.final_norm
        return self._read(f"{name}.weight") + self._source.family.norm_offset, {f"{name}.weight"}

    def _read(self, name: str) -> torch.Tensor:
        if name not in self._source.tensors and not self._is_tied(name):
            raise SenteiError(f"{self._graph} has a weight {name}, which the checkpoint has not.")
        return source_weight(self._source, name).float()

    def _rows(self, name: str) -> list[tuple[str, slice]]:
        """The modules, and which of their rows, that a matrix of the graph stacks."""
        if name in self._modules:
            return [(name, slice(None))]
        parent, _, last = name.rpartition(".")
        if last in _PARTS:
            parts = [f"{parent}.{part}" for part in _PARTS[last]]
            if all(part in self._modules for part in parts):
                return [(part, slice(None)) for part in parts]
        fused = f"{parent}.gate_up_proj"
        if last in _PARTS["gate_up_proj"] and fused in self._modules:
            width = self._shape(fused)[0] // 2
            start = width * _PARTS["gate_up_proj"].index(last)
            return [(fused, slice(start, start + width))]
        raise SenteiError(f"{self._graph} has a matrix {name}, which the checkpoint has not.")


def round_inputs(inputs: torch.Tensor, block: int) -> torch.Tensor:
    """Rounds what goes into a matrix as ONNX Runtime does on a CPU where accuracy_level is 4: int8, block by block.

    Args:
        inputs: ``[..., in]``; rounded in float32, and returned in their own dtype.
        block: How many inputs share a scale.
    """
    width = inputs.shape[-1]
    blocks = torch.nn.functional.pad(inputs.float(), (0, -width % block)).unflatten(-1, (-1, block))
    scale = blocks.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return ((blocks / scale).round() * scale).flatten(-2)[..., :width].to(inputs.dtype)


def _module_name(name: str) -> str:
    return name.replace(".attn.", ".self_attn.")


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


def _matrix_name(node: Any) -> str:
    return _module_name(node.input[1].partition(".MatMul")[0])


def _settings(node: Any) -> dict[str, int]:
    return {attribute.name: attribute.i for attribute in node.attribute}


def _dequantised(node: Any, stored: Mapping[str, Any]) -> torch.Tensor:
    """What a ``MatMulNBits`` takes its weights for: float32 ``[out, in]``."""
    numpy_helper: Any = importlib.import_module("onnx.numpy_helper")
    settings = _settings(node)
    packed, scales, *zero_points = (numpy_helper.to_array(stored[name]) for name in node.input[1:] if name)
    matrix = dequantise(
        packed,
        scales,
        zero_points[0] if zero_points else None,
        bits=settings["bits"],
        shape=(settings["N"], settings["K"]),
    )
    return torch.from_numpy(matrix)


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
