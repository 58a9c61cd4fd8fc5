"""Perplexity with its standard error, over non-overlapping windows."""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from toolchain.metrics.token_metrics import finite, perplexity_of
from toolchain.model.layer_walk import LayerWalk


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """A perplexity and how sure it is.

    Attributes:
        perplexity: Over all windows together.
        standard_error: Of the perplexity, from the spread between windows (delta method); ``None`` with one window.
        num_tokens: Tokens predicted.
        num_windows: Windows scored.
        seq_len: Tokens a window.
    """

    perplexity: float
    standard_error: float | None
    num_tokens: int
    num_windows: int
    seq_len: int


@torch.inference_mode()
def token_losses(
    walk: LayerWalk, windows: torch.Tensor, *, on_window: Callable[[], None] = lambda: None
) -> torch.Tensor:
    """Negative log-likelihood of every next token, in nats, computed in float32 whatever the model's dtype.

    Args:
        walk: Over a model, pruned or not.
        windows: int64 ``[num_windows, seq_len]``.
        on_window: Called once a window, for progress.

    Returns:
        float32 ``[num_windows, seq_len - 1]`` on the CPU.
    """
    rows = []
    for block in walk.blocks(windows):
        rows += _block_losses(walk, block, on_window)
    return torch.cat(rows)


def _block_losses(walk: LayerWalk, block: torch.Tensor, on_window: Callable[[], None]) -> list[torch.Tensor]:
    """A function of its own, so that a block's hidden states are gone before the next block's come."""
    hidden, rows = walk.forward(walk.embed(block)), []
    for state, window in zip(hidden.split(1), block.split(1), strict=True):
        rows.append(walk.token_losses(state, window))
        on_window()
    return rows


def perplexity(walk: LayerWalk, windows: torch.Tensor, *, on_window: Callable[[], None] = lambda: None) -> Perplexity:
    """``exp`` of the mean negative log-likelihood of the next token, summed in float64; see :func:`token_losses`.

    Raises:
        SenteiError: The result is NaN or Inf.
    """
    return summarise_losses(token_losses(walk, windows, on_window=on_window), walk)


def summarise_losses(losses: torch.Tensor, walk: LayerWalk) -> Perplexity:
    """Perplexity from token losses ``[num_windows, seq_len - 1]``.

    Raises:
        SenteiError: It is NaN or Inf.
    """
    window_losses = losses.double().mean(1).tolist()
    mean = statistics.fmean(window_losses)
    value = finite(perplexity_of(mean), "perplexity", walk)
    count = len(window_losses)
    return Perplexity(
        perplexity=value,
        standard_error=value * statistics.stdev(window_losses) / math.sqrt(count) if count > 1 else None,
        num_tokens=losses.numel(),
        num_windows=count,
        seq_len=losses.shape[1] + 1,
    )
