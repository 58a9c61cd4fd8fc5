"""onnxruntime-genai's model builders, taught that layers differ. The only module that touches them.

The builder is a command-line tool, not a promised API: its version is pinned in ``pyproject.toml``, and what is relied
upon is covered by ``tests/export``. Importing this module needs the ``onnx`` extra.

How the builder chains layers: a submodule (attention or FFN) does not add its output to the residual stream; the *next*
norm does, fused (``SkipSimplifiedLayerNormalization``). ``layernorm_attrs`` holds the stream (``root_input``) and what
is still to be added to it (``skip_input``). A removed submodule goes with its norms, so leaving them out keeps the
chain whole, except that the first norm of all, whichever it now is, has nothing to add.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import toolchain.onnx_libraries  # noqa: F401  (before what loads onnxruntime: it switches telemetry off)

# isort: split
import onnx_ir as ir
import torch
from onnxruntime_genai.models.builders.base import Model
from onnxruntime_genai.models.builders.gemma import Gemma3Model
from onnxruntime_genai.models.builders.granite import GraniteModel
from onnxruntime_genai.models.builders.llama import LlamaModel
from onnxruntime_genai.models.builders.mistral import MistralModel
from onnxruntime_genai.models.builders.phi import Phi3MiniLongRoPEModel, Phi3MiniModel
from onnxruntime_genai.models.builders.qwen import Qwen3Model, QwenModel
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from toolchain.architecture.families import FAMILIES, Family
from toolchain.architecture.layout import LayerLayout
from toolchain.errors import SenteiError
from toolchain.model.loading import RemovedAttention, RemovedFFN

Precision = Literal["fp32", "fp16", "bf16", "int8", "int4"]
Device = Literal["cpu", "cuda"]

# What each device computes in: ONNX Runtime's GroupQueryAttention, at the vendor builder's own choice of types.
PRECISIONS: Mapping[str, tuple[str, ...]] = {"cpu": ("fp32", "int8", "int4"), "cuda": ("fp16", "bf16", "int8", "int4")}
_DTYPES = {
    "fp32": ir.DataType.FLOAT,
    "fp16": ir.DataType.FLOAT16,
    "bf16": ir.DataType.BFLOAT16,
    "int8": ir.DataType.INT8,
    "int4": ir.DataType.INT4,
}
# The head and the most sensitive matrices (llama.cpp's choice of layers) in int8, the rest in int4 in blocks of 32. On
# the demo model, against float32: KL divergence 0.17 nats a token and 110 MB; everything in int4: 0.33 nats and 86 MB.
_INT4_OPTIONS = {"matmul_mixed_precision": "last_matmul:int8,mixed_layers:int8"}
_HEAD_DIM_MULTIPLE = 16  # of GroupQueryAttention with rotary embedding inside
_CACHES = ("past_key_values.key", "past_key_values.value"), ("present.key", "present.value")
_KEY, _VALUE = _CACHES[0]


def check_supported(config: PreTrainedConfig, precision: Precision, device: Device) -> None:
    """Refuses, before weights are loaded, what builder and runtime would get wrong or stumble over later.

    Raises:
        SenteiError: A precision that the device has not, or a family, head size or attention that they do not know.
    """
    if precision not in PRECISIONS[device]:
        raise SenteiError(
            f"ONNX Runtime has no {precision} attention with KV cache on {device}; it has "
            f"{', '.join(PRECISIONS[device])} there.",
            f"Use --precision {PRECISIONS[device][0]}, or another --device.",
        )
    if config.model_type not in _BUILDERS:
        raise SenteiError(
            f"config.json: ONNX export does not support model_type {config.model_type!r}, only {', '.join(_BUILDERS)}.",
            "Export to vLLM instead.",
        )
    if _rope_types(config) & {"longrope"} and config.model_type != "phi3":
        raise SenteiError(
            f"config.json: ONNX export supports rope_type 'longrope' in phi3 only, not in {config.model_type}.",
            "Export to vLLM instead.",
        )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head_dim % _HEAD_DIM_MULTIPLE:
        raise SenteiError(
            f"config.json: head_dim is {head_dim}; ONNX Runtime's attention needs a multiple of {_HEAD_DIM_MULTIPLE}.",
            "Export to vLLM instead.",
        )
    if getattr(config, "use_bidirectional_attention", None):
        raise SenteiError(
            "config.json: use_bidirectional_attention is set; ONNX Runtime's attention looks back only.",
            "Export to vLLM instead.",
        )
    if config.model_type == "gemma3_text" and precision == "fp16":
        raise SenteiError(
            "Gemma 3 leaves the range of float16 (the vendor's builder warns of it).",
            "Use --precision bf16, or int4, which then computes in bfloat16.",
        )


class PrunedBuilder(Model):
    """Builds the graph of a model whose layers may lack attention or FFN and differ in width.

    Stands before one of the vendor's builders in the order of inheritance.
    """

    model: ir.Model  # the vendor's name for the graph
    residual_scale = 1.0

    def __init__(
        self,
        config: PreTrainedConfig,
        model: PreTrainedModel,
        layout: tuple[LayerLayout, ...],
        *,
        precision: Precision,
        device: Device,
        temporary: str,
    ) -> None:
        """Prepares the builder.

        Args:
            config: The model's config without ``per_layer_config``; is changed.
            model: The loaded model, pruned or not; is changed.
            layout: One entry a layer.
            precision: Of the matrices.
            device: Where the graph is to run.
            temporary: A directory for the builder's own use.
        """
        self._model = model
        self._family: Family = FAMILIES[config.model_type]
        quantised = precision in ("int8", "int4")
        if getattr(config, "layer_types", None) is None and getattr(config, "sliding_window", None):
            config.layer_types = ["sliding_attention"] * config.num_hidden_layers  # Mistral and Phi-3 do not say it
        options: dict[str, Any] = dict(_INT4_OPTIONS) if precision == "int4" else {}
        if (getattr(config, "sliding_window", None) or 0) >= config.max_position_embeddings:
            # The runtimes refuse a cache of less than one window, and a window as long as the context hides nothing.
            options["windowed_kv_cache"] = False
        super().__init__(
            config,
            _activations(config, precision, device),
            _DTYPES[precision],
            device,
            temporary,
            options,
        )
        self.model_type = config.model_type  # as genai spells it too
        # A tied embedding is stored once. The builder's own option for it cannot be had with an int8 head.
        self.tied_quantized_embeddings = quantised and config.tie_word_embeddings
        self.tied_unquantized_embeddings = not quantised and config.tie_word_embeddings
        # Removed layers keep their numbers: genai finds cache inputs by name and accepts gaps.
        for names, kinds in zip((self.input_names, self.output_names), _CACHES, strict=True):
            for kind in kinds:
                names[kind] = {layer: name for layer, name in names[kind].items() if layout[layer].attention}

    def make_rope_init(self, config: PreTrainedConfig) -> None:
        """Nothing to read: the rotary tables are the model's own."""

    def make_rotary_embedding_caches_from_scratch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotary tables as Transformers computes them, of whatever kind: float32 ``[1, positions, rotary size]``."""
        return self.rotary_tables()

    def rotary_tables(self, *layer_type: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines for all positions of the table that is being made."""
        positions = torch.arange(self.rope_attrs["cache_length"])[None]
        return self._model.base_model.rotary_emb(torch.zeros(1), positions, *layer_type)

    def load_weights(self, input_path: str) -> PreTrainedModel:
        """Hands over the model that is already loaded, norms and biases in float32: some are still added to."""
        for parameter in self._model.parameters():
            if parameter.ndim == 1:
                parameter.data = parameter.data.float()
        return self._model

    def has_lm_head(self, module: nn.Module) -> bool:
        """Tells the head by identity; the builder's test takes any projection as wide as the vocabulary."""
        return module is self._model.get_output_embeddings()

    def make_layer(self, layer_id: int, layer: nn.Module) -> None:
        """Makes of a layer what is left of it: attention and FFN, each with the norms that the family gives it."""
        attention, ffn = layer.get_submodule(self._family.attention), layer.get_submodule(self._family.ffn)
        if not isinstance(attention, RemovedAttention):
            before, *after = self._family.attention_norms
            self._make_norm(layer_id, layer, before)
            self.make_attention(layer_id, attention, root_input=self.layernorm_attrs["output_0"])
            self._finish_branch(layer_id, layer, after, "attn")
        if not isinstance(ffn, RemovedFFN):
            before, *after = self._family.ffn_norms
            self._make_norm(layer_id, layer, before)
            self.intermediate_size = ffn.get_submodule("down_proj").in_features
            self.make_mlp(layer_id, ffn, root_input=self.layernorm_attrs["output_0"])
            self._finish_branch(layer_id, layer, after, "mlp")
        self.layernorm_attrs["last_layernorm"] = layer_id == self.num_layers - 1

    def make_layernorm(self, layer_id: int, layernorm: nn.Module, skip: bool, simple: bool, location: str) -> None:
        """Makes a norm; the first one made has nothing to add to the stream."""
        skip = skip and not self.layernorm_attrs["first_layernorm"]
        super().make_layernorm(layer_id, layernorm, skip, simple, location)
        self.layernorm_attrs["first_layernorm"] = False

    def _make_norm(self, layer_id: int, layer: nn.Module, name: str, *, skip: bool = True) -> None:
        self.make_layernorm(layer_id, layer.get_submodule(name), skip, True, name.removesuffix("_layernorm"))

    def _finish_branch(self, layer_id: int, layer: nn.Module, norms: list[str], branch: str) -> None:
        """What some families do to the output of attention or FFN before it is added to the stream."""
        attrs = self.layernorm_attrs
        for name in norms:
            stream, cast = attrs["root_input"], attrs["cast"]["output_0"]
            attrs["root_input"], attrs["cast"]["output_0"] = attrs["skip_input"], False
            self._make_norm(layer_id, layer, name, skip=False)
            attrs["root_input"], attrs["skip_input"] = stream, attrs["output_0"]
            attrs["cast"]["output_0"] = cast
        if self.residual_scale != 1.0:
            name = f"/model/layers.{layer_id}/{branch}/residual/Mul"
            factor = f"/model/constants/{self.to_str_dtype(self.io_dtype)}/{self.residual_scale}"
            self.make_mul(name, [attrs["skip_input"], factor], self.io_dtype, self.make_hidden_state_shape())
            attrs["skip_input"] = f"{name}/output_0"

    def make_tied_quantized_embedding_input_names(self) -> tuple[int, str, str, str]:
        """Names the quantised head that the embedding shares; the builder's are wrong for an int8 head."""
        return 8, "lm_head.MatMul.weight_Q8", "lm_head.MatMul.weight_scales", ""

    def update_genai_config(self, genai_config: dict[str, Any]) -> None:
        """Takes layers without attention out of the list of those with a short cache."""
        super().update_genai_config(genai_config)
        if window := genai_config["model"]["decoder"].get("sliding_window"):
            window["layers"] = [layer for layer in window["layers"] if layer in self.input_names[_KEY]]
            if not window["layers"]:
                del genai_config["model"]["decoder"]["sliding_window"]

    def to_nbits(self) -> ir.Model:
        """Quantises one matrix after another.

        The vendor's pass turns the whole graph into a protobuf message first, which takes more than twice the weights
        in float32 (docs/decisions/onnx-size.md); here it gets a graph of one product at a time.
        """
        whole: ir.Model = self.model
        for node in [node for node in whole.graph if node.op_type in self.quant_attrs["op_types_to_quantize"]]:
            data, matrix = [value for value in node.inputs if value is not None]
            self.model = _product(node, data, matrix, whole)
            (quantised,) = super().to_nbits().graph
            self._replace(node, quantised, whole.graph)
            del whole.graph.initializers[str(matrix.name)]
        self.model = whole
        return whole

    def _replace(self, node: ir.Node, quantised: ir.Node, graph: ir.Graph) -> None:
        """Puts what ``node`` has become, in a graph of its own, in its place."""
        inputs = [node.inputs[0]]
        for source in quantised.inputs[1:]:
            assert source is not None and source.const_value is not None
            # A copy: an array out of a protobuf message keeps all of the message, the float32 matrix too.
            tensor = ir.Tensor(source.const_value.numpy().copy(), name=source.name)
            value = self.make_value(tensor.name, tensor.dtype, tensor.shape)
            value.const_value = tensor
            graph.register_initializer(value)
            inputs.append(value)
        new = ir.node(quantised.op_type, inputs, quantised.attributes, domain=quantised.domain, name=quantised.name)
        ir.convenience.replace_nodes_and_values(graph, node, [node], [new], node.outputs, new.outputs)

    def save(self, out: Path, metadata: Mapping[str, str]) -> None:
        """Saves the graph and one file of weights, as the builder does, without its progress bar.

        Args:
            out: The directory.
            metadata: Goes into the model's ``metadata_props``.
        """
        model = self.to_nbits() if self.onnx_dtype in (ir.DataType.INT8, ir.DataType.INT4) else self.model
        model.graph.sort()
        # Not the builder's own stamp: it adds the commit of whatever git checkout it happens to be installed in.
        model.producer_version = self.get_genai_version()
        model.metadata_props.update(metadata)
        ir.save(model, out / self.filename, external_data=f"{self.filename}.data", size_threshold_bytes=0)


