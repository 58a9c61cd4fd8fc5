"""Perplexity with its standard error, over non-overlapping windows."""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from toolchain.layer_walk import LayerWalk
from toolchain.metrics import finite


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
def perplexity(walk: LayerWalk, windows: torch.Tensor, *, on_window: Callable[[], None] = lambda: None) -> Perplexity:
    """``exp`` of the mean negative log-likelihood of the next token.

    Losses are computed in float32 whatever the model's dtype, and summed in float64.

    Args:
        walk: Over a model, pruned or not.
        windows: int64 ``[num_windows, seq_len]``.
        on_window: Called once a window, for progress.

    Raises:
        SenteiError: The result is NaN or Inf.
    """
    losses: list[float] = []
    for block in walk.blocks(windows):
        hidden = walk.forward(walk.embed(block))
        for state, window in zip(hidden.split(1), block.split(1), strict=True):
            losses.append(float(walk.token_losses(state, window).double().mean()))
            on_window()
    mean = statistics.fmean(losses)
    value = finite(math.exp(mean) if mean < 700 else math.inf, "perplexity", walk)
    error = value * statistics.stdev(losses) / math.sqrt(len(losses)) if len(losses) > 1 else None
    seq_len = windows.shape[1]
    return Perplexity(
        perplexity=value,
        standard_error=error,
        num_tokens=len(windows) * (seq_len - 1),
        num_windows=len(windows),
        seq_len=seq_len,
    )
