"""Costs are told apart, or nothing is said of them."""

import json

import numpy as np
import pytest
import scipy.optimize
import scipy.stats  # noqa: F401 - before hypothesis looks at the clock
from hypothesis import given
from hypothesis import strategies as st

from serving.profile.shapes import shapes_to_measure, widths_measured
from tests.toolchain.costs.made import TPOT, make_costs
from toolchain.architecture.layout import LayerLayout
from toolchain.costs.document import ErrorRecord, PartsRecord, read_costs
from toolchain.costs.parts import PartCosts, fit_parts, tell_apart
from toolchain.errors import SenteiError

COST = st.floats(0.01, 100)


@given(st.integers(2, 40), st.integers(8, 30_000), COST, COST, st.lists(COST, min_size=3, max_size=3))
def test_the_models_that_are_measured_tell_every_cost_apart(num_layers, full, outside, attention, steps):
    widths = widths_measured(full)
    ffn = tuple(sum(steps[: place + 1]) for place in range(len(widths)))
    costs = PartCosts(outside=outside, attention=attention, widths=widths, ffn=ffn)
    shapes = shapes_to_measure(full, num_layers)
    found = fit_parts(list(shapes.values()), [[costs.of(layout)] for layout in shapes.values()], widths)
    for layout in shapes.values():
        assert found.costs.of(layout) == pytest.approx(costs.of(layout), rel=1e-6)
        assert all(widths[0] <= layer.intermediate_size <= full for layer in layout)
    assert found.costs.attention == pytest.approx(attention, rel=1e-3, abs=1e-6 * costs.of(shapes["whole"]))
    assert found.degrees_of_freedom == 7 - 5


@given(st.integers(4, 40), st.integers(64, 30_000))
def test_any_model_is_predicted_by_the_others(num_layers, full):
    """Or the check by leaving out would leave models out of the check."""
    shapes, widths = shapes_to_measure(full, num_layers), widths_measured(full)
    for name in shapes:
        assert tell_apart([layout for other, layout in shapes.items() if other != name], widths)


def test_noise_makes_no_part_cost_less_than_nothing():
    layouts = shapes_to_measure(48, 4)
    values = {name: TPOT.of(layout) for name, layout in layouts.items()}
    values["ffn-24"] = 1.1 * values["whole"]  # narrower, and slower
    values["one-attention"] = 1.05 * values["whole"]
    found = fit_parts(list(layouts.values()), [[each] for each in values.values()], widths_measured(48)).costs
    assert found.attention >= 0
    assert list(found.ffn) == sorted(found.ffn)


def test_an_interval_holds_the_truth_as_often_as_it_says():
    """Starts of servers differ by 2 %, and the whole machine by 10 % from one repeat to the next."""
    rng, widths, plan = np.random.default_rng(0), widths_measured(48), shapes_to_measure(48, 8)["mixed"]
    layouts = list(shapes_to_measure(48, 8).values())
    for repeats in (1, 3):
        hits = {"cost": 0, "gain": 0}
        for _ in range(200):
            drift = rng.normal(1, 0.1 if repeats > 1 else 0, repeats)
            values = [TPOT.of(each) * drift * rng.normal(1, 0.02, repeats) for each in layouts]
            fit = fit_parts(layouts, values, widths)
            error = ErrorRecord(covariance=fit.covariance.tolist(), degrees_of_freedom=fit.degrees_of_freedom)
            costs = fit.costs
            record = PartsRecord(
                outside=costs.outside, attention=costs.attention, widths=list(widths), ffn=list(costs.ffn), error=error
            )
            document = make_costs({}, num_layers=8).document.model_copy(update={"costs": {"tpot_ms": record}})
            cost, gain = document.predicted("tpot_ms", plan), document.predicted_gain("tpot_ms", plan)
            hits["cost"] += cost.low <= TPOT.of(plan) <= cost.high
            hits["gain"] += gain.low <= TPOT.of(document.whole) / TPOT.of(plan) <= gain.high
        assert 180 <= hits["gain"] <= 200
        assert 170 <= hits["cost"] <= 200


def test_models_that_are_all_alike_tell_nothing_apart():
    layouts = [(LayerLayout(attention=True, intermediate_size=48),) * 4] * 6
    with pytest.raises(SenteiError, match="do not tell the costs"):
        fit_parts(layouts, [[1.0]] * 6, (12, 24, 48))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda costs: costs["tpot_ms"]["ffn"].__setitem__(2, 0.01), "fall as an FFN gets wider"),
        (lambda costs: costs["tpot_ms"].__setitem__("attention", -1.0), "greater than or equal to 0"),
        (lambda costs: costs["tpot_ms"]["ffn"].pop(), "a number for each width"),
        (lambda costs: costs["tpot_ms"]["error"]["covariance"].pop(), "not as many rows and columns"),
        (lambda costs: costs["tpot_ms"]["error"]["covariance"][1].pop(), "not as many rows and columns"),
        (lambda costs: costs["tpot_ms"]["widths"].__setitem__(-1, 40), "widths must ascend from 1 or more to 48"),
        (lambda costs: costs.pop("weight_bytes"), "has no costs of weight_bytes"),
    ],
)
def test_costs_that_cannot_be_are_refused(tmp_path, change, says):
    content = make_costs({}).document.content()
    (tmp_path / "costs.json").write_text(json.dumps(content))
    assert read_costs(tmp_path / "costs.json").document.content() == content
    change(content["costs"])
    (tmp_path / "costs.json").write_text(json.dumps(content))
    with pytest.raises(SenteiError, match=says):
        read_costs(tmp_path / "costs.json")
