"""Who is to blame for NaN and Inf: the weights, or what is computed in."""

import torch
from torch import nn

from toolchain.errors import SenteiError


def not_finite(what: str, model: nn.Module, dtype: torch.dtype) -> SenteiError:
    """The error for something that is NaN or Inf.

    Args:
        what: In words, up to the dtype: ``"The perplexity is nan"``.
        model: It was measured with; every weight in memory is looked at.
        dtype: Computed in.
    """
    for name, weight in model.named_parameters():
        if not weight.is_meta and (found := _found_in(weight, dtype)):
            hint = f"Weight {name} holds {found}: the model is damaged. Download or copy it again."
            return SenteiError(f"{what} in {dtype}.", hint)
    if dtype in (torch.float32, torch.float64):
        return SenteiError(f"{what} in {dtype}.", "The model is damaged, or cannot be computed. Copy it again.")
    return SenteiError(f"{what} in {dtype}.", "Compute in another --dtype (float32).")


def _found_in(weight: torch.Tensor, dtype: torch.dtype) -> str | None:
    if bool(weight.isnan().any()):
        return "NaN"
    # In float16 it may be a number that float32 holds.
    return "Inf" if dtype is not torch.float16 and bool(weight.isinf().any()) else None
