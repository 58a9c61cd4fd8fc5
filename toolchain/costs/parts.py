"""What a model costs, part by part: what belongs to no layer, an attention, and an FFN by its width. Pure arithmetic.

Costs add up: a token passes through one layer after another. An FFN's cost is piecewise linear between the widths that
were measured. Any quantity that adds up can be costed so: milliseconds of a phase, bytes of weights, bytes of KV cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from toolchain.architecture.layout import LayerLayout
from toolchain.errors import SenteiError


@dataclass(frozen=True, kw_only=True)
class PartCosts:
    """The costs of one quantity, in its unit.

    Attributes:
        outside: What belongs to no layer: embedding, head, sampling, scheduling.
        attention: One layer's attention with its norm; nothing where it is removed.
        widths: FFN widths whose cost is known, ascending.
        ffn: What one layer's FFN costs at each of them, with its norm.
    """

    outside: float
    attention: float
    widths: tuple[int, ...]
    ffn: tuple[float, ...]

    def of_widths(self, widths: Sequence[int]) -> NDArray[np.float64]:
        """Costs of one layer's FFN, float64 ``[len(widths)]``; widths are within those that are known."""
        return np.interp(np.asarray(widths, np.float64), self.widths, self.ffn)

    def of(self, layout: Sequence[LayerLayout]) -> float:
        """The whole model's cost."""
        widths = [layer.intermediate_size for layer in layout]
        num_attentions = sum(layer.attention for layer in layout)
        return float(self.outside + num_attentions * self.attention + self.of_widths(widths).sum())


def add(one: PartCosts, other: PartCosts, times: float) -> PartCosts:
    """``one + times * other``, part by part; both know the same widths."""
    assert one.widths == other.widths
    return PartCosts(
        outside=one.outside + times * other.outside,
        attention=one.attention + times * other.attention,
        widths=one.widths,
        ffn=tuple(first + times * second for first, second in zip(one.ffn, other.ffn, strict=True)),
    )


def fit_parts(layouts: Sequence[Sequence[LayerLayout]], values: Sequence[float], widths: Sequence[int]) -> PartCosts:
    """The costs that explain what whole models cost, by non-negative least squares on relative errors.

    No part costs less than nothing, and no FFN less than a narrower one: where noise says otherwise, the two cost the
    same.

    Args:
        layouts: Of the models; they must tell the parts apart (another depth, no attentions, each width).
        values: What each costs, above 0.
        widths: Where the FFN's cost may bend, ascending; no width of a layout is outside of them.

    Raises:
        SenteiError: The models do not tell the parts apart.
    """
    from scipy.optimize import nnls

    knots = np.asarray(widths, np.float64)
    rows = np.array([_row(layout, knots) for layout in layouts])
    if np.linalg.matrix_rank(rows) < rows.shape[1]:
        raise SenteiError("The models that were measured do not tell the costs of their parts apart.", "Profile again.")
    weights = 1 / np.asarray(values, np.float64)
    # Columns of one size, so that the rank that the solver sees does not depend on how wide or deep the models are.
    scale = np.linalg.norm(rows * weights[:, None], axis=0)
    found, _ = nnls(rows * weights[:, None] / scale, np.ones(len(rows)))
    outside, attention, *steps = (found / scale).tolist()
    return PartCosts(outside=outside, attention=attention, widths=tuple(widths), ffn=tuple(np.cumsum(steps).tolist()))


def _row(layout: Sequence[LayerLayout], knots: NDArray[np.float64]) -> NDArray[np.float64]:
    """How often a model has each unknown: outside, attention, the narrowest FFN, and each step to a wider one."""
    widths = np.asarray([layer.intermediate_size for layer in layout], np.float64)
    climbed = np.clip((widths[:, None] - knots[:-1]) / np.diff(knots), 0, 1).sum(0)
    return np.array([1.0, sum(layer.attention for layer in layout), len(layout), *climbed])
