"""onnxruntime-genai's Llama builder, taught that layers differ. The only module that touches that builder.

The builder is a command-line tool, not a promised API: its version is pinned in ``pyproject.toml``, and what is relied
upon is covered by ``tests/export``. Importing this module needs the ``onnx`` extra.

How the builder chains layers: a submodule (attention or FFN) does not add its output to the residual stream; the *next*
norm does, fused (``SkipSimplifiedLayerNormalization``). ``layernorm_attrs`` holds the stream (``root_input``) and what
is still to be added to it (``skip_input``). A removed submodule goes with its norm, so leaving both out keeps the chain
whole, except that the first norm of all, whichever it now is, has nothing to add.
"""

from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnxruntime_genai.models.builders.base import Model
from onnxruntime_genai.models.builders.llama import LlamaModel
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from toolchain.errors import SenteiError
from toolchain.layout import LayerLayout
from toolchain.modeling import RemovedAttention, RemovedFFN

# The head and the most sensitive matrices (llama.cpp's choice of layers) in int8, the rest in int4 in blocks of 32. On
# the demo model, against float32: KL divergence 0.17 nats a token and 110 MB; everything in int4: 0.33 nats and 86 MB.
_INT4_OPTIONS = {"matmul_mixed_precision": "last_matmul:int8,mixed_layers:int8"}
_MODEL_TYPES = ("llama",)
_ROPE_TYPES = ("default", "linear", "llama3")
_HEAD_DIM_MULTIPLE = 16  # of GroupQueryAttention with rotary embedding inside
_CACHES = ("past_key_values.key", "past_key_values.value"), ("present.key", "present.value")


def check_supported(config: PreTrainedConfig) -> None:
    """Refuses, before weights are loaded, what builder and runtime would get wrong or stumble over later.

    Raises:
        SenteiError: Another family, rotary scaling or head size than they know.
    """
    if config.model_type not in _MODEL_TYPES:
        raise SenteiError(
            f"config.json: ONNX export does not support model_type {config.model_type!r}, only "
            f"{', '.join(_MODEL_TYPES)}.",
            "Export to vLLM instead.",
        )
    kind = config.rope_parameters["rope_type"]
    if kind not in _ROPE_TYPES:
        raise SenteiError(
            f"config.json: ONNX export does not support rope_type {kind!r}, only {', '.join(_ROPE_TYPES)}.",
            "Export to vLLM instead.",
        )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head_dim % _HEAD_DIM_MULTIPLE:
        raise SenteiError(
            f"config.json: head_dim is {head_dim}; ONNX Runtime's attention needs a multiple of {_HEAD_DIM_MULTIPLE}.",
            "Export to vLLM instead.",
        )


class PrunedLlamaModel(LlamaModel):
    """Builds the graph of a Llama whose layers may lack attention or FFN and differ in width."""

    def __init__(
        self,
        config: PreTrainedConfig,
        model: PreTrainedModel,
        layout: tuple[LayerLayout, ...],
        *,
        int4: bool,
        temporary: str,
    ) -> None:
        """Prepares the builder for the CPU provider with float32 activations.

        Args:
            config: The model's config without ``per_layer_config``.
            model: The loaded model, pruned or not.
            layout: One entry a layer.
            int4: Whether matrices become 4-bit.
            temporary: A directory for the builder's own use.
        """
        self._model = model
        weights = ir.DataType.INT4 if int4 else ir.DataType.FLOAT
        super().__init__(config, ir.DataType.FLOAT, weights, "cpu", temporary, dict(_INT4_OPTIONS) if int4 else {})
        # A tied embedding is stored once. The builder's own option for it cannot be had with an int8 head.
        self.tied_quantized_embeddings = int4 and config.tie_word_embeddings
        self.tied_unquantized_embeddings = not int4 and config.tie_word_embeddings
        # Removed layers keep their numbers: genai finds cache inputs by name and accepts gaps.
        for names, kinds in zip((self.input_names, self.output_names), _CACHES, strict=True):
            for kind in kinds:
                names[kind] = {layer: name for layer, name in names[kind].items() if layout[layer].attention}

    def make_rope_init(self, config: PreTrainedConfig) -> None:
        """Reads the rotary scaling; the Llama builder by itself ignores every kind but its own."""
        is_llama3 = config.rope_parameters["rope_type"] == "llama3"
        (LlamaModel if is_llama3 else Model).make_rope_init(self, config)

    def load_weights(self, input_path: str) -> PreTrainedModel:
        """Hands over the model that is already loaded."""
        return self._model

    def has_lm_head(self, module: nn.Module) -> bool:
        """Tells the head by identity; the builder's test takes any projection as wide as the vocabulary."""
        return module is self._model.get_output_embeddings()

    def make_layernorm(self, layer_id: int, layernorm: nn.Module, skip: bool, simple: bool, location: str) -> None:
        """Makes a norm unless it went with its submodule; the first one made adds nothing."""
        if isinstance(layernorm, nn.Identity):
            return
        is_first = self.layernorm_attrs["output_0"] == ""
        super().make_layernorm(layer_id, layernorm, not is_first, simple, location)

    def make_attention(self, layer_id: int, attention: nn.Module, root_input: str, **kwargs: Any) -> None:
        """Makes an attention unless it was removed."""
        if not isinstance(attention, RemovedAttention):
            super().make_attention(layer_id, attention, root_input, **kwargs)

    def make_mlp(self, layer_id: int, mlp: nn.Module, root_input: str) -> None:
        """Makes an FFN of this layer's width unless it was removed."""
        if not isinstance(mlp, RemovedFFN):
            self.intermediate_size = mlp.get_submodule("down_proj").in_features
            super().make_mlp(layer_id, mlp, root_input)

    def make_tied_quantized_embedding_input_names(self) -> tuple[int, str, str, str]:
        """Names the quantised head that the embedding shares; the builder's are wrong for an int8 head."""
        return 8, "lm_head.MatMul.weight_Q8", "lm_head.MatMul.weight_scales", ""

    def save_model(self, out_dir: str) -> None:
        """Saves the graph and one file of weights, as the builder does, without its progress bar."""
        model = self.model if self.onnx_dtype == ir.DataType.FLOAT else self.to_nbits()
        model.graph.sort()
        # Not the builder's own stamp: it adds the commit of whatever git checkout it happens to be installed in.
        model.producer_version = self.get_genai_version()
        path = Path(out_dir) / self.filename
        ir.save(model, path, external_data=f"{self.filename}.data", size_threshold_bytes=0)
