"""Stage 2 of 2SSP: removes attention submodules one by one, each time the one whose removal hurts least."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from toolchain.evaluation import finite, mean_loss
from toolchain.families import Family
from toolchain.modeling import RemovedAttention, decoder_layers
from toolchain.plan import Removal


@torch.inference_mode()
def remove_attentions(
    model: PreTrainedModel,
    family: Family,
    window: torch.Tensor,
    num_removals: int,
    *,
    on_candidate: Callable[[], None] = lambda: None,
) -> list[Removal]:
    """Removes attentions greedily by perplexity (arXiv 2501.17771, section 3.2); ties go to the lower layer.

    Removing the attention of layer *i* changes nothing below it, so a candidate starts from the hidden state that
    enters its layer, kept from the current model.

    Args:
        model: With its FFNs already narrowed; changed in place.
        family: Where its attention lives.
        window: int64 ``[1, seq_len]``.
        num_removals: How many; at most the number of layers.
        on_candidate: Called after each candidate, for progress.

    Returns:
        One entry a removal, in order, with every candidate's perplexity.

    Raises:
        SenteiError: A perplexity is NaN or Inf.
    """
    walk = _LayerWalk(model, family, window)
    remaining = list(range(len(walk.layers)))
    steps = []
    for _ in range(num_removals):
        candidates: dict[int, float] = {}
        for layer in remaining:
            attention, norm = walk.remove(layer)
            candidates[layer] = finite(walk.perplexity_from(layer), model)
            walk.restore(layer, attention, norm)
            on_candidate()
        best = min(candidates, key=lambda layer: (candidates[layer], layer))
        walk.remove(best)
        walk.refresh(best)
        remaining.remove(best)
        steps.append(Removal(removed=best, metric=candidates[best], candidates=candidates))
    return steps


def num_candidates(num_layers: int, num_removals: int) -> int:
    """How many candidates the search will try in all."""
    return sum(num_layers - step for step in range(num_removals))


@dataclass
class _LayerWalk:
    """Runs a model layer by layer, remembering what enters each layer.

    Attributes:
        entering: ``[1, seq_len, hidden_size]`` a layer: the current model's hidden state before it.
        arguments: What the model's own forward passes each layer besides (masks, rotary embeddings).
    """

    model: PreTrainedModel
    family: Family
    window: torch.Tensor
    entering: list[torch.Tensor] = field(default_factory=list)
    arguments: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.layers = decoder_layers(self.model, self.family)
        self.window = self.window.to(self.model.device)
        # Asking the model itself what it hands its layers keeps masks and rotary embeddings out of our code.
        handles = [layer.register_forward_pre_hook(self._record, with_kwargs=True) for layer in self.layers]
        try:
            self.model.base_model(self.window, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()

    def _record(self, _module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self.entering.append(inputs[0])
        self.arguments.append(keywords)

    def remove(self, layer: int) -> tuple[nn.Module, nn.Module]:
        """Takes a layer's attention and its norm out; returns them."""
        module = self.layers[layer]
        parts = getattr(module, self.family.attention), getattr(module, self.family.attention_norm)
        setattr(module, self.family.attention, RemovedAttention())
        setattr(module, self.family.attention_norm, nn.Identity())
        return parts

    def restore(self, layer: int, attention: nn.Module, norm: nn.Module) -> None:
        """Puts a layer's attention and its norm back."""
        setattr(self.layers[layer], self.family.attention, attention)
        setattr(self.layers[layer], self.family.attention_norm, norm)

    def refresh(self, layer: int) -> None:
        """Recomputes what enters the layers above ``layer``, which has changed."""
        for index in range(layer, len(self.layers) - 1):
            self.entering[index + 1] = self._run(index, self.entering[index])

    def perplexity_from(self, layer: int) -> float:
        """Perplexity of the current model, computed from ``layer`` upwards."""
        hidden = self.entering[layer]
        for index in range(layer, len(self.layers)):
            hidden = self._run(index, hidden)
        loss = mean_loss(self.model, self.model.get_submodule(self.family.final_norm)(hidden), self.window)
        return math.exp(loss) if loss < 700 else math.inf

    def _run(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        output = self.layers[index](hidden, **self.arguments[index])
        return output[0] if isinstance(output, tuple) else output
