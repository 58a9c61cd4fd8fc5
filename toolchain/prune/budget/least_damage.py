"""The least damaging shape that costs no more than it may: widths of FFNs, and how many attentions go. Pure arithmetic.

A multiple-choice knapsack (one width of several per layer, one number of attentions of several, a few budgets), solved
by the integer programming of SciPy (HiGHS).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from toolchain.costs.parts import PartCosts
from toolchain.errors import SenteiError

# No layer is narrowed below this share of the mean width of those that may be: scores of neurons say little of what
# losing most of them does.
FLOOR = 0.5
# The solver stops where it has proven that no shape does less damage by more than this share; or after so many nodes,
# with the best shape until then. A limit on time would find other shapes on slower machines.
_GAP, _MOST_NODES = 1e-4, 20_000
# By so much the solver may break a constraint.
_ROUNDING = 1e-6


@dataclass(frozen=True, kw_only=True)
class Damages:
    """What each choice is predicted to do to the loss, in nats per token.

    Attributes:
        widths: The widths that a layer may have, ascending; the last is the full one.
        scores: float64 ``[num_layers, len(widths)]``: the sum of the scores of the neurons that a layer loses at each
            width, 0 at the last; infinite where the layer may not have that width.
        curve: Pairs of summed scores of all layers and the damage that was measured there, ascending from ``(0, 0)``.
        attentions: Damage without the 0, 1, 2 ... least damaging attentions; the first is 0.
    """

    widths: tuple[int, ...]
    scores: NDArray[np.float64]
    curve: tuple[tuple[float, float], ...]
    attentions: tuple[float, ...]

    @property
    def lines(self) -> list[tuple[float, float]]:
        """Slopes and intercepts whose highest is the curve, made convex and nowhere falling."""
        hull = [(0.0, 0.0)]
        for point in self.curve:
            if point[0] <= hull[-1][0]:
                continue
            while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], point):
                hull.pop()
            hull.append(point)
        slopes = [max(0.0, _slope(one, other)) for one, other in pairwise(hull)]
        return [(slope, y - slope * x) for slope, (x, y) in zip(slopes, hull, strict=False)] or [(0.0, 0.0)]

    def of(self, choice: "Choice") -> float:
        """The damage of a shape."""
        return sum(self.of_ffns(choice)) + self.attentions[choice.num_removals]

    def of_ffns(self, choice: "Choice") -> list[float]:
        """The damage of its FFNs, divided among the layers as the scores are that they lose."""
        places = [self.widths.index(width) for width in choice.widths]
        scores = self.scores[np.arange(len(places)), places]
        total = float(scores.sum())
        damage = max(slope * total + intercept for slope, intercept in self.lines)
        return (scores * (damage / total if total else 0.0)).tolist()


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a quantity may come to: that of the whole model is at most ``most``.

    Attributes:
        costs: Of each part.
        most: What they may add up to.
        spared: By the number of attentions that stay, from none on: how much less these cost together. Empty for
            nothing.
    """

    costs: PartCosts
    most: float
    spared: tuple[float, ...] = ()

    def of(self, widths: Sequence[int], num_attentions: int) -> float:
        """What a model costs."""
        return self.of_attentions(num_attentions) + float(self.costs.of_widths(widths).sum())

    def of_attentions(self, number: int) -> float:
        """What so many attentions cost, with what belongs to no layer."""
        spared = self.spared[number] if self.spared else 0.0
        return self.costs.outside + number * self.costs.attention - spared

    def used(self, choice: "Choice") -> float:
        """The share of it that a shape uses; above 1 it is exceeded."""
        return self.of(choice.widths, len(choice.widths) - choice.num_removals) / self.most


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Each layer's FFN width, and how many attentions go."""

    widths: tuple[int, ...]
    num_removals: int


def least_damage(damages: Damages, budgets: Sequence[Budget]) -> Choice | None:
    """The least damaging shape within all budgets; ``None`` if there is none.

    Raises:
        SenteiError: The solver gave up.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    num_layers, num_widths = damages.scores.shape
    num_x, num_y = damages.scores.size, len(damages.attentions)
    allowed = np.isfinite(damages.scores)
    scores = np.where(allowed, damages.scores, 0.0).ravel()
    # Variables: x [layer, width] and y [number of removals], binary, and last the damage of all FFNs.
    objective = np.concatenate([np.zeros(num_x), damages.attentions, [1.0]])
    upper = np.concatenate([allowed.ravel().astype(float), np.ones(num_y), [np.inf]])
    one_each = np.zeros((num_layers + 1, len(objective)))
    for layer in range(num_layers):
        one_each[layer, layer * num_widths : (layer + 1) * num_widths] = 1
    one_each[-1, num_x:-1] = 1
    constraints = [
        LinearConstraint(one_each, 1, 1),
        LinearConstraint(_floors(damages), -_ROUNDING, np.inf),
        LinearConstraint(np.array([_row(damages, budget) for budget in budgets]), -np.inf, 1 - 2 * _ROUNDING),
        LinearConstraint(
            np.array([[*(-slope * scores), *[0.0] * num_y, 1.0] for slope, _ in damages.lines]),
            [intercept for _, intercept in damages.lines],
            np.inf,
        ),
    ]
    found = milp(
        objective,
        integrality=np.concatenate([np.ones(num_x + num_y), [0]]),
        bounds=Bounds(np.zeros(len(objective)), upper),
        constraints=constraints,
        options={"mip_rel_gap": _GAP, "node_limit": _MOST_NODES},
    )
    if found.status == 2:
        return None
    if found.x is None:
        raise SenteiError(f"The solver found no shape for the target ({found.message}).", "Raise --align.")
    x, y = found.x[:num_x].reshape(num_layers, num_widths), found.x[num_x:-1]
    return Choice(widths=tuple(damages.widths[int(place)] for place in x.argmax(1)), num_removals=int(y.argmax()))


def _row(damages: Damages, budget: Budget) -> NDArray[np.float64]:
    """What each variable uses of a budget: the whole of it is 1."""
    num_layers = len(damages.scores)
    attentions = [budget.of_attentions(num_layers - number) for number in range(len(damages.attentions))]
    ffn = np.tile(budget.costs.of_widths(damages.widths), num_layers)
    return np.concatenate([ffn, attentions, [0.0]]) / budget.most


def _floors(damages: Damages) -> NDArray[np.float64]:
    """Each free layer's width, less so much of their mean width as it must have at least; of the others nothing."""
    num_widths, free = len(damages.widths), np.flatnonzero(np.isfinite(damages.scores).sum(1) > 1)
    widths = np.asarray(damages.widths, np.float64) / damages.widths[-1]
    rows = np.zeros((len(damages.scores), damages.scores.size + len(damages.attentions) + 1))
    for layer in free:
        rows[free, layer * num_widths : (layer + 1) * num_widths] = -FLOOR / len(free) * widths
    for layer in free:
        rows[layer, layer * num_widths : (layer + 1) * num_widths] += widths
    return rows


def _slope(one: tuple[float, float], other: tuple[float, float]) -> float:
    return (other[1] - one[1]) / (other[0] - one[0])
