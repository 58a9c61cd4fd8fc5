"""The solver against every shape that there is, on costs that nobody measured."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from toolchain.costs.parts import PartCosts
from toolchain.prune.budget.least_damage import FLOOR, Budget, Choice, Damages, least_damage

WIDTHS = (2, 3, 6, 8)
NUMBER = st.floats(0, 10, allow_subnormal=False).map(lambda value: round(value, 3))


@st.composite
def costs(draw):
    ffn = np.cumsum([draw(NUMBER) for _ in range(3)])
    return PartCosts(outside=draw(NUMBER) + 0.1, attention=draw(NUMBER), widths=(2, 5, 8), ffn=tuple(ffn.tolist()))


@st.composite
def damages(draw, num_layers=3):
    steps = [[draw(NUMBER) for _ in WIDTHS[1:]] for _ in range(num_layers)]
    scores = np.array([[*np.cumsum(each)[::-1], 0.0] for each in steps])
    if draw(st.booleans()):
        scores[draw(st.integers(0, num_layers - 1)), :-1] = np.inf  # protected
    points = sorted({draw(NUMBER) + 0.1 for _ in range(3)})
    curve = ((0.0, 0.0), *((x, draw(NUMBER) - 1) for x in points))
    attentions = (0.0, *(draw(NUMBER) - 1 for _ in range(draw(st.integers(0, num_layers)))))
    return Damages(widths=WIDTHS, scores=scores, curve=curve, attentions=attentions)


def every_shape(damages):
    for places in itertools.product(range(len(WIDTHS)), repeat=len(damages.scores)):
        widths = [WIDTHS[place] for place in places]
        free = [width for width, each in zip(widths, damages.scores, strict=True) if np.isfinite(each[0])]
        if min(free) < FLOOR * sum(free) / len(free):
            continue
        if not all(np.isfinite(damages.scores[layer, place]) for layer, place in enumerate(places)):
            continue
        for number in range(len(damages.attentions)):
            yield Choice(widths=tuple(widths), num_removals=number)


@settings(max_examples=150, deadline=None)
@given(damages(), st.lists(st.tuples(costs(), st.floats(0.05, 1.1)), min_size=1, max_size=3))
def test_it_is_the_best_of_all_shapes(damages, asked):
    whole = Choice(widths=(WIDTHS[-1],) * len(damages.scores), num_removals=0)
    budgets = [Budget(costs=each, most=share * Budget(costs=each, most=1.0).used(whole)) for each, share in asked]
    found = least_damage(damages, budgets)

    def excess(choice):
        return max(budget.used(choice) for budget in budgets)

    # A hair's breadth beyond a budget is rounding, for the solver as for whoever adds up.
    possible = [damages.of(each) for each in every_shape(damages) if excess(each) <= 1 - 5e-6]
    if found is None:
        assert not possible
        return
    assert found in list(every_shape(damages))
    assert excess(found) <= 1
    if possible:
        best = min(possible)
        assert damages.of(found) <= best + 1e-4 * abs(best) + 1e-6


def test_where_all_ffns_are_protected_attentions_go_alone():
    scores = np.array([[np.inf, np.inf, np.inf, 0.0]] * 3)
    damages = Damages(widths=WIDTHS, scores=scores, curve=((0, 0), (0, 0)), attentions=(0, 0.3, 0.9))
    costs = PartCosts(outside=1.0, attention=2.0, widths=(2, 8), ffn=(1.0, 2.0))
    assert least_damage(damages, [Budget(costs=costs, most=11.5)]) == Choice(widths=(8, 8, 8), num_removals=1)
    assert least_damage(damages, [Budget(costs=costs, most=8.0)]) is None


def test_damage_that_grows_faster_than_scores_is_shared_with_attentions():
    """A straight line would take all from the FFNs, whose first neurons cost nothing."""
    scores = np.array([[3.0, 2.0, 1.0, 0.0]] * 4)
    cheap = PartCosts(outside=1.0, attention=2.0, widths=(2, 8), ffn=(2.0, 8.0))
    straight = Damages(widths=WIDTHS, scores=scores, curve=((0, 0), (12, 1.2)), attentions=(0, 0.3, 0.9))
    bent = Damages(widths=WIDTHS, scores=scores, curve=((0, 0), (4, 0.4), (12, 6.0)), attentions=(0, 0.3, 0.9))
    budget = [Budget(costs=cheap, most=0.7 * 41.0)]
    assert least_damage(straight, budget).num_removals == 0
    assert least_damage(bent, budget).num_removals > 0


def test_a_real_size_is_solved_in_seconds():
    rng = np.random.default_rng(0)
    widths = tuple(range(3584, 14337, 256))
    scores = np.array([[*np.cumsum(np.sort(rng.random(len(widths) - 1)))[::-1], 0.0] for _ in range(32)])
    attentions = tuple((0.002 * np.arange(41) ** 2).tolist())
    damages = Damages(widths=widths, scores=scores, curve=((0, 0), (300, 0.3), (900, 2.0)), attentions=attentions)
    times = [
        PartCosts(outside=6.0, attention=0.05, widths=(3584, 14336), ffn=(0.06, 0.2)),
        PartCosts(outside=9.0, attention=0.9, widths=(3584, 14336), ffn=(0.5, 2.1)),
    ]
    whole = Choice(widths=(14336,) * 32, num_removals=0)
    budgets = [Budget(costs=each, most=Budget(costs=each, most=1.0).used(whole) / 1.3) for each in times]
    found = least_damage(damages, budgets)
    assert all(0.99 < budget.used(found) <= 1 for budget in budgets[:1])
    assert max(budget.used(found) for budget in budgets) <= 1


def test_attentions_that_cost_less_together_are_counted_so():
    """Of three attentions at 2 each, the last to stay spares 1.5: to remove one of them saves no more than 0.5."""
    scores = np.array([[np.inf, np.inf, np.inf, 0.0]] * 3)
    damages = Damages(widths=WIDTHS, scores=scores, curve=((0, 0), (0, 0)), attentions=(0, 0.3, 0.9))
    costs = PartCosts(outside=1.0, attention=2.0, widths=(2, 8), ffn=(1.0, 2.0))
    spared = (0.0, 0.0, 0.0, 1.5)
    for most, removals in ((11.6, 0), (11.1, 1), (10.9, 2), (8.9, None)):
        found = least_damage(damages, [Budget(costs=costs, most=most, spared=spared)])
        assert (found and found.num_removals) == removals
