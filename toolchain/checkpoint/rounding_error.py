"""How far rounded matrices are from their source's, and how far is too far."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import normalize

# By format: largest relative error of a matrix, its gain's deviation from 1, and the displacement of a column. Measured
# on the demo model, pruned and not: int4 (ONNX) 0.104, 0.006 and -0.06; int8 0.011, 0.002 and -0.06; fp8 0.027, 0.0012
# and -0.06; w4a16 0.34, 0.006 and 0.66. GPTQ, in w4a16, makes up for what one weight loses with others of its row, so
# its weights are further off than its results; a row with one very large weight is rounded more coarsely in int8 than
# any of the demo model's.
ROUNDING_LIMITS: Mapping[str, tuple[float, float, float]] = {
    "int4": (0.2, 0.02, 0.5),
    "int8": (0.05, 0.01, 0.5),
    "fp8": (0.06, 0.01, 0.5),
    "w4a16": (0.6, 0.03, 0.8),
}
# Of each matrix, the columns that are least like their source are looked at.
_NUM_SUSPECTS = 16


@dataclass(frozen=True, kw_only=True)
class RoundedMatrix:
    """One weight as an export holds it.

    Attributes:
        name: The weight in the checkpoint's words; the head's is ``lm_head.weight`` even where it is the embedding.
        weight_format: A key of :data:`ROUNDING_LIMITS`.
        relative_error: Frobenius norm of the difference to the source, over that of the source.
        gain: Projection on the source, 1 for a fair rounding: ``<rounded, source> / <source, source>``.
        displacement: How much more, in cosine, a column (of a ``down_proj``: a neuron) is like another of the source's
            than like its own; the largest of all columns. Of two that are swapped it is near 1; one that is merely
            too small for its block's scale is like none.
    """

    name: str
    weight_format: str
    relative_error: float
    gain: float
    displacement: float


def measure_rounding(name: str, weight_format: str, rounded: torch.Tensor, source: torch.Tensor) -> RoundedMatrix:
    """Compares a rounded matrix with its source, in float64."""
    rounded, source = rounded.double(), source.double().cpu()
    square = (source * source).sum().clamp_min(torch.finfo(torch.float64).tiny)
    return RoundedMatrix(
        name=name,
        weight_format=weight_format,
        relative_error=float((rounded - source).norm() / square.sqrt()),
        gain=float((rounded * source).sum() / square),
        displacement=_displacement(rounded, source),
    )


def _displacement(rounded: torch.Tensor, source: torch.Tensor) -> float:
    rounded, source = normalize(rounded, dim=0), normalize(source, dim=0)
    own = (rounded * source).sum(0)
    suspects = own.argsort()[:_NUM_SUSPECTS]
    others = source.T @ rounded[:, suspects]
    others[suspects, torch.arange(len(suspects))] = -1
    return float((others.max(0).values - own[suspects]).max())


def rounding_checks(rounded: Sequence[RoundedMatrix]) -> dict[str, dict[str, Any]]:
    """Checks for each format: the worst matrix, by name."""
    checks: dict[str, dict[str, Any]] = {}
    for weight_format in sorted({matrix.weight_format for matrix in rounded}):
        matrices = [matrix for matrix in rounded if matrix.weight_format == weight_format]
        error_limit, gain_limit, displacement_limit = ROUNDING_LIMITS[weight_format]
        worst = max(matrices, key=lambda matrix: _nan_last(matrix.relative_error))
        skewed = max(matrices, key=lambda matrix: _nan_last(abs(matrix.gain - 1)))
        checks[f"{weight_format}_relative_error"] = check_limit(worst.relative_error, error_limit) | {
            "matrix": worst.name
        }
        checks[f"{weight_format}_gain"] = check_limit(abs(skewed.gain - 1), gain_limit) | {"matrix": skewed.name}
        moved = max(matrices, key=lambda matrix: _nan_last(matrix.displacement))
        checks[f"{weight_format}_displacement"] = check_limit(moved.displacement, displacement_limit) | {
            "matrix": moved.name
        }
    return checks


def _nan_last(value: float) -> tuple[bool, float]:
    """A key by which a NaN is the largest number there is."""
    return math.isnan(value), value


def check_limit(value: float, limit: float) -> dict[str, Any]:
    """A check of a verdict: ``passed``, ``value`` and ``limit``, which is the largest that passes."""
    # Not `value > limit`: a NaN must fail.
    return {"passed": bool(value <= limit), "value": value, "limit": limit}
