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

    def counts(self, layout: Sequence[LayerLayout]) -> NDArray[np.float64]:
        """How often a model has each cost, float64 ``[2 + len(widths)]``: outside, attention, each width's FFN.

        A width between two that are known is part the one and part the other.
        """
        widths = np.asarray([layer.intermediate_size for layer in layout], np.float64)
        shares = [np.interp(widths, self.widths, each).sum() for each in np.eye(len(self.widths))]
        return np.array([1.0, sum(layer.attention for layer in layout), *shares])


def add(one: PartCosts, other: PartCosts, times: float) -> PartCosts:
    """``one + times * other``, part by part; both know the same widths."""
    assert one.widths == other.widths
    return PartCosts(
        outside=one.outside + times * other.outside,
        attention=one.attention + times * other.attention,
        widths=one.widths,
        ffn=tuple(first + times * second for first, second in zip(one.ffn, other.ffn, strict=True)),
    )


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Costs fitted to measurements, and how far they can be trusted.

    Attributes:
        costs: The fitted costs.
        covariance: float64 ``[2 + len(widths), 2 + len(widths)]``, of outside, attention and each width's FFN.
        degrees_of_freedom: Of its estimate: measurements beyond the unknowns.
    """

    costs: PartCosts
    covariance: NDArray[np.float64]
    degrees_of_freedom: int


def tell_apart(layouts: Sequence[Sequence[LayerLayout]], widths: Sequence[int]) -> bool:
    """Whether models of these layers tell every cost apart."""
    rows = np.array([_row(layout, np.asarray(widths, np.float64)) for layout in layouts])
    return bool(np.linalg.matrix_rank(rows) == rows.shape[1])


def fit_parts(
    layouts: Sequence[Sequence[LayerLayout]], values: Sequence[Sequence[float]], widths: Sequence[int]
) -> Fit:
    """The costs that explain what whole models cost, by non-negative least squares on relative errors.

    No part costs less than nothing, and no FFN less than a narrower one: where noise says otherwise, the two cost the
    same. The machine may be faster in one repeat than in another: each repeat's values are first divided by that
    repeat's own factor, the geometric mean over the models. What is left of the values beside the fit estimates the
    error of all costs: differences between starts, noise, and what does not add up. The factors' spread is added to it
    as an error that all costs share, which a ratio of two models does not see.

    Args:
        layouts: Of the models; they must tell the parts apart (another depth, fewer attentions, each width).
        values: What each costs, above 0; one number per repeat, equally many for each model.
        widths: Where the FFN's cost may bend, ascending; no width of a layout is outside of them.

    Raises:
        SenteiError: The models do not tell the parts apart.
    """
    from scipy.optimize import nnls

    if not tell_apart(layouts, widths):
        raise SenteiError("The models that were measured do not tell the costs of their parts apart.", "Profile again.")
    rows = np.array([_row(layout, np.asarray(widths, np.float64)) for layout in layouts])
    measured = np.asarray(values, np.float64)
    repeats, unknowns = measured.shape[1], rows.shape[1]
    factors = np.exp(np.log(measured).mean(0))
    factors /= factors.mean()
    measured = measured / factors
    weights = 1 / measured.mean(1)
    # Columns of one size, so that the rank that the solver sees does not depend on how wide or deep the models are.
    scale = np.linalg.norm(rows * weights[:, None], axis=0)
    found = nnls(rows * weights[:, None] / scale, np.ones(len(rows)))[0] / scale
    relative = rows * weights[:, None]
    degrees = measured.size - unknowns - (repeats - 1)
    variance = (((measured - (rows @ found)[:, None]) * weights[:, None]) ** 2).sum() / max(degrees, 1)
    # From the steps between widths to the widths themselves.
    to_widths = np.eye(unknowns)
    to_widths[2:, 2:] = np.tri(unknowns - 2)
    costs = to_widths @ found
    covariance = to_widths @ np.linalg.inv(relative.T @ relative) @ to_widths.T * variance / repeats
    if repeats > 1:
        covariance += np.outer(costs, costs) * factors.var(ddof=1) / repeats
    outside, attention, *ffn = costs.tolist()
    return Fit(
        costs=PartCosts(outside=outside, attention=attention, widths=tuple(widths), ffn=tuple(ffn)),
        covariance=covariance,
        degrees_of_freedom=degrees,
    )


def _row(layout: Sequence[LayerLayout], knots: NDArray[np.float64]) -> NDArray[np.float64]:
    """How often a model has each unknown: outside, attention, the narrowest FFN, and each step to a wider one."""
    widths = np.asarray([layer.intermediate_size for layer in layout], np.float64)
    climbed = np.clip((widths[:, None] - knots[:-1]) / np.diff(knots), 0, 1).sum(0)
    return np.array([1.0, sum(layer.attention for layer in layout), len(layout), *climbed])
