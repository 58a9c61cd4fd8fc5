"""GISP (Wang et al., 2025, arXiv 2510.18030): heads and neurons by the loss's first order, scored again in rounds.

Importance of a weight ``w`` is ``|w dL/dw|``, with ``L`` the mean loss of the next token on the calibration text; a
unit's is the sum over its weights (with grouped queries the published code counts ``q_proj`` and ``o_proj`` alone),
divided by a number for attention and one for FFNs so that both are in one ranking over all layers. Each round removes
the lowest and computes the importance of the rest again, by a linear schedule, without training in between: one
trajectory passes all sparsities. The first tenth of the layers and the last layer are left alone.

The published code divides by ``4 head_dim hidden_size`` and ``3 intermediate_size``, where a neuron has ``3
hidden_size`` weights and a head with grouped queries ``2 head_dim hidden_size`` that count: see :class:`Gisp`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from baseline_units import HeadUnit, Kept, Scores, Shape, protect, pruned, remove_lowest
from numpy.typing import NDArray
from torch import nn

from toolchain.model.layer_walk import LayerWalk
from toolchain.model.loading import RemovedFFN

_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")


@dataclass(frozen=True, kw_only=True)
class Gisp:
    """What can be chosen.

    Attributes:
        unit: What is ranked beside neurons. A group counts its weights in ``k_proj`` and ``v_proj``, too.
        divisor: ``published``, or ``weights``: the number of weights that count.
    """

    unit: HeadUnit
    divisor: Literal["published", "weights"]


def gradients(walk: LayerWalk, windows: torch.Tensor) -> float:
    """Leaves the gradients of all projections in decoder layers in ``weight.grad``.

    Args:
        walk: As pruned so far.
        windows: int64 ``[num_windows, seq_len]``.

    Returns:
        The loss: mean over windows, in nats per token.
    """
    for weight in _projections(walk):
        weight.requires_grad_(True)
        weight.grad = None
    losses = []
    for window in windows.split(1):
        logits = walk.model(window, use_cache=False).logits[0, :-1].float()
        loss = nn.functional.cross_entropy(logits, window[0, 1:]) / len(windows)
        loss.backward()
        losses.append(loss.item())
    return sum(losses)


def _projections(walk: LayerWalk) -> Iterator[nn.Parameter]:
    for layer in walk.model.get_submodule(walk.family.layers):
        for name in (*_ATTENTION, *walk.family.ffn_inputs, walk.family.ffn_output):
            if name in _ATTENTION or not isinstance(layer.get_submodule(walk.family.ffn), RemovedFFN):
                yield layer.get_submodule(name).weight


def gisp_scores(walk: LayerWalk, shape: Shape, kept: Kept, gisp: Gisp) -> Scores:
    """Importance of all units from the gradients; of removed ones 0.

    Args:
        walk: As pruned, with gradients.
        shape: The unpruned model's.
        kept: How it is pruned.
        gisp: What was chosen.
    """
    num_units = shape.num_heads if gisp.unit == "head" else shape.num_groups
    heads, neurons = np.zeros((shape.num_layers, num_units)), np.zeros((shape.num_layers, shape.width))
    for index, layer in enumerate(walk.model.get_submodule(walk.family.layers)):
        query, key, value, output = (layer.get_submodule(name).weight for name in _ATTENTION)
        counted = [_importance(query), _importance(output).T]
        if gisp.unit == "group":
            counted += [_importance(key), _importance(value)]
        heads[index] = sum(each.reshape(num_units, -1).sum(1) for each in counted)
        if kept.neurons[index].any():
            inputs = [_importance(layer.get_submodule(name).weight) for name in walk.family.ffn_inputs]
            into = _importance(layer.get_submodule(walk.family.ffn_output).weight).sum(0)
            neurons[index, kept.neurons[index]] = into + sum(each.sum(1) for each in inputs)
    head_divisor, neuron_divisor = 4 * shape.head_dim * shape.hidden_size, 3 * shape.width
    if gisp.divisor == "weights":
        per_head = 2 * shape.head_dim * shape.hidden_size
        heads_per_group = shape.num_heads // shape.num_groups
        # A group has all its query heads, and a key-value head as large as one.
        head_divisor = per_head * (heads_per_group + 1) if gisp.unit == "group" else per_head
        neuron_divisor = 3 * shape.hidden_size
    return Scores(heads=heads / head_divisor, neurons=neurons / neuron_divisor)


def _importance(weight: torch.Tensor) -> NDArray[np.float64]:
    assert weight.grad is not None
    return (weight.detach() * weight.grad).abs().double().numpy()


def rounds(
    walk: LayerWalk, shape: Shape, windows: torch.Tensor, gisp: Gisp, budgets: Sequence[int], kept: Kept,
    on_round: Callable[[float], None] = lambda loss: None,
) -> Iterator[Kept]:  # fmt: skip
    """Removes round after round; yields what is left after each.

    Args:
        walk: The original; it is as it was between rounds.
        shape: Its shape.
        windows: Calibration windows, int64 ``[num_windows, seq_len]``.
        gisp: What was chosen.
        budgets: Parameters of the decoder blocks that each of the rounds leaves.
        kept: What is left before the first of them.
        on_round: Told the loss of each round's model before it loses more.
    """
    left_alone = [*range(int(0.1 * shape.num_layers)), shape.num_layers - 1]
    for budget in budgets:
        with pruned(walk, kept):
            on_round(gradients(walk, windows))
            scores = gisp_scores(walk, shape, kept, gisp)
            for weight in _projections(walk):
                weight.requires_grad_(False)
                weight.grad = None
        kept = remove_lowest(shape, kept, protect(scores, left_alone), at_most=budget, with_biases=False)
        yield kept
