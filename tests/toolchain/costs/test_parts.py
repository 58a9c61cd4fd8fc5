"""Costs are told apart, or nothing is said of them."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.profile.shapes import shapes_to_measure, widths_measured
from tests.toolchain.costs.made import TPOT, make_costs
from toolchain.architecture.layout import LayerLayout
from toolchain.costs.document import read_costs
from toolchain.costs.parts import PartCosts, fit_parts
from toolchain.errors import SenteiError

COST = st.floats(0.01, 100)


@given(st.integers(2, 40), st.integers(8, 30_000), COST, COST, st.lists(COST, min_size=4, max_size=4))
def test_the_models_that_are_measured_tell_every_cost_apart(num_layers, full, outside, attention, steps):
    widths = widths_measured(full)
    ffn = tuple(sum(steps[: place + 1]) for place in range(len(widths)))
    costs = PartCosts(outside=outside, attention=attention, widths=widths, ffn=ffn)
    shapes = shapes_to_measure(full, num_layers)
    fitted = [shape.layout for shape in shapes.values() if shape.role == "fitted"]
    found = fit_parts(fitted, [costs.of(layout) for layout in fitted], widths)
    for shape in shapes.values():
        assert found.of(shape.layout) == pytest.approx(costs.of(shape.layout), rel=1e-6)
        assert all(widths[0] <= layer.intermediate_size <= full for layer in shape.layout)
    assert found.attention == pytest.approx(attention, rel=1e-3, abs=1e-6 * costs.of(fitted[0]))


def test_noise_makes_no_part_cost_less_than_nothing():
    shapes = shapes_to_measure(48, 4)
    layouts = {name: shape.layout for name, shape in shapes.items() if shape.role == "fitted"}
    values = {name: TPOT.of(layout) for name, layout in layouts.items()}
    values["ffn-24"] = 1.1 * values["whole"]  # narrower, and slower
    values["one-attention"] = 1.05 * values["whole"]
    found = fit_parts(list(layouts.values()), list(values.values()), widths_measured(48))
    assert found.attention >= 0
    assert list(found.ffn) == sorted(found.ffn)


def test_models_that_are_all_alike_tell_nothing_apart():
    layouts = [(LayerLayout(attention=True, intermediate_size=48),) * 4] * 6
    with pytest.raises(SenteiError, match="do not tell the costs"):
        fit_parts(layouts, [1.0] * 6, (12, 24, 48))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda costs: costs["tpot_ms"]["ffn"][2].__setitem__(0, 0.01), "fall as an FFN gets wider"),
        (lambda costs: costs["tpot_ms"]["attention"].__setitem__(0, -1.0), "greater than or equal to 0"),
        (lambda costs: costs["tpot_ms"]["attention"].pop(), "a number for each width and repeat"),
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
