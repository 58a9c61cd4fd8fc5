"""What the search measures a model by: a number computed from what leaves the last decoder layer."""

import math
from typing import Protocol

import torch

from toolchain.errors import SenteiError
from toolchain.layer_walk import LayerWalk


class Metric(Protocol):
    """A measure of a model on fixed text.

    Attributes:
        name: As in the plan.
        higher_is_better: ``False`` for losses.
        ids: int64 ``[num_sequences, seq_len]``: what the model reads.
    """

    name: str
    higher_is_better: bool
    ids: torch.Tensor

    def __call__(self, walk: LayerWalk, hidden: torch.Tensor) -> float:
        """The metric of ``hidden``, which left the last layer: ``[num_sequences, seq_len, hidden_size]``."""
        ...


class PerplexityMetric:
    """``exp`` of the mean negative log-likelihood of the next token; losses in float32, summed in float64."""

    name = "perplexity"
    higher_is_better = False

    def __init__(self, ids: torch.Tensor) -> None:
        """``ids``: int64 ``[num_sequences, seq_len]``."""
        self.ids = ids

    def __call__(self, walk: LayerWalk, hidden: torch.Tensor) -> float:
        """See :class:`Metric`."""
        return perplexity_of(walk.token_losses(hidden, self.ids))


def perplexity_of(losses: torch.Tensor) -> float:
    """Perplexity from token losses in nats; infinite rather than an overflow."""
    mean = float(losses.double().mean())
    return math.exp(mean) if mean < 700 else math.inf


@torch.inference_mode()
def measure(walk: LayerWalk, metric: Metric) -> float:
    """The metric of the model as it is.

    Raises:
        SenteiError: It is NaN or Inf.
    """
    return finite(metric(walk, walk.forward(walk.embed(metric.ids))), metric.name, walk)


def finite(value: float, name: str, walk: LayerWalk) -> float:
    """Passes a finite metric through.

    Raises:
        SenteiError: NaN or Inf.
    """
    if not math.isfinite(value):
        raise SenteiError(f"The {name} is {value} in {walk.model.dtype}.", "Compute in another --dtype (float32).")
    return value
