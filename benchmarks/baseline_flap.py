"""FLAP (An et al., 2023, arXiv 2312.11983): what fluctuates least is replaced by its mean.

One pass of the calibration text through the original gives mean and variance of every input of ``o_proj`` and
``down_proj``. Metric (WIFV): variance times the squared norm of the weights that read the input. Structure (AL-AM):
metrics are standardised within each layer's attention and FFN; a head has the mean of its inputs; heads and neurons are
in one ranking over all layers. Compensation: what removed inputs contribute on average becomes a bias behind the
projection. Nothing is computed again after a removal.

Two things are open: the published code squares the metric of attention before it is standardised, and the models of the
paper have no grouped queries (see :data:`baseline_units.HeadUnit`).
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from baseline_units import Biases, HeadUnit, Kept, Scores, Shape
from numpy.typing import NDArray
from torch import nn

from toolchain.model.layer_walk import LayerWalk


@dataclass(frozen=True, kw_only=True)
class Flap:
    """What can be chosen.

    Attributes:
        unit: What is ranked beside neurons.
        squared: The metric of attention is squared, as in the paper's code.
        structure: ``AL-AM``, which the paper recommends, or ``UL-UM`` of its ablation: the same share of each layer's
            heads and neurons goes.
    """

    unit: HeadUnit
    squared: bool = False
    structure: Literal["AL-AM", "UL-UM"] = "AL-AM"


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Of the inputs of each layer's ``o_proj`` and ``down_proj``, over all tokens; float64 ``[num_layers, inputs]``.

    Attributes:
        attention_mean: Of the inputs of ``o_proj``.
        attention_variance: Of the same, with N - 1.
        ffn_mean: Of the inputs of ``down_proj``.
        ffn_variance: Of the same.
    """

    attention_mean: NDArray[np.float64]
    attention_variance: NDArray[np.float64]
    ffn_mean: NDArray[np.float64]
    ffn_variance: NDArray[np.float64]


@torch.inference_mode()
def measure(walk: LayerWalk, windows: torch.Tensor) -> Statistics:
    """Passes the text through the original, a window at a time.

    Args:
        walk: The original.
        windows: int64 ``[num_windows, seq_len]``.
    """
    with _listening(walk, walk.family.attention_output) as attention, _listening(walk, walk.family.ffn_output) as ffn:
        for window in windows.split(1):
            walk.forward(walk.embed(window))
    return Statistics(
        attention_mean=np.stack([each.mean for each in attention]),
        attention_variance=np.stack([each.variance for each in attention]),
        ffn_mean=np.stack([each.mean for each in ffn]),
        ffn_variance=np.stack([each.variance for each in ffn]),
    )


class _Moments:
    """Mean and variance of the inputs of a layer, window by window in float64 (Chan et al., 1979)."""

    def __init__(self) -> None:
        self._count, self._mean, self._squares = 0, torch.zeros(()), torch.zeros(())

    def see(self, _module: nn.Module, inputs: Any) -> None:
        rows = inputs[0].flatten(0, -2).double()
        count, mean = self._count + len(rows), rows.mean(0)
        apart = mean - self._mean
        squares = (rows - mean).square().sum(0) + apart.square() * self._count * len(rows) / count
        self._count, self._mean, self._squares = count, self._mean + apart * len(rows) / count, self._squares + squares

    @property
    def mean(self) -> NDArray[np.float64]:
        return self._mean.numpy()

    @property
    def variance(self) -> NDArray[np.float64]:
        return (self._squares / (self._count - 1)).numpy()


@contextmanager
def _listening(walk: LayerWalk, name: str) -> Iterator[list[_Moments]]:
    """The moments of what this module of each layer is given."""
    layers = walk.model.get_submodule(walk.family.layers)
    moments = [_Moments() for _ in layers]
    with ExitStack() as undo:
        for layer, each in zip(layers, moments, strict=True):
            undo.callback(layer.get_submodule(name).register_forward_pre_hook(each.see).remove)
        yield moments


def flap_scores(walk: LayerWalk, shape: Shape, statistics: Statistics, flap: Flap) -> Scores:
    """WIFV, standardised: heads and neurons in one ranking."""
    attention = statistics.attention_variance * _squared_norms(walk, walk.family.attention_output)
    ffn = statistics.ffn_variance * _squared_norms(walk, walk.family.ffn_output)
    attention = _standardised(attention**2 if flap.squared else attention)
    num_units = shape.num_heads if flap.unit == "head" else shape.num_groups
    scores = attention.reshape(shape.num_layers, num_units, -1).mean(2), _standardised(ffn)
    heads, neurons = scores if flap.structure == "AL-AM" else map(_quantiles, scores)
    return Scores(heads=heads, neurons=neurons)


def flap_biases(walk: LayerWalk, shape: Shape, statistics: Statistics, kept: Kept) -> Biases:
    """What removed inputs of the projections contribute on average: ``W (mean * removed)``."""
    gone = ~kept.heads.repeat(shape.head_dim, axis=1)
    attention = zip(_weights(walk, walk.family.attention_output), statistics.attention_mean * gone, strict=True)
    ffn = zip(_weights(walk, walk.family.ffn_output), statistics.ffn_mean * ~kept.neurons, strict=True)
    return Biases(
        attention=np.stack([weight @ mean for weight, mean in attention]),
        ffn=np.stack([weight @ mean for weight, mean in ffn]),
    )


def _standardised(metric: NDArray[np.float64]) -> NDArray[np.float64]:
    """Within each layer, over its inputs."""
    return (metric - metric.mean(1, keepdims=True)) / metric.std(1, ddof=1, keepdims=True)


def _quantiles(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """The share of each layer's units that goes before half of this one has gone."""
    return (scores.argsort(1).argsort(1) + 0.5) / scores.shape[1]


def _squared_norms(walk: LayerWalk, name: str) -> NDArray[np.float64]:
    return np.stack([(weight**2).sum(0) for weight in _weights(walk, name)])


def _weights(walk: LayerWalk, name: str) -> Iterator[NDArray[np.float64]]:
    """The weight of this projection in each layer, ``[out, in]``."""
    for layer in walk.model.get_submodule(walk.family.layers):
        yield layer.get_submodule(name).weight.detach().double().numpy()
