"""Sliding window (arXiv 2403.17887, "The Unreasonable Ineffectiveness of the Deeper Layers"): n blocks in a row go.

Those are the ones whose input and output, n blocks later, point in the most similar directions. The paper heals the
model afterwards; here it stays as it is.
"""

from collections.abc import Callable, Sequence

import torch
from torch.nn.functional import cosine_similarity

from toolchain.metrics.token_metrics import finite
from toolchain.model.layer_walk import LayerWalk


@torch.inference_mode()
def last_token_states(
    walk: LayerWalk, windows: torch.Tensor, *, on_window: Callable[[], None] = lambda: None
) -> torch.Tensor:
    """What enters each layer at the last token of each window, and what leaves the last layer there.

    Args:
        walk: Over the unpruned model.
        windows: int64 ``[num_samples, seq_len]``.
        on_window: Called once a window, for progress.

    Returns:
        float64 ``[num_layers + 1, num_samples, hidden_size]`` on the CPU.
    """
    columns = []
    for block in walk.blocks(windows):
        hidden = walk.embed(block)
        # Copies: a view would keep every layer's whole output. And layers may be on several GPUs.
        rows = [hidden[:, -1].double().cpu()]
        for index in range(len(walk.layers)):
            with walk.layers.layer(index) as module:
                hidden = walk.run(module, index, hidden)
            rows.append(hidden[:, -1].double().cpu())
        columns.append(torch.stack(rows))
        for _ in block:
            on_window()
    return torch.cat(columns, dim=1)


def angular_distances(states: torch.Tensor, num_blocks: int, walk: LayerWalk) -> list[float]:
    """``arccos(cosine) / pi`` between what enters layers l and l + n, averaged over windows (section 3.2), for every l.

    Args:
        states: float64 ``[num_layers + 1, num_samples, hidden_size]``, see :func:`last_token_states`.
        num_blocks: n.
        walk: Names the dtype in an error.

    Returns:
        One number a start, from 0 to 1; the lowest is removed.

    Raises:
        SenteiError: NaN or Inf among the hidden states.
    """
    cosines = cosine_similarity(states[:-num_blocks], states[num_blocks:], dim=-1).clamp(-1, 1)
    distances = (cosines.arccos() / torch.pi).mean(1).tolist()
    return [finite(each, f"angular distance from layer {start}", walk) for start, each in enumerate(distances)]


def most_similar(distances: Sequence[float]) -> int:
    """Where the smallest distance starts; ties go to the lower layer."""
    return min(range(len(distances)), key=distances.__getitem__)
