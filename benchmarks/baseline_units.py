"""Heads and neurons as units: what each costs, which stay within a number of parameters, and a model without the rest.

A model keeps some query heads and some FFN neurons of each layer. What follows is counted, too: a key-value head is
gone when the last query head that reads it is gone, and a norm when nothing behind it is left.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from toolchain.errors import SenteiError
from toolchain.model.layer_walk import LayerWalk

# What is ranked beside neurons: a query head, or a key-value head with all query heads that read it.
HeadUnit = Literal["head", "group"]


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What a model keeps.

    Attributes:
        heads: bool ``[num_layers, num_attention_heads]``.
        neurons: bool ``[num_layers, intermediate_size]``.
    """

    heads: NDArray[np.bool_]
    neurons: NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What is removed last has the highest score; heads and neurons are in one ranking.

    Attributes:
        heads: ``[num_layers, num_attention_heads]``, or ``[num_layers, num_key_value_heads]`` for groups.
        neurons: ``[num_layers, intermediate_size]``.
    """

    heads: NDArray[np.float64]
    neurons: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Numbers of units and of parameters, those of one decoder layer; all layers are alike.

    Attributes:
        num_layers: Decoder layers.
        num_heads: Query heads.
        num_groups: Key-value heads.
        head_dim: Of each of them.
        width: Neurons.
        hidden_size: Of the residual stream.
        attention: Parameters of the whole attention and its norm.
        ffn: Parameters of the whole FFN and its norm.
        head: Parameters of a query head: rows of ``q_proj``, columns of ``o_proj``.
        key_value: Parameters of a key-value head: rows of ``k_proj`` and ``v_proj``.
        neuron: Parameters of a neuron.
    """

    num_layers: int
    num_heads: int
    num_groups: int
    head_dim: int
    width: int
    hidden_size: int
    attention: int
    ffn: int
    head: int
    key_value: int
    neuron: int

    @property
    def everything(self) -> Kept:
        """Nothing is removed."""
        return Kept(
            heads=np.ones((self.num_layers, self.num_heads), bool),
            neurons=np.ones((self.num_layers, self.width), bool),
        )


def read_shape(walk: LayerWalk) -> Shape:
    """Counts a model's units and parameters.

    Raises:
        SenteiError: Its projections are fused, its norms are not Llama's, or its layers differ.
    """
    family, config = walk.family, walk.model.config
    if family.fused or family.norms_outputs or config.model_type not in ("llama", "mistral", "qwen2"):
        raise SenteiError(f"Heads of {config.model_type} are not known here.", "Known are llama, mistral and qwen2.")
    layers = []
    for index in range(len(walk.layers)):
        with walk.layers.layer(index) as layer:
            layers.append(_shape_of(layer, walk, config))
    if len(set(layers)) > 1:
        raise SenteiError("The layers of this model differ: prune an unpruned one.")
    return layers[0]


def _shape_of(layer: nn.Module, walk: LayerWalk, config: Any) -> Shape:
    def size(*names: str) -> int:
        return sum(each.numel() for name in names for each in layer.get_submodule(name).parameters())

    hidden, width, num_heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    head_dim = layer.get_submodule("self_attn.q_proj").out_features // num_heads
    return Shape(
        num_layers=len(walk.layers), num_heads=num_heads, num_groups=config.num_key_value_heads, head_dim=head_dim,
        width=width, hidden_size=hidden,
        attention=size(*walk.family.attention_parts), ffn=size(*walk.family.ffn_parts),
        head=size("self_attn.q_proj") // num_heads + head_dim * hidden,
        key_value=size("self_attn.k_proj", "self_attn.v_proj") // config.num_key_value_heads,
        neuron=size(*walk.family.ffn_inputs) // width + hidden,
    )  # fmt: skip


def num_parameters(shape: Shape, kept: Kept, *, with_biases: bool) -> int:
    """Parameters of the decoder blocks.

    Args:
        shape: The unpruned model's.
        kept: What is left of it.
        with_biases: A vector of ``hidden_size`` stands behind each attention and FFN that lost something.
    """
    heads, neurons = kept.heads.sum(1), kept.neurons.sum(1)
    groups = kept.heads.reshape(shape.num_layers, shape.num_groups, -1).any(2).sum(1)
    attention = shape.attention - (shape.num_heads - heads) * shape.head - (shape.num_groups - groups) * shape.key_value
    ffn = shape.ffn - (shape.width - neurons) * shape.neuron
    total = np.where(heads > 0, attention, 0).sum() + np.where(neurons > 0, ffn, 0).sum()
    num_biases = (heads < shape.num_heads).sum() + (neurons < shape.width).sum() if with_biases else 0
    return int(total + num_biases * shape.hidden_size)


