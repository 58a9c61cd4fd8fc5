"""How far an export's answers may be from the reference's: a multiple of the model's own noise.

A model's noise is how far its own answers to the same prompts move between two ways to compute them: as the reference
computes, and as the engine does. docs/decisions/verification.md has the measurements behind the margins.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from serving.verify.answers import Differences
from toolchain.checkpoint.rounding_error import check_limit

Checks = dict[str, dict[str, Any]]  # by name, as they are written

# Times the noise. Maxima come from a few tokens to which a model is very sensitive: outside float32 they tell nothing,
# and in float32 one draw of rounding errors can be many times another (a right export came to 5.3). Damages of a single
# matrix come to 1,000 and more there. Greedy tokens are few, so their noise is that of the likeliest tokens after every
# prefix of the prompts.
MARGINS: Mapping[str, float] = {
    "max_difference": 100.0,
    "mean_difference": 2.0,
    "median_difference": 1.5,
    "greedy_margin": 4.0,
}
# Below this, in nats, engines differ by how they write a log-probability down in float32.
FLOOR = 1e-5
# Two of 64 greedy tokens may come where the model itself is undecided; each counts as 1 nat.
_GREEDY_FLOOR = 2 / 64
# By what rounding to a format may do: largest fraction of other likeliest tokens, and factor on perplexity. Measured on
# the demo model: int8 0.016 | 1.002, int4 0.16 | 1.12; on itself with attention gone in layers 12 and 27: int8 0.057 |
# 1.011, int4 0.32 | 1.42. With attention gone in layers 0 and 12 it has lost most of what it knew; int8 does 0.085 |
# 1.07 there, and int4 0.41 | 1.55, which is refused: nobody should serve that.
_ROUNDING_EFFECTS = {"onnx-int8": (0.15, 1.1), "int4": (0.4, 1.5)}


def other_dtype(engine: torch.dtype, reference: torch.dtype) -> torch.dtype:
    """What noise is measured in beside the reference's dtype: the engine's, or a finer one where both are the same."""
    if engine != reference:
        return engine
    return torch.float64 if reference == torch.float32 else torch.float32


def limits_from(noise: Differences, *, judges_maxima: bool) -> dict[str, float]:
    """The largest accepted differences, in nats.

    Args:
        noise: The model's own.
        judges_maxima: Whether the largest difference is looked at.
    """
    measured = noise_by_check(noise)
    limits = {name: margin * measured[name] + FLOOR for name, margin in MARGINS.items()}
    limits["greedy_margin"] += _GREEDY_FLOOR
    if not judges_maxima:
        del limits["max_difference"]
    return limits


def noise_by_check(noise: Differences) -> dict[str, float]:
    """A model's noise, by the names of what is judged by it."""
    return {
        "max_difference": noise.max_difference,
        "mean_difference": noise.mean_difference,
        "median_difference": noise.median_difference,
        "greedy_margin": noise.choice_margin,
    }


def judge(differences: Differences, limits: Mapping[str, float]) -> Checks:
    """Compares each difference that could be measured with its limit."""
    measured = asdict(differences)
    return {name: check_limit(measured[name], limit) for name, limit in limits.items() if measured[name] is not None}


def judge_rounding(precision: str, rounding: Differences | None) -> Checks:
    """Whether rounding left enough of the model, where a precision has limits for it."""
    if rounding is None or precision not in _ROUNDING_EFFECTS:
        return {}
    other, factor = _ROUNDING_EFFECTS[precision]
    return {
        "rounding_top1_disagreement": check_limit(1 - rounding.top1_agreement, other),
        "rounding_perplexity_ratio": check_limit(rounding.perplexity_ratio, factor),
    }
