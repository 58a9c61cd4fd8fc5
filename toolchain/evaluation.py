"""Perplexity: ``exp`` of the mean negative log-likelihood of the next token, over non-overlapping windows."""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from toolchain.errors import SenteiError

_HEAD_CHUNK_TOKENS = 512


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
def perplexity(
    model: PreTrainedModel, windows: torch.Tensor, *, on_window: Callable[[], None] = lambda: None
) -> Perplexity:
    """Measures perplexity; losses are computed in float32 whatever the model's dtype, and summed in float64.

    Args:
        model: Pruned or not.
        windows: int64 ``[num_windows, seq_len]``.
        on_window: Called after each window, for progress.

    Raises:
        SenteiError: The result is NaN or Inf.
    """
    losses = []
    for window in windows:
        hidden = model.base_model(window[None].to(model.device), use_cache=False).last_hidden_state
        losses.append(mean_loss(model, hidden, window[None]))
        on_window()
    mean = statistics.fmean(losses)
    value = finite(math.exp(mean) if mean < 700 else math.inf, model)
    error = value * statistics.stdev(losses) / math.sqrt(len(losses)) if len(losses) > 1 else None
    seq_len = windows.shape[1]
    return Perplexity(
        perplexity=value,
        standard_error=error,
        num_tokens=len(windows) * (seq_len - 1),
        num_windows=len(windows),
        seq_len=seq_len,
    )


def mean_loss(model: PreTrainedModel, hidden: torch.Tensor, ids: torch.Tensor) -> float:
    """Mean next-token loss in nats; the head runs over chunks of tokens, so that not all logits exist at once.

    Args:
        model: For its head.
        hidden: ``[1, seq_len, hidden_size]``, after the final norm.
        ids: int64 ``[1, seq_len]``.
    """
    targets = ids[0, 1:].to(hidden.device)
    head = model.get_output_embeddings()
    total = torch.zeros((), dtype=torch.float64)
    for start in range(0, len(targets), _HEAD_CHUNK_TOKENS):
        chunk = slice(start, min(start + _HEAD_CHUNK_TOKENS, len(targets)))
        logits = head(hidden[0, chunk]).float()
        total += cross_entropy(logits, targets[chunk], reduction="sum").double().cpu()
    return float(total) / len(targets)


def finite(value: float, model: PreTrainedModel) -> float:
    """Passes a finite metric through.

    Raises:
        SenteiError: NaN or Inf.
    """
    if not math.isfinite(value):
        raise SenteiError(f"The perplexity is {value} in {model.dtype}.", "Compute in another --dtype (float32).")
    return value
