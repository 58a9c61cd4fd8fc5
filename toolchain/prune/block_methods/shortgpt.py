"""ShortGPT (arXiv 2403.03853): whole blocks go, in the order of how little each changes the hidden state."""

from collections.abc import Callable, Sequence

import torch
from torch.nn.functional import cosine_similarity

from toolchain.metrics.token_metrics import finite
from toolchain.model.layer_walk import LayerWalk


@torch.inference_mode()
def block_influence(
    walk: LayerWalk, windows: torch.Tensor, *, on_window: Callable[[], None] = lambda: None
) -> list[float]:
    """Block Influence (equation 1): 1 minus the cosine between a block's input and output, averaged over tokens.

    Cosines are taken and summed in float64: most are close to 1.

    Args:
        walk: Over the unpruned model.
        windows: int64 ``[num_samples, seq_len]``.
        on_window: Called once a window, for progress.

    Returns:
        One number a layer, from 0 to 2; lower is removed first.

    Raises:
        SenteiError: NaN or Inf among the hidden states.
    """
    totals = [0.0] * len(walk.layers)
    for block in walk.blocks(windows):
        hidden = walk.embed(block)
        for index in range(len(walk.layers)):
            with walk.layers.layer(index) as module:
                after = walk.run(module, index, hidden)
            before = hidden.to(after.device)  # from the GPU of the layer below
            totals[index] += float((1 - cosine_similarity(before.double(), after.double(), dim=-1)).sum())
            hidden = after
        for _ in block:
            on_window()
    return [
        finite(total / windows.numel(), f"block influence of layer {layer}", walk) for layer, total in enumerate(totals)
    ]


def order_of_removal(influence: Sequence[float]) -> list[int]:
    """Layers from the least influence on; ties go to the lower layer."""
    return sorted(range(len(influence)), key=influence.__getitem__)
