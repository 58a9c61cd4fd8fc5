"""What a target was bought with adds up to the plan's own costs and damage."""

import pytest

from tests.serving.report.test_render import target_of
from toolchain.architecture.layout import LayerLayout
from toolchain.plan.bought import bought, bought_of_layer
from toolchain.plan.summary_words import bought_in_words

WIDTHS = [32, 40, 32, 48]


def test_parts_add_up_to_the_model():
    target = target_of(WIDTHS)
    parts = target.costs["ms_per_output_token"].parts
    layout = [LayerLayout(attention=layer != 2, intermediate_size=width) for layer, width in enumerate(WIDTHS)]
    whole = [LayerLayout(attention=True, intermediate_size=48)] * 4
    found = bought(target)
    assert sum(each.ms_before for each in found) == pytest.approx(parts.of(whole))
    assert sum(each.ms_after for each in found) == pytest.approx(parts.of(layout))
    assert sum(each.damage for each in found) == pytest.approx(target.followed.predicted_damage)
    layers = [
        bought_of_layer(target, layer, width=width, attends=layer != 2, damage=0.2 if layer == 2 else 0.0)
        for layer, width in enumerate(WIDTHS)
    ]
    for place, part in ((0, "attention"), (1, "ffn")):
        [together] = [each for each in found if each.part == part]
        for name in ("ms_before", "ms_after", "kv_before", "kv_after", "count_before", "count_after", "damage"):
            assert sum(getattr(each[place], name) for each in layers) == pytest.approx(getattr(together, name))


def test_what_was_given_for_nothing_has_no_price():
    target = target_of(WIDTHS)
    assert [each.ms_per_nat for each in bought_of_layer(target, 0, width=48, attends=True, damage=0.0)] == [None, None]
    assert bought(target.model_copy(update={"taken": None})) == []
    assert bought_in_words(None) == []
    lines = bought_in_words(target.model_dump())
    assert lines[2] == "attentions   4 → 3: 2 → 1.5 ms, 0.2 nats: 2.5 ms and 320 KV bytes per nat"
    assert len(lines) == 4