def remove_lowest(shape: Shape, kept: Kept, scores: Scores, *, at_most: int, with_biases: bool) -> Kept:
    """Removes the fewest units of the lowest scores, ties to the first, until ``at_most`` parameters are left.

    A head is many neurons large. So that no model is smaller than another for that alone, as many neurons as there is
    room for come back, the highest of those that were just removed.

    Args:
        shape: The unpruned model's.
        kept: What is left before; what is gone stays gone.
        scores: Of all units.
        at_most: Parameters of the decoder blocks.
        with_biases: See :func:`num_parameters`.
    """
    heads_per_unit = shape.num_heads // scores.heads.shape[1]
    is_left = np.concatenate([kept.heads[:, ::heads_per_unit].ravel(), kept.neurons.ravel()])
    ranked = np.argsort(np.concatenate([scores.heads.ravel(), scores.neurons.ravel()]), kind="stable")
    ranked = ranked[is_left[ranked]]

    def without(removed: NDArray[np.int64]) -> Kept:
        stays = is_left.copy()
        stays[removed] = False
        heads, neurons = np.split(stays, [scores.heads.size])
        return Kept(
            heads=heads.reshape(scores.heads.shape).repeat(heads_per_unit, axis=1) & kept.heads,
            neurons=neurons.reshape(scores.neurons.shape),
        )

    def fits(removed: NDArray[np.int64]) -> bool:
        return num_parameters(shape, without(removed), with_biases=with_biases) <= at_most

    fewest, most = 0, len(ranked)
    while fewest < most:
        middle = (fewest + most) // 2
        fewest, most = (fewest, middle) if fits(ranked[:middle]) else (middle + 1, most)
    removed = ranked[:fewest]
    for unit in removed[removed >= scores.heads.size][::-1]:
        if not fits(fewer := removed[removed != unit]):
            break
        removed = fewer
    return without(removed)


@contextmanager
def pruned(walk: LayerWalk, kept: Kept, biases: "Biases | None" = None) -> Iterator[None]:
    """The model without what is not kept, and with biases; afterwards it is what it was.

    Neurons are cut out. Heads are zeroed where ``o_proj`` reads them, which gives what a model without them gives: in
    Transformers a layer's key-value heads cannot have unequal numbers of query heads.
    """
    layers = list(walk.model.get_submodule(walk.family.layers))
    with ExitStack() as undo:
        undo.callback(walk.layers.restore)
        walk.layers.narrow([np.flatnonzero(neurons) for neurons in kept.neurons])
        for index, layer in enumerate(layers):
            output = layer.get_submodule(walk.family.attention_output)
            if not kept.heads[index].all():
                mask = torch.from_numpy(kept.heads[index]).repeat_interleave(
                    output.in_features // len(kept.heads[index])
                )
                undo.callback(output.register_forward_pre_hook(_multiplied_by(mask.to(output.weight))).remove)
            if biases is not None:
                for module, bias in ((output, biases.attention), (layer.get_submodule(walk.family.ffn), biases.ffn)):
                    added = torch.from_numpy(bias[index]).to(output.weight)
                    undo.callback(module.register_forward_hook(_plus(added)).remove)
        yield


@dataclass(frozen=True, kw_only=True)
class Biases:
    """What is added behind each attention and each FFN, float64 ``[num_layers, hidden_size]`` each."""

    attention: NDArray[np.float64]
    ffn: NDArray[np.float64]


def _multiplied_by(mask: torch.Tensor) -> Any:
    return lambda _module, inputs: (inputs[0] * mask,)


def _plus(bias: torch.Tensor) -> Any:
    return lambda _module, _inputs, output: output + bias


def protect(scores: Scores, layers: list[int]) -> Scores:
    """Scores by which these layers lose nothing before all others have lost everything."""
    heads, neurons = scores.heads.copy(), scores.neurons.copy()
    heads[layers], neurons[layers] = np.inf, np.inf
    return replace(scores, heads=heads, neurons=neurons)


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """What a method made of a model.

    Attributes:
        kept: What is left.
        biases: What is added; ``None`` if the method adds nothing.
        cpu_s: The processor's seconds that it took.
    """

    kept: Kept
    biases: Biases | None
    cpu_s: float
