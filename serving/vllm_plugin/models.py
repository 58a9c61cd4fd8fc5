"""Pruned models in vLLM: its own classes, with each layer shaped as the checkpoint's ``per_layer_config`` says.

Loaded inside somebody else's server: of this project only the vocabulary of configs and families is imported. A family
is one small class in :mod:`serving.vllm_plugin.families`, which names vLLM's own model and decoder layer; nothing of
theirs is copied.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import vllm
from torch import nn
from vllm.model_executor.models.utils import extract_layer_index, make_layers, maybe_prefix

from serving.vllm_plugin.adapters import check_when_loaded
from serving.vllm_plugin.stages import check_stages
from serving.vllm_plugin.versions import check_version
from serving.vllm_plugin.weights import CompleteWeights, stored_shapes
from toolchain.architecture.families import Family, check_vllm_follows, family_of
from toolchain.architecture.layout import LayerLayout, read_layout
from toolchain.architecture.rounding_scheme import rounding_schemes
from toolchain.architecture.tensor_check import check_layer_tensors
from toolchain.errors import SenteiError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# When the first pruned model is asked for: other models on the same server are none of the plugin's business.
check_version(vllm.__version__)
_PARTITION = "VLLM_PP_LAYER_PARTITION"


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
            config asks for, a width cannot be split over the tensor-parallel ranks, a pipeline stage has no attention,
            or an option of the server takes all layers for equal.
    """
    model_config = vllm_config.model_config
    if getattr(vllm_config.observability_config, "enable_mfu_metrics", False):
        raise SenteiError(
            "--enable-mfu-metrics takes all layers for equal, and those of a pruned model are not.", "Leave it out."
        )
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
    check_stages(layout, vllm_config.parallel_config.pipeline_parallel_size)
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
        if vllm_config.lora_config is not None:
            check_when_loaded()
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
    """Lets vLLM's models build no layers: they build all alike, from the global width, which cannot be asked for.

    A user's division of the layers into pipeline stages has to add up to their number, so it is put aside as well.
    """
    num_hidden_layers, partition = config.num_hidden_layers, os.environ.pop(_PARTITION, None)
    config.num_hidden_layers = 0
    try:
        yield
    finally:
        config.num_hidden_layers = num_hidden_layers
        if partition is not None:
            os.environ[_PARTITION] = partition


def _forget_attention(vllm_config: "VllmConfig", prefix: str) -> None:
    """Strikes a removed attention off the list from which vLLM allocates KV cache."""
    known = vllm_config.compilation_config.static_forward_context
    for name in [name for name in known if name.startswith(f"{prefix}.")]:
        del known[name]