class _Llama(PrunedBuilder, LlamaModel):
    pass


class _Mistral(PrunedBuilder, MistralModel):
    pass


class _Qwen2(PrunedBuilder, QwenModel):
    pass


class _Qwen3(PrunedBuilder, Qwen3Model):
    pass


class _Phi3(PrunedBuilder, Phi3MiniModel):
    pass


class _Phi3LongRope(PrunedBuilder, Phi3MiniLongRoPEModel):
    """With two rotary tables, one for sequences within the original context."""

    def make_rope_init(self, config: PreTrainedConfig) -> None:
        # Two tables; how they are scaled is the model's own affair.
        keys = "short_factor", "long_factor", "short_mscale", "long_mscale"
        self.rope_attrs["multi_cache"] = dict.fromkeys(keys, 1)

    def save(self, out: Path, metadata: Mapping[str, str]) -> None:
        # Who decodes several sequences together must know where the whole batch changes tables.
        super().save(out, {**metadata, "sentei.original_context_length": str(self.original_context_length)})


class _Granite(PrunedBuilder, GraniteModel):
    pass


class _Gemma3(PrunedBuilder, Gemma3Model):
    """With a rotary table for each kind of layer."""

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        config.rope_local_base_freq = None  # the vendor's builder looks for it
        super().__init__(config, *args, **kwargs)
        # The vendor rounds it to two decimals.
        self.embed_attrs["scale"] = self.hidden_size**0.5

    def make_rotary_embedding_multi_cache(self) -> None:
        for kind, table in (("full_attention", "global"), ("sliding_attention", "local")):
            names = f"cos_cache_{table}", f"sin_cache_{table}"
            setattr(self, f"cos_cache_{table}_name", names[0])
            setattr(self, f"sin_cache_{table}_name", names[1])
            if kind in self.layer_types:
                self.rope_attrs["create_caches"], self._kind = True, kind
                Model.make_rotary_embedding_caches(self, cos_cache_name=names[0], sin_cache_name=names[1])

    def make_rotary_embedding_caches_from_scratch(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.rotary_tables(self._kind)


_BUILDERS: Mapping[str, type[PrunedBuilder]] = {
    "llama": _Llama,
    "mistral": _Mistral,
    "qwen2": _Qwen2,
    "qwen3": _Qwen3,
    "phi3": _Phi3,
    "granite": _Granite,
    "gemma3_text": _Gemma3,
}


def _rope_types(config: PreTrainedConfig) -> set[str]:
    """Of all kinds of layers; Gemma 3 has a rotary embedding for each."""
    parameters = config.rope_parameters
    each = [parameters] if "rope_type" in parameters else parameters.values()
    return {kind["rope_type"] for kind in each}


def builder_class(config: PreTrainedConfig) -> type[PrunedBuilder]:
    """The builder of a supported model."""
    if config.model_type == "phi3" and config.rope_parameters["rope_type"] == "longrope":
        return _Phi3LongRope
    return _BUILDERS[config.model_type]


def _product(node: ir.Node, data: ir.Value, matrix: ir.Value, model: ir.Model) -> ir.Model:
    """A model of this one matrix product."""
    data, matrix = ir.Value(name=data.name), ir.Value(name=matrix.name, const_value=matrix.const_value)
    product = ir.node(node.op_type, [data, matrix], outputs=[ir.Value(name=node.outputs[0].name)], name=node.name)
    graph = ir.Graph(
        [data], product.outputs, nodes=[product], initializers=[matrix], opset_imports=model.graph.opset_imports
    )
    return ir.Model(graph, ir_version=model.ir_version)


def _activations(config: PreTrainedConfig, precision: Precision, device: Device) -> ir.DataType:
    if device == "cpu":
        return ir.DataType.FLOAT
    if precision == "bf16" or config.model_type == "gemma3_text":
        return ir.DataType.BFLOAT16
    return ir.DataType.FLOAT16
