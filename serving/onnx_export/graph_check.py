"""Whether a graph of ONNX is only a graph: it names nothing outside of its directory and no code.

A graph may name other files as its weights, a library's operators, and session options for ONNX Runtime. Weights are
not read here.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from serving.onnx_export.genai_config import BARE_NAME
from serving.onnx_export.members import member
from toolchain.errors import SenteiError
from toolchain.onnx_libraries import import_onnx_library

# The builder's graphs have less than 2 MB: their weights are in another file.
_MAX_GRAPH_BYTES = 64 * 1024 * 1024
_DOMAINS = ("", "ai.onnx", "com.microsoft")  # ONNX Runtime's own; operators of others come from a library
_LOOPS = ("Loop", "Scan", "SequenceMap")  # no decoder needs them
_SESSION_OPTIONS = "ort_config"  # the key under which ONNX Runtime looks for them in a graph
_LONGEST_NAME = 100
_UNTRUSTED = "Export the model again from its checkpoint."


def load_graph(directory: Path, filename: str) -> Any:
    """Reads a graph without its weights and checks it.

    Args:
        directory: The export.
        filename: Of the graph, in that directory.

    Returns:
        The ``onnx.ModelProto``.

    Raises:
        SenteiError: It is missing or damaged, or names something that it must not.
        MissingDependencyError: onnx is not installed.
    """
    onnx = import_onnx_library("onnx")
    path = member(directory, filename)
    if (size := path.stat().st_size) > _MAX_GRAPH_BYTES:
        raise SenteiError(
            f"{path} has {size:,} bytes; a graph may have {_MAX_GRAPH_BYTES:,}.",
            "Export the model again, with its weights in a file of their own.",
        )
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's, onnx's own and the system's errors have nothing in common
        raise SenteiError(f"{path} is damaged ({type(error).__name__}).", "Export the model again.") from error
    _refuse_code(model, path)
    for location in {entry.value for tensor in _tensors(model.graph) for entry in _locations(tensor)}:
        # What is not UTF-8 is bytes here.
        if not isinstance(location, str) or not re.fullmatch(BARE_NAME, location):
            raise SenteiError(f"{path}: weights in {_shown(location)} are not beside the graph.", _UNTRUSTED)
        member(directory, location)
    return model


def _refuse_code(model: Any, path: Path) -> None:
    if model.functions or model.training_info:
        raise SenteiError(f"{path} has functions of its own, which sentei does not know.", _UNTRUSTED)
    if _SESSION_OPTIONS in {each.key for each in model.metadata_props}:
        raise SenteiError(f"{path} brings session options ({_SESSION_OPTIONS}), which could run code.", _UNTRUSTED)
    for node in (node for graph in _graphs(model.graph) for node in graph.node):
        if node.op_type in _LOOPS:
            raise SenteiError(f"{path}: operator {node.op_type} could run for ever.", _UNTRUSTED)
        if node.domain not in _DOMAINS:
            raise SenteiError(
                f"{path}: operator {_shown(f'{node.domain}.{node.op_type}')} is not ONNX Runtime's own; a library "
                "would have to bring it.",
                _UNTRUSTED,
            )


def _graphs(graph: Any) -> Iterator[Any]:
    """A graph and those inside its nodes; without recursion, which a stranger's graph could exhaust."""
    waiting = [graph]
    while waiting:
        graph = waiting.pop()
        yield graph
        for attribute in (attribute for node in graph.node for attribute in node.attribute):
            waiting += [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]


def _tensors(graph: Any) -> Iterator[Any]:
    """Every tensor that could be stored in another file."""
    for each in _graphs(graph):
        sparse = list(each.sparse_initializer)
        yield from each.initializer
        for attribute in (attribute for node in each.node for attribute in node.attribute):
            yield from (attribute.t, *attribute.tensors)
            sparse += [attribute.sparse_tensor, *attribute.sparse_tensors]
        for tensor in sparse:
            yield from (tensor.values, tensor.indices)


def _locations(tensor: Any) -> Iterator[Any]:
    return (entry for entry in tensor.external_data if entry.key == "location")


def _shown(name: str | bytes) -> str:
    return ascii(name[:_LONGEST_NAME])
