"""Pruned models in vLLM: its own classes, with each layer shaped as the checkpoint's ``per_layer_config`` says.

Loaded inside somebody else's server: of this project only the config vocabulary is imported. A further family needs two
classes as small as the two at the end.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.utils import extract_layer_index

from toolchain.errors import SenteiError
from toolchain.layout import LayerLayout, read_layout

if TYPE_CHECKING:
    from transformers import LlamaConfig
    from vllm.config import VllmConfig

# Which side of an FFN weight [out, in] counts neurons, and how many rows a neuron has there.
_NEURON_SIDE = {"gate_proj": (0, 1), "up_proj": (0, 1), "gate_up_proj": (0, 2), "down_proj": (1, 1)}
_FFN_WEIGHT = re.compile(r"layers\.(\d+)\.mlp\.(\w+)\.weight$")


def checked_layout(vllm_config: "VllmConfig") -> tuple[LayerLayout, ...]:
    """Reads the layout and checks that this server can build it, before any weight is read.

    Raises:
        SenteiError: ``per_layer_config`` is wrong, or a width cannot be split over the tensor-parallel ranks.
    """
    layout = read_layout(vllm_config.model_config.hf_config.to_dict())
    ranks = vllm_config.parallel_config.tensor_parallel_size
    if odd := [index for index, layer in enumerate(layout) if layer.intermediate_size % ranks]:
        raise SenteiError(
            f"tensor_parallel_size is {ranks}, which does not divide intermediate_size "
            f"{layout[odd[0]].intermediate_size} of layer {odd[0]} ({len(odd)} such layers).",
            f"Prune with --align {64 * ranks}, or serve with fewer ranks.",
        )
    return layout


class NoAttention(nn.Module):
    """Takes the place of an attention class: builds nothing, so vLLM sees no layer here and allocates no KV cache."""

    def __init__(self, **_: Any) -> None:
        """Ignores what an attention would be built from."""
        super().__init__()


class PrunedDecoderLayer(nn.Module):
    """Mixin for vLLM decoder layers of the Llama kind (pre-norm, fused residual) that may lack attention or FFN.

    The base has ``input_layernorm``, ``self_attn``, ``post_attention_layernorm`` and ``mlp``.
    """

    input_layernorm: Any
    self_attn: Any
    post_attention_layernorm: Any
    mlp: Any

    def remove_parts(self, layout: LayerLayout) -> None:
        """Takes out what the layout skips; called once, after the base class has built the layer."""
        self.has_attention, self.has_ffn = layout.attention, layout.intermediate_size > 0
        if not self.has_attention:
            del self.self_attn, self.input_layernorm
        if not self.has_ffn:
            del self.mlp, self.post_attention_layernorm

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs the parts that are there.

        Args:
            positions: int64 ``[num_tokens]``.
            hidden_states: What the last part added, not yet in the residual stream: ``[num_tokens, hidden_size]``.
            residual: The residual stream; ``None`` before the first norm, then ``hidden_states`` is the stream.

        Returns:
            New ``hidden_states`` and ``residual``.
        """
        if self.has_attention:
            hidden_states, residual = _add_and_norm(self.input_layernorm, hidden_states, residual)
            hidden_states = self.self_attn(positions=positions, hidden_states=hidden_states)
        if self.has_ffn:
            hidden_states, residual = _add_and_norm(self.post_attention_layernorm, hidden_states, residual)
            hidden_states = self.mlp(hidden_states)
        if residual is None:
            return torch.zeros_like(hidden_states), hidden_states
        return hidden_states, residual


def _add_and_norm(
    norm: Callable[..., Any], hidden_states: torch.Tensor, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    if residual is None:
        return norm(hidden_states), hidden_states
    return norm(hidden_states, residual)


class CompleteWeights(nn.Module):
    """Mixin for vLLM models: every tensor of the checkpoint is used whole, and every weight comes from it.

    vLLM alone (0.32) cuts tensors that are too large, drops biases it has no place for, and does not miss a linear
    layer's weight, which then keeps whatever was in memory.
    """

    layout: Sequence[LayerLayout]
    _complete = False

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Loads and checks; later calls on the same model, as in weight updates, may be partial.

        Raises:
            SenteiError: A tensor is missing, left over, or of another width than the config says.
        """
        seen: set[str] = set()
        loaded = super().load_weights(self._observe(weights, seen))  # type: ignore[misc]
        if not self._complete:
            self._check_complete(seen)
            self._complete = True
        return loaded

    def _observe(
        self, weights: Iterable[tuple[str, torch.Tensor]], seen: set[str]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            seen.add(name)
            if (match := _FFN_WEIGHT.search(name)) and match[2] in _NEURON_SIDE:
                side, rows = _NEURON_SIDE[match[2]]
                width = self.layout[int(match[1])].intermediate_size
                if tensor.is_floating_point() and tensor.shape[side] != rows * width:
                    raise SenteiError(
                        f"{name} has shape {list(tensor.shape)}, but config.json says intermediate_size {width}."
                    )
            yield name, tensor

    def _check_complete(self, seen: set[str]) -> None:
        packed: dict[str, list[str]] = self.packed_modules_mapping  # type: ignore[assignment]
        wanted: set[str] = set()
        for name, _ in self.named_parameters():
            module, _, leaf = name.rpartition(".")
            parent, _, last = module.rpartition(".")
            if leaf in ("weight", "bias"):
                wanted |= {f"{parent}.{part}.{leaf}".lstrip(".") for part in packed.get(last, [last])}
        if missing := sorted(wanted - seen):
            raise SenteiError(f"The checkpoint has no tensor {missing[0]} ({len(missing)} missing).")
        # Other tensors without a place vLLM refuses itself. Biases of another pipeline stage have no weight here.
        biases = (name for name in seen - wanted if name.endswith(".bias"))
        if extra := sorted(name for name in biases if name.removesuffix("bias") + "weight" in wanted):
            raise SenteiError(f"The checkpoint has {extra[0]}, for which config.json has no place ({len(extra)} such).")


class PrunedLlamaDecoderLayer(PrunedDecoderLayer, LlamaDecoderLayer):
    """vLLM's Llama layer, shaped by its own entry of ``per_layer_config``."""

    def __init__(self, vllm_config: "VllmConfig", prefix: str = "", *, layout: Sequence[LayerLayout]) -> None:
        """Builds the layer whose index stands in ``prefix``."""
        index = extract_layer_index(prefix)
        LlamaDecoderLayer.__init__(
            self,
            vllm_config,
            prefix,
            # Each layer its own config object; the model's refuses to be asked for a width.
            config=cast("LlamaConfig", vllm_config.model_config.hf_config.per_layer_config[index]),
            attn_layer_type=LlamaAttention if layout[index].attention else NoAttention,
        )
        self.remove_parts(layout[index])


class PrunedLlamaForCausalLM(CompleteWeights, LlamaForCausalLM):
    """vLLM's Llama with layers that differ."""

    def __init__(self, *, vllm_config: "VllmConfig", prefix: str = "") -> None:
        """Checks the config, then builds; weights come later.

        Raises:
            SenteiError: See :func:`checked_layout`.
        """
        layout = checked_layout(vllm_config)
        layer_type = cast("type[nn.Module]", partial(PrunedLlamaDecoderLayer, layout=layout))
        LlamaForCausalLM.__init__(self, vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)
        self.layout = layout
