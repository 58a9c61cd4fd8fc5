"""What can be said of a model without running it: sizes, bytes and operations per token, and the speed-up they promise.

The expectation is deliberately simple and every formula stands in the results: decode reads all weights and the KV
cache once a step; prefill does all matrix products once a prompt token.
"""

import hashlib
import math
import operator
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from serving.forecast.estimate_document import WindowRecord, kv_bytes
from serving.onnx_export.files import OnnxSettings, damaged, original_context, read_settings
from serving.onnx_export.graph_check import load_graph
from toolchain.architecture.layout import positive
from toolchain.checkpoint.directory import Checkpoint, dtype_name
from toolchain.checkpoint.quantized import QuantizedCheckpoint, open_servable
from toolchain.model.context_length import context_length
from toolchain.model.sliding_window import sliding_window
from toolchain.onnx_libraries import import_onnx_library

PREFILL_FORMULA = (
    "gain = FLOPs of the original / FLOPs of the pruned model for one prompt of input_len tokens; FLOPs = "
    "2 x block matrix parameters x input_len + 2 x head parameters x positions the engine computes logits for "
    "+ 4 x query width x pairs of tokens per attending layer (causal scores and values); pairs = input_len^2 / 2, less "
    "(input_len - window)^2 / 2 in layers with a shorter sliding window"
)
DECODE_FORMULA = (
    "gain = bytes read per step by the original / by the pruned model; bytes = all weights (the head's included, an "
    "untied embedding table left out: only its looked-up rows are read) + concurrency x KV bytes per token x "
    "(input_len + output_len / 2), or x the sliding window in layers that have a shorter one; holds where memory is "
    "the bound, at small batches"
)
END_TO_END_FORMULA = (
    "gain = E2EL / (TTFT / prefill gain + (E2EL - TTFT) / decode gain), with the original's measured medians"
)
# ONNX's numbers for its floating-point types.
_FLOATS: Mapping[int, str] = {1: "float32", 10: "float16", 16: "bfloat16"}
_DEFAULT_BITS = 4  # of MatMulNBits
# A block of vLLM's KV cache has so many tokens on CPUs, and fewer on GPUs.
_BLOCK_TOKENS = 128
_WEIGHT_FILES = (".safetensors", ".onnx", ".data")
SIZE_FORMULAS: Mapping[str, tuple[str, str]] = {
    "num_parameters": ("parameters", "all stored parameters; tied embeddings count once"),
    "weight_bytes": ("bytes", "all stored weight tensors"),
    "size_on_disk_bytes": ("bytes", "all files of the directory"),
    "kv_bytes_per_token": ("bytes", "2 x key-value heads x head_dim x bytes per element, summed over attending layers"),
}


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """One model as the engine runs it.

    Attributes:
        precision: Of the weights: ``float32``, ``bfloat16``, ``float16``, ``int8`` or ``int4`` of an ONNX export, or a
            scheme of ``sentei quantize``.
        num_parameters: All of them; ``None`` where packed weights hide the count.
        weight_bytes: Stored weights.
        size_on_disk_bytes: The whole directory.
        kv_bytes_per_token: Of one sequence, in all attending layers.
        vocab_size: Token ids go from 0 to one less.
        max_len: Longest sequence, in tokens, that the engine takes.
        decode_weight_bytes: Weights read by one decode step, in the dtype that is computed in.
        block_matrix_parameters: Parameters of the matrix products that see every token.
        head_parameters: Parameters of the product that gives logits.
        head_every_position: Whether prefill computes logits for every prompt token, not only for the last.
        attention_width: Query heads x head_dim, summed over attending layers.
        window: Tokens that layers with a sliding window attend to at most.
        sliding_share: Of the attending layers, those with a sliding window.
        original_len: With LongRoPE, the longest sequence with its short factors; 0 without.
    """

    precision: str
    num_parameters: int | None
    weight_bytes: int
    size_on_disk_bytes: int
    kv_bytes_per_token: int
    vocab_size: int
    max_len: int
    decode_weight_bytes: int
    block_matrix_parameters: int
    head_parameters: int
    head_every_position: bool
    attention_width: int
    window: int = 0
    sliding_share: Fraction = Fraction(0)
    original_len: int = 0

    @property
    def served_len(self) -> int:
        """Tokens of a request that a server takes where it is told nothing else, and for which it was verified."""
        return min(self.max_len, self.original_len or self.max_len)

    @property
    def sliding(self) -> WindowRecord | None:
        """What layers with a sliding window hold; ``None`` where all attending layers hold all tokens."""
        if not self.sliding_share:
            return None
        return WindowRecord(tokens=self.window, kv_bytes_per_token=int(self.kv_bytes_per_token * self.sliding_share))

    def prefill_flops(self, input_len: int) -> int:
        """Floating-point operations of one prompt; see :data:`PREFILL_FORMULA`."""
        positions = input_len if self.head_every_position else 1
        linear = 2 * self.block_matrix_parameters * input_len + 2 * self.head_parameters * positions
        outside = self.sliding_share * max(0, input_len - self.window) ** 2
        return linear + int(2 * (input_len**2 - outside) * self.attention_width)

    def decode_bytes(self, *, input_len: int, output_len: int, concurrency: int) -> int:
        """Bytes read by one decode step; see :data:`DECODE_FORMULA`."""
        return self.decode_weight_bytes + concurrency * self.kv_bytes(input_len + output_len // 2)

    def kv_bytes(self, context: int) -> int:
        """Bytes of the KV cache that one sequence of ``context`` tokens needs, and that its next token reads."""
        return int(kv_bytes(self.kv_bytes_per_token, self.sliding, context))

    def attended(self, context: int) -> Fraction:
        """Tokens of ``context`` that an attending layer attends to, on average over the layers."""
        return context - self.sliding_share * max(0, context - self.window)

    def kv_bytes_to_start(self, longest: int) -> int:
        """Bytes of KV cache with which vLLM starts, for requests of ``longest`` tokens at most: one has to fit.

        In whole blocks, with one more for a window that begins inside of a block. While a prompt is read, layers with a
        window may hold all of it; and layers of two kinds are divided into groups of one size, which are a third larger
        at most.
        """
        tokens = (-(-longest // _BLOCK_TOKENS) + 1) * _BLOCK_TOKENS
        num_bytes = tokens * self.kv_bytes_per_token
        return -(-4 * num_bytes // 3) if self.sliding_share else num_bytes

    def kv_tokens(self, num_bytes: int) -> int:
        """Tokens of one sequence whose KV cache fits into so many bytes; not for more than it takes at most."""
        within = num_bytes // self.kv_bytes_per_token
        if not self.sliding_share or within < self.window:
            return within
        beyond = num_bytes - self.kv_bytes_per_token * self.window
        return self.window + int(beyond / (self.kv_bytes_per_token * (1 - self.sliding_share)))


def checkpoint_facts(directory: Path, dtype: str | None) -> ModelFacts:
    """Facts of a model directory that Transformers or vLLM will run in ``dtype`` (its own by default).

    Raises:
        SenteiError: Not a good checkpoint.
    """
    return facts_of(open_servable(directory), dtype, size_on_disk_bytes=size_on_disk(directory))


def facts_of(checkpoint: Checkpoint | QuantizedCheckpoint, dtype: str | None, *, size_on_disk_bytes: int) -> ModelFacts:
    """Facts of an opened checkpoint; only names, shapes and dtypes of its tensors are looked at."""
    quantised = checkpoint if isinstance(checkpoint, QuantizedCheckpoint) else None
    computed_in: torch.dtype = getattr(torch, dtype) if dtype else checkpoint.dtype
    itemsize = computed_in.itemsize
    sizes = {name: math.prod(shape) for name, shape in checkpoint.shapes.items()}
    matrices = {name for name, shape in checkpoint.shapes.items() if len(shape) == 2}
    as_stored = quantised.parts if quantised else set()
    prefix = f"{checkpoint.family.layers}."
    head, unread = _head_and_embedding(checkpoint)
    query_width, kv_width = _attention_widths(checkpoint.config)
    attending = [layer.attention for layer in checkpoint.layout]
    num_attending, sliding = sum(attending), sliding_window(checkpoint.config)
    context = context_length(checkpoint.config)
    num_sliding = sum(map(operator.and_, attending, sliding.layers)) if sliding else 0
    return ModelFacts(
        precision=quantised.scheme.name if quantised else dtype_name(computed_in),
        num_parameters=sum(sizes.values()),
        weight_bytes=checkpoint.weight_bytes,
        size_on_disk_bytes=size_on_disk_bytes,
        kv_bytes_per_token=2 * kv_width * itemsize * num_attending,
        vocab_size=positive(checkpoint.config, "vocab_size"),
        max_len=context.servable,
        decode_weight_bytes=sum(
            info.nbytes if name in as_stored else itemsize * math.prod(info.shape)
            for name, info in checkpoint.tensors.items()
            if name not in unread
        ),
        block_matrix_parameters=sum(sizes[name] for name in matrices if name.startswith(prefix)),
        head_parameters=sizes[head],
        head_every_position=False,
        attention_width=query_width * num_attending,
        window=sliding.tokens if sliding and num_sliding else 0,
        sliding_share=Fraction(num_sliding, num_attending or 1),
        original_len=context.original,
    )


def _head_and_embedding(checkpoint: Checkpoint | QuantizedCheckpoint) -> tuple[str, set[str]]:
    """The tensor that gives logits, and those a decode step does not read whole."""
    embedding = "model.embed_tokens.weight"
    if checkpoint.config.get("tie_word_embeddings", False) or "lm_head.weight" not in checkpoint.tensors:
        return embedding, set()
    return "lm_head.weight", {embedding}


def _attention_widths(config: Mapping[str, Any]) -> tuple[int, int]:
    heads = positive(config, "num_attention_heads")
    head_dim = config.get("head_dim") or positive(config, "hidden_size") // heads
    return heads * head_dim, (config.get("num_key_value_heads") or heads) * head_dim


def onnx_facts(directory: Path) -> ModelFacts:
    """Facts of an ONNX export, read from its graph and ``genai_config.json``; weights stay on disk.

    Raises:
        SenteiError: Not an export, or a damaged one.
        MissingDependencyError: onnx is not installed.
    """
    return facts_of_export(directory, read_settings(directory))


def facts_of_export(directory: Path, settings: OnnxSettings) -> ModelFacts:
    """Facts of an ONNX export whose settings were read; see :func:`onnx_facts`."""
    model = load_graph(directory, settings.filename)
    graph = model.graph
    try:
        counts = _OnnxCounts(import_onnx_library("onnx"), graph)
        caches = [value for value in graph.input if value.name.startswith("past_key_values.")]
        kv_itemsize = getattr(torch, _FLOATS[caches[0].type.tensor_type.elem_type]).itemsize if caches else 0
    except (LookupError, ValueError, TypeError, StopIteration) as error:  # valid ONNX, and no decoder
        raise damaged(directory, error) from error
    num_attending = len(caches) // 2
    return ModelFacts(
        precision=counts.precision,
        num_parameters=counts.num_parameters,
        weight_bytes=counts.weight_bytes,
        size_on_disk_bytes=size_on_disk(directory),
        kv_bytes_per_token=settings.num_key_value_heads * settings.head_size * kv_itemsize * len(caches),
        vocab_size=settings.vocab_size,
        max_len=settings.context_length,
        decode_weight_bytes=counts.decode_bytes,
        block_matrix_parameters=counts.matrix_parameters - counts.head_parameters,
        head_parameters=counts.head_parameters,
        head_every_position=counts.head_every_position,
        attention_width=settings.num_attention_heads * settings.head_size * num_attending,
        original_len=original_context(directory, {each.key: each.value for each in model.metadata_props}),
    )


class _OnnxCounts:
    """Walks a decoder's graph once: which weights are multiplied with, which are only looked up."""

    def __init__(self, onnx: Any, graph: Any) -> None:
        self.num_parameters: int | None = 0
        self.weight_bytes = self.decode_bytes = self.matrix_parameters = self.head_parameters = 0
        sizes = {tensor.name: math.prod(tensor.dims) for tensor in graph.initializer}
        nbytes = {t.name: sizes[t.name] * _bits(onnx, t.data_type) // 8 for t in graph.initializer}
        self.weight_bytes = sum(nbytes.values())
        read = set()
        for node in graph.node:
            # Gather reads rows; the rotary tables (inputs of GroupQueryAttention) are read by position.
            if node.op_type not in ("Gather", "GatherBlockQuantized", "GroupQueryAttention"):
                read |= {name for name in node.input if name in sizes}
            parameters = _matrix_parameters(node, sizes)
            self.matrix_parameters += parameters
            if parameters and "lm_head" in node.name:
                self.head_parameters = parameters
        self.decode_bytes = sum(nbytes[name] for name in read)
        packed_bits = _packed_bits(graph, sizes)
        tables = {name for name in sizes if name.startswith(("cos_cache", "sin_cache"))}
        floats = {t.name: _FLOATS[t.data_type] for t in graph.initializer if t.data_type in _FLOATS}
        largest = max(floats.keys() - tables, key=lambda name: sizes[name])
        self.precision = f"int{packed_bits}" if packed_bits else floats[largest]
        self.num_parameters = None if packed_bits else sum(sizes[name] for name in floats.keys() - tables)
        logits = next(value for value in graph.output if value.name == "logits")
        self.head_every_position = logits.type.tensor_type.shape.dim[1].dim_value != 1


def _packed_bits(graph: Any, sizes: Mapping[str, int]) -> int | None:
    """The bits that most packed parameters have: int4 exports keep the head and some matrices in 8."""
    parameters: Counter[int] = Counter()
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            bits = next((attribute.i for attribute in node.attribute if attribute.name == "bits"), _DEFAULT_BITS)
            # A head counts only where nothing else is packed.
            parameters[bits] += 0 if "lm_head" in node.name else _matrix_parameters(node, sizes)
    return parameters.most_common(1)[0][0] if parameters else None


def _matrix_parameters(node: Any, sizes: Mapping[str, int]) -> int:
    if node.op_type == "MatMulNBits":
        shape = {attribute.name: attribute.i for attribute in node.attribute}
        return shape["K"] * shape["N"]
    if node.op_type in ("MatMul", "Gemm") and node.input[1] in sizes:
        return sizes[node.input[1]]
    return 0


def _bits(onnx: Any, data_type: int) -> int:
    if data_type in (onnx.TensorProto.UINT4, onnx.TensorProto.INT4):
        return 4
    return 8 * int(onnx.helper.tensor_dtype_to_np_dtype(data_type).itemsize)


def size_on_disk(directory: Path) -> int:
    """Bytes of all files below a directory."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def files_sha256(directory: Path) -> str:
    """SHA-256 over the names and bytes of a directory's weight files: safetensors, or an ONNX graph with its data."""
    digest = hashlib.sha256()
    for path in sorted(path for path in directory.iterdir() if path.suffix in _WEIGHT_FILES and path.is_file()):
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def compare_sizes(original: ModelFacts, pruned: ModelFacts | None) -> dict[str, dict[str, Any]]:
    """The sizes of both models side by side, each with its unit, formula and ratio pruned/original."""
    return {
        name: size_entry(getattr(original, name), getattr(pruned, name, None), unit=unit, formula=formula)
        for name, (unit, formula) in SIZE_FORMULAS.items()
    }


def size_entry(original: float | None, pruned: float | None, *, unit: str, formula: str) -> dict[str, Any]:
    """One line of the table of sizes; unknown is null."""
    ratio = pruned / original if original and pruned is not None else None
    return {"unit": unit, "formula": formula, "original": original, "pruned": pruned, "ratio": ratio}


def expected_gains(
    original: ModelFacts,
    pruned: ModelFacts,
    *,
    input_len: int,
    output_len: int,
    concurrency: int,
    original_medians: Mapping[str, float | None],
) -> dict[str, dict[str, Any]]:
    """The speed-up that parameters alone promise, by metric; above 1 is faster.

    Args:
        original: Facts of the unpruned model.
        pruned: Facts of the pruned model.
        input_len: Prompt tokens.
        output_len: Output tokens.
        concurrency: Sequences decoded together.
        original_medians: The original's measured medians, which say how much of a request is prefill.
    """
    flops = [model.prefill_flops(input_len) for model in (original, pruned)]
    shape = {"input_len": input_len, "output_len": output_len, "concurrency": concurrency}
    read = [model.decode_bytes(**shape) for model in (original, pruned)]
    prefill, decode = flops[0] / flops[1], read[0] / read[1]
    expected = {
        "mean_ttft_ms": {
            "phase": "prefill", "gain": prefill, "formula": PREFILL_FORMULA, "original_flops": flops[0],
            "pruned_flops": flops[1],
        },
        "mean_tpot_ms": {
            "phase": "decode", "gain": decode, "formula": DECODE_FORMULA, "original_bytes": read[0],
            "pruned_bytes": read[1],
        },
    }  # fmt: skip
    ttft, e2el = original_medians["mean_ttft_ms"], original_medians["mean_e2el_ms"]
    if ttft and e2el:
        gain = e2el / (ttft / prefill + (e2el - ttft) / decode)
        for name in ("mean_e2el_ms", "output_throughput", "total_token_throughput"):
            expected[name] = {"phase": "prefill and decode", "gain": gain, "formula": END_TO_END_FORMULA}
    return expected
