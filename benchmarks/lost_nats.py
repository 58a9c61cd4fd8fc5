"""The share of another method's loss that is left: a figure which means the same on every model and text."""

from collections.abc import Sequence
from math import log
from statistics import fmean


def still_lost(perplexities: Sequence[float], *, original: Sequence[float], lost: Sequence[float]) -> float:
    """``ln(perplexity / original) / ln(lost / original)``, mean over the texts; each argument has one value per text.

    Args:
        perplexities: Of the model in question.
        original: Of the unpruned model.
        lost: Of the model that it is compared with.
    """
    texts = zip(perplexities, original, lost, strict=True)
    return fmean(log(each / whole) / log(other / whole) for each, whole, other in texts)
