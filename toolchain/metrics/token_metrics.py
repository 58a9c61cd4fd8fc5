"""What a model is measured by: perplexity, and divergence from the original."""

import math
from collections.abc import Collection
from contextlib import ExitStack
from typing import Protocol

import torch

from toolchain.metrics.model_metric import ModelMetric
from toolchain.model.layer_walk import LayerWalk, attention_removed
from toolchain.model.loading import decoder_layers
from toolchain.model.not_finite import not_finite


class StateMetric(Protocol):
    """A number computed from what leaves the last decoder layer, so that candidates can share the layers below.

    Attributes:
        name: As in the plan.
        source: What it is measured on, if that is not the calibration text.
        source_sha256: Of that, as it was read.
        higher_is_better: ``False`` for losses.
        ids: int64 ``[num_sequences, seq_len]``: what the model reads.
    """

    name: str
    source: str | None
    source_sha256: str | None
    higher_is_better: bool
    ids: torch.Tensor

    def prepare(self, walk: LayerWalk) -> None:
        """Looks at the unpruned model, before anything is removed; does nothing the second time."""
        ...

    def __call__(self, walk: LayerWalk, hidden: torch.Tensor) -> float:
        """The metric of ``hidden``, which left the last layer: ``[num_sequences, seq_len, hidden_size]``."""
        ...


class TokenMetric(StateMetric, Protocol):
    """A metric that is made of one number a token: some tokens tell something about all of them."""

    def of_tokens(self, walk: LayerWalk, hidden: torch.Tensor) -> torch.Tensor:
        """float32 ``[num_sequences, num_tokens]``; ``hidden`` may hold fewer tokens than ``ids``, from the first on."""
        ...

    def combine(self, values: torch.Tensor) -> float:
        """The metric, from :meth:`of_tokens`; a monotone function of their mean."""
        ...


Metric = StateMetric | ModelMetric


def perplexity_of(loss: float) -> float:
    """``exp`` of a mean loss in nats; infinite rather than an overflow."""
    return math.exp(loss) if loss < 700 else math.inf


class PerplexityMetric:
    """``exp`` of the mean negative log-likelihood of the next token; losses in float32, summed in float64."""

    name: str = "perplexity"
    source: str | None = None
    source_sha256: str | None = None
    higher_is_better: bool = False

    def __init__(self, ids: torch.Tensor) -> None:
        """``ids``: int64 ``[num_sequences, seq_len]``."""
        self.ids = ids

    def prepare(self, walk: LayerWalk) -> None:
        """See :class:`StateMetric`."""

    def of_tokens(self, walk: LayerWalk, hidden: torch.Tensor) -> torch.Tensor:
        """See :class:`TokenMetric`: negative log-likelihoods in nats, one fewer than tokens."""
        return walk.token_losses(hidden, self.ids[:, : hidden.shape[1]])

    def combine(self, values: torch.Tensor) -> float:
        """Perplexity from token losses in nats."""
        return perplexity_of(float(values.double().mean()))

    def __call__(self, walk: LayerWalk, hidden: torch.Tensor) -> float:
        """See :class:`StateMetric`."""
        return self.combine(self.of_tokens(walk, hidden))


class KLDivergence:
    """Mean over tokens of KL(original ‖ pruned) of the next token's distribution, in nats; 0 for the original.

    The original's distributions are not stored: what enters its head is, and the head is never changed.
    """

    name: str = "kl"
    source: str | None = None
    source_sha256: str | None = None
    higher_is_better: bool = False

    def __init__(self, ids: torch.Tensor) -> None:
        """``ids``: int64 ``[num_sequences, seq_len]``."""
        self.ids = ids
        self._original: torch.Tensor | None = None

    @torch.inference_mode()
    def prepare(self, walk: LayerWalk) -> None:
        """See :class:`StateMetric`."""
        if self._original is None:
            self._original = walk.final_norm(walk.forward(walk.embed(self.ids)))

    def of_tokens(self, walk: LayerWalk, hidden: torch.Tensor) -> torch.Tensor:
        """See :class:`TokenMetric`."""
        assert self._original is not None
        original = self._original[:, : hidden.shape[1]]
        return torch.stack([walk.divergence(p, q) for p, q in zip(original, hidden, strict=True)]).cpu()

    def combine(self, values: torch.Tensor) -> float:
        """The mean, in float64."""
        return float(values.double().mean())

    def __call__(self, walk: LayerWalk, hidden: torch.Tensor) -> float:
        """See :class:`StateMetric`."""
        return self.combine(self.of_tokens(walk, hidden))


@torch.inference_mode()
def measure(walk: LayerWalk, metric: Metric, *, without_attention: Collection[int] = ()) -> float:
    """The metric of the model as it is, or as if some layers had lost their attention.

    Raises:
        SenteiError: It is NaN or Inf, or a metric function failed.
    """
    if not isinstance(metric, ModelMetric):
        hidden = walk.forward(walk.embed(metric.ids), without_attention=without_attention)
        return finite(metric(walk, hidden), metric.name, walk)
    with ExitStack() as removed:
        layers = decoder_layers(walk.model, walk.family)
        for index in without_attention:
            removed.enter_context(attention_removed(layers[index], walk.family))
        return metric(walk.model)


def finite(value: float, name: str, walk: LayerWalk) -> float:
    """Passes a finite metric through.

    Raises:
        SenteiError: NaN or Inf.
    """
    if not math.isfinite(value):
        raise not_finite(f"The {name} is {value}", walk.model, walk.model.dtype)
    return value
