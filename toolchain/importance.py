"""How much each FFN neuron matters (2SSP stage 1, arXiv 2501.17771, section 3.1)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from toolchain.errors import SenteiError
from toolchain.families import Family
from toolchain.modeling import decoder_layers


@torch.inference_mode()
def neuron_importance(
    model: PreTrainedModel, family: Family, windows: torch.Tensor, *, on_window: Callable[[], None] = lambda: None
) -> tuple[NDArray[np.float32], ...]:
    """Scores every neuron by the size of its activation.

    The score of neuron *j* is the L2 norm, over the tokens of one window, of column *j* of the input of the FFN's
    output projection, averaged over the windows. Statistics are streamed: no activation is stored. Norms are taken in
    float32 and summed in float64.

    Args:
        model: The unpruned model.
        family: Where its FFN lives.
        windows: int64 ``[num_samples, seq_len]``.
        on_window: Called after each window, for progress.

    Returns:
        float32 ``[intermediate_size]`` a layer; higher is kept.

    Raises:
        SenteiError: NaN or Inf among the activations; names the first such layer.
    """
    layers = decoder_layers(model, family)
    totals: list[torch.Tensor | float] = [0.0] * len(layers)

    def observe(layer: int, activations: torch.Tensor) -> None:
        norms = torch.linalg.vector_norm(activations.flatten(0, -2), dim=0, dtype=torch.float32)
        totals[layer] = totals[layer] + norms.double()

    with _watch_inputs([layer.get_submodule(family.ffn_output) for layer in layers], observe):
        for window in windows:
            model.base_model(window[None].to(model.device), use_cache=False)
            on_window()
    scores = [(torch.as_tensor(total) / len(windows)).float().cpu().numpy() for total in totals]
    for layer, values in enumerate(scores):
        if not np.isfinite(values).all():
            raise SenteiError(
                f"Layer {layer}: FFN activations hold NaN or Inf in {model.dtype}.", "Compute in another --dtype."
            )
    return tuple(scores)


@contextmanager
def _watch_inputs(modules: list[Any], observe: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
    handles = [
        module.register_forward_pre_hook(lambda _module, inputs, index=index: observe(index, inputs[0]))
        for index, module in enumerate(modules)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
