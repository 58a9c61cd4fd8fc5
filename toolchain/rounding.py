"""How far rounded matrices are from their source's, and how far is too far."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

# By format: largest relative error of a matrix, and its gain's deviation from 1. Measured on the demo model, pruned and
# not: int4 0.104 and 0.006 (ONNX), int8 0.011 and 0.002, fp8 0.027 and 0.0012, w4a16 0.34 and 0.006. GPTQ, in w4a16,
# makes up for what one weight loses with others of its row, so its weights are further off than its results; a row with
# one very large weight is rounded more coarsely in int8 than any of the demo model's.
ROUNDING_LIMITS: Mapping[str, tuple[float, float]] = {
    "int4": (0.2, 0.02),
    "int8": (0.05, 0.01),
    "fp8": (0.06, 0.01),
    "w4a16": (0.6, 0.03),
}
# A column that rounding left of its size points where it did; two swapped ones are at right angles to their sources.
_LEAST_SIMILARITY = 0.5


@dataclass(frozen=True, kw_only=True)
class RoundedMatrix:
    """One weight as an export holds it.

    Attributes:
        name: The weight in the checkpoint's words; the head's is ``lm_head.weight`` even where it is the embedding.
        weight_format: A key of :data:`ROUNDING_LIMITS`.
        relative_error: Frobenius norm of the difference to the source, over that of the source.
        gain: Projection on the source, 1 for a fair rounding: ``<rounded, source> / <source, source>``.
        column_similarity: Smallest cosine between a column (of a ``down_proj``: a neuron) and the source's. Columns of
            which rounding left less than half, or made more than twice, do not count: they are too small for their
            block's scale.
    """

    name: str
    weight_format: str
    relative_error: float
    gain: float
    column_similarity: float


def measure_rounding(name: str, weight_format: str, rounded: torch.Tensor, source: torch.Tensor) -> RoundedMatrix:
    """Compares a rounded matrix with its source, in float64."""
    rounded, source = rounded.double(), source.double().cpu()
    tiny = torch.finfo(torch.float64).tiny
    square = (source * source).sum().clamp_min(tiny)
    before, after = source.norm(dim=0).clamp_min(tiny), rounded.norm(dim=0).clamp_min(tiny)
    cosines = ((rounded * source).sum(0) / (before * after))[(after > before / 2) & (after < before * 2)]
    return RoundedMatrix(
        name=name,
        weight_format=weight_format,
        relative_error=float((rounded - source).norm() / square.sqrt()),
        gain=float((rounded * source).sum() / square),
        column_similarity=float(cosines.min()) if len(cosines) else 0.0,
    )


def rounding_checks(rounded: Sequence[RoundedMatrix]) -> dict[str, dict[str, Any]]:
    """Checks for each format: the worst matrix, by name."""
    checks: dict[str, dict[str, Any]] = {}
    for weight_format in sorted({matrix.weight_format for matrix in rounded}):
        matrices = [matrix for matrix in rounded if matrix.weight_format == weight_format]
        error_limit, gain_limit = ROUNDING_LIMITS[weight_format]
        worst = max(matrices, key=lambda matrix: _nan_last(matrix.relative_error))
        skewed = max(matrices, key=lambda matrix: _nan_last(abs(matrix.gain - 1)))
        checks[f"{weight_format}_relative_error"] = _check(worst.relative_error, error_limit) | {"matrix": worst.name}
        checks[f"{weight_format}_gain"] = _check(abs(skewed.gain - 1), gain_limit) | {"matrix": skewed.name}
        moved = max(matrices, key=lambda matrix: _nan_last(1 - matrix.column_similarity))
        moved_by = _check(1 - moved.column_similarity, 1 - _LEAST_SIMILARITY)
        checks[f"{weight_format}_moved_column"] = moved_by | {"matrix": moved.name}
    return checks


def _nan_last(value: float) -> tuple[bool, float]:
    """A key by which a NaN is the largest number there is."""
    return math.isnan(value), value


def _check(value: float, limit: float) -> dict[str, Any]:
    # Not `value > limit`: a NaN must fail.
    return {"passed": bool(value <= limit), "value": value, "limit": limit}
