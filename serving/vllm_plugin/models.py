"""Pruned models in vLLM: its own classes, with each layer shaped as the checkpoint's ``per_layer_config`` says.

Loaded inside somebody else's server: of this project only the vocabulary of configs and families is imported. A family
is one small class at the end, which names vLLM's own model and decoder layer; nothing of theirs is copied.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from vllm.model_executor.models.gemma3 import Gemma3DecoderLayer, Gemma3ForCausalLM
from vllm.model_executor.models.granite import GraniteDecoderLayer, GraniteForCausalLM
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralDecoderLayer, MistralForCausalLM
from vllm.model_executor.models.phi3 import Phi3ForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2DecoderLayer, Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3DecoderLayer, Qwen3ForCausalLM
from vllm.model_executor.models.utils import extract_layer_index, make_layers, maybe_prefix

from serving.vllm_plugin.weights import CompleteWeights, stored_shapes
from toolchain.architecture.families import Family, check_vllm_follows, family_of
from toolchain.architecture.layout import LayerLayout, read_layout
from toolchain.architecture.rounding_scheme import rounding_schemes
from toolchain.architecture.tensor_check import check_layer_tensors
from toolchain.errors import SenteiError

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class Nothing(nn.Module):
    """Stands where an attention, an FFN, or a norm behind one was: passes on what came in.

    A norm before it, :class:`NoNorm`, has let that through unchanged, so nothing was added to the residual stream.
    """

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        """Returns ``hidden_states`` itself."""
        return hidden_states


class NoNorm(nn.Module):
    """Stands where the norm before a removed attention or FFN was.

    vLLM's norms take what the last part has put out, add it to the residual stream, and return the normalised stream
    and the stream. Where nothing follows, both wait as they are for the next norm.
    """

    def forward(
        self, hidden_states: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Returns both; without ``residual``, ``hidden_states`` is the stream and there is nothing to add to it."""
        if residual is None:
            return torch.zeros_like(hidden_states)
        return hidden_states, residual


def checked_layout(vllm_config: "VllmConfig") -> tuple[LayerLayout, ...]:
    """Reads the layout and checks that this server can build it, before any weight is read.

    Raises:
        SenteiError: ``per_layer_config`` is wrong or does not fit the tensors, vLLM's class has no place for what the
            config asks for, or a width cannot be split over the tensor-parallel ranks.
    """
    model_config = vllm_config.model_config
    config = model_config.hf_config.to_dict()
    check_vllm_follows(config)
    layout = read_layout(config)
    # Of a model that is not in a directory, or is quantised, every tensor is checked when it is loaded.
    if shapes := stored_shapes(Path(model_config.model)) if "quantization_config" not in config else {}:
        check_layer_tensors(str(model_config.model), family_of(config), layout, shapes)
    ranks = vllm_config.parallel_config.tensor_parallel_size
    if odd := [index for index, layer in enumerate(layout) if layer.intermediate_size % ranks]:
        raise SenteiError(
            f"tensor_parallel_size is {ranks}, which does not divide intermediate_size "
            f"{layout[odd[0]].intermediate_size} of layer {odd[0]} ({len(odd)} such layers).",
            f"Prune with --tensor-parallel {ranks}, or serve with fewer ranks.",
        )
    return layout


def remove_parts(layer: nn.Module, family: Family, layout: LayerLayout) -> None:
    """Takes out of a decoder layer what its layout skips; the layer's own forward then passes by."""
    for kept, part, norms in (
        (layout.attention, family.attention, family.attention_norms),
        (layout.intermediate_size > 0, family.ffn, family.ffn_norms),
    ):
        if not kept:
            setattr(layer, norms[0], NoNorm())
            for name in (part, *norms[1:]):
                setattr(layer, name, Nothing())


class PrunedModel(CompleteWeights):
    """Mixin for vLLM's causal language models: the model as vLLM builds it, but with decoder layers that differ."""

    decoder_layer: ClassVar[type[nn.Module]]

    def __init__(self, *, vllm_config: "VllmConfig", prefix: str = "") -> None:
        """Checks the config, then builds; weights come later.

        Raises:
            SenteiError: See :func:`checked_layout`.
        """
        layout = checked_layout(vllm_config)
        config = vllm_config.model_config.hf_config
        family = family_of(config.to_dict())
        with _no_layers(config):
            super().__init__(vllm_config=vllm_config, prefix=prefix)

        def layer(prefix: str) -> nn.Module:
            index = extract_layer_index(prefix)
            built = self.build_layer(vllm_config, config.per_layer_config[index], prefix)
            remove_parts(built, family, layout[index])
            if not layout[index].attention:
                _forget_attention(vllm_config, prefix)
            return built

        inner: Any = self.model
        inner.start_layer, inner.end_layer, inner.layers = make_layers(
            len(layout), layer, prefix=f"{maybe_prefix(prefix, 'model')}.layers"
        )
        self.layout, self.family, self.schemes = layout, family, rounding_schemes(config.to_dict())

    def build_layer(self, vllm_config: "VllmConfig", config: Any, prefix: str) -> nn.Module:
        """The layer as vLLM builds it, of the width that ``config``, this layer's own, says."""
        return self.decoder_layer(
            config=config,
            cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config,
            prefix=prefix,
        )


class PrunedLlamaLike(PrunedModel):
    """Mixin for the models whose layers take all of vLLM's config."""

    def build_layer(self, vllm_config: "VllmConfig", config: Any, prefix: str) -> nn.Module:
        """See :class:`PrunedModel`."""
        return self.decoder_layer(vllm_config=vllm_config, config=config, prefix=prefix)


@contextmanager
def _no_layers(config: Any) -> Iterator[None]:
    """Lets vLLM's models build no layers: they build all alike, from the global width, which cannot be asked for."""
    num_hidden_layers = config.num_hidden_layers
    config.num_hidden_layers = 0
    try:
        yield
    finally:
        config.num_hidden_layers = num_hidden_layers


def _forget_attention(vllm_config: "VllmConfig", prefix: str) -> None:
    """Strikes a removed attention off the list from which vLLM allocates KV cache."""
    known = vllm_config.compilation_config.static_forward_context
    for name in [name for name in known if name.startswith(f"{prefix}.")]:
        del known[name]


class PrunedLlamaForCausalLM(PrunedLlamaLike, LlamaForCausalLM):
    """vLLM's Llama with layers that differ."""

    decoder_layer = LlamaDecoderLayer


class PrunedMistralForCausalLM(PrunedLlamaLike, MistralForCausalLM):
    """vLLM's Mistral with layers that differ."""

    decoder_layer = MistralDecoderLayer


class PrunedPhi3ForCausalLM(PrunedLlamaLike, Phi3ForCausalLM):
    """vLLM's Phi-3 with layers that differ."""

    decoder_layer = LlamaDecoderLayer


class PrunedQwen2ForCausalLM(PrunedModel, Qwen2ForCausalLM):
    """vLLM's Qwen2 with layers that differ."""

    decoder_layer = Qwen2DecoderLayer


class PrunedQwen3ForCausalLM(PrunedModel, Qwen3ForCausalLM):
    """vLLM's Qwen3 with layers that differ."""

    decoder_layer = Qwen3DecoderLayer


class PrunedGraniteForCausalLM(PrunedModel, GraniteForCausalLM):
    """vLLM's Granite with layers that differ."""

    decoder_layer = GraniteDecoderLayer


class PrunedGemma3ForCausalLM(PrunedModel, Gemma3ForCausalLM):
    """vLLM's Gemma 3 with layers that differ."""

    decoder_layer = Gemma3DecoderLayer
