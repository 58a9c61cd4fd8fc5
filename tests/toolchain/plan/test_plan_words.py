"""What a model card and a difference of plans say."""

import json
from pathlib import Path

from tests.serving.report.test_render import write_plan, write_summary
from toolchain.plan.model_card import model_card
from toolchain.plan.plan import load_plan
from toolchain.plan.summary_document import PRUNING_SUMMARY_FILE
from toolchain.plan.views import difference


def test_the_card_names_what_the_cost_was_measured_on(tmp_path: Path):
    write_plan(tmp_path)
    write_summary(tmp_path)
    summary = json.loads((tmp_path / PRUNING_SUMMARY_FILE).read_text())
    summary |= {"intermediate_size": [32, 40], "removed_attention": [2], "num_refitted": 0, "compensation": None}
    plan = load_plan(tmp_path)
    assert "on the calibration text" in model_card(plan, summary)
    card = model_card(plan.changed({"metric": "accuracy", "metric_source": "mine.jsonl"}), summary)
    assert "on mine.jsonl" in card
    assert "on the calibration text" not in card


def test_equal_weights_under_two_names_are_one_model(tmp_path: Path):
    for name in ("here", "org/there"):
        (tmp_path / name).mkdir(parents=True)
        write_plan(tmp_path / name, name=name)
    found = difference(load_plan(tmp_path / "here"), load_plan(tmp_path / "org/there"))
    assert found["layers"] == []
    assert list(found["settings"]) == ["base_model"]
