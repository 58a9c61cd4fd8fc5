"""``plan.json`` says of itself what is true, and plans of version 1 are read as what they meant."""

import json
from pathlib import Path

import pytest

from tests.command_line import refused, sentei
from toolchain.plan.document import CompensationRecord, upgraded
from toolchain.plan.model_card import model_card
from toolchain.plan.plan import PLAN_FILE, SCORES_FILE, load_plan

WRITTEN = Path(__file__).parents[2] / "fixtures" / "written"
SETTINGS = ("--samples", 2, "--seq-len", 16, "--sparsity", 0.4)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("the quick brown fox jumps over the lazy dog " * 40)
    return file


def of_version_1(content: dict) -> dict:
    """The plan as version 1 wrote it."""
    blocks = content["widths"] is None
    method = content["method"]
    old = {key: value for key, value in content.items() if key != "evopress_budget"} | {"schema_version": 1}
    if content["compensation"] is not None:
        old["method"] = f"{method}, compensated"
    if blocks:
        old |= {"allocation": method, "widths": "whole", "search": content.get("evopress_budget") or "exact"}
    return old


@pytest.mark.parametrize(
    ("directory", "method", "budget", "compensates"),
    [
        ("prune", "2ssp", None, True),
        ("sweep/0.2", "2ssp", None, True),
        ("prune-shortgpt", "shortgpt", None, False),
        ("prune-evopress", "evopress", "small", False),
    ],
)
def test_version_1_is_read_as_what_it_meant(directory: str, method: str, budget: str | None, compensates: bool):
    old = json.loads((WRITTEN / directory / PLAN_FILE).read_text())
    document = load_plan(WRITTEN / directory, needs_scores=False).document
    assert (document.method, document.evopress_budget) == (method, budget)
    assert (document.compensation is not None) == compensates
    choices = (document.allocation, document.widths, document.search)
    assert choices == (("formula", "ranked", "exact") if method == "2ssp" else (None, None, None))
    assert of_version_1(upgraded(old)) == old


@pytest.mark.parametrize(
    "options",
    [
        ("--method", "evopress", "--evopress-budget", "small"),
        ("--method", "shortgpt"),
        ("--align", 8),
        ("--align", 8, "--method", "2ssp"),
    ],
    ids=["evopress", "shortgpt", "default", "2ssp"],
)
def test_what_is_written_is_true_and_both_versions_give_the_same_weights(
    pico_model: Path, text: Path, tmp_path: Path, options: tuple[object, ...]
):
    out, old, applied = tmp_path / "out", tmp_path / "old", tmp_path / "applied"
    done = sentei("prune", pico_model, "-o", out, "--calibration", text, *SETTINGS, *options)
    assert done.returncode == 0, done.stderr
    content = json.loads((out / PLAN_FILE).read_text())
    assert content["method"] in (*options, "2ssp")
    assert content["evopress_budget"] == ("small" if "evopress" in options else None)
    blocks = content["method"] != "2ssp"
    assert [content[name] is None for name in ("allocation", "widths", "search")] == [blocks] * 3

    old.mkdir()
    (old / SCORES_FILE).write_bytes((out / SCORES_FILE).read_bytes())
    (old / PLAN_FILE).write_text(json.dumps(of_version_1(content)))
    assert load_plan(old).document == load_plan(out).document
    calibration = ("--calibration", text) if content["compensation"] else ()
    done = sentei("apply", old, pico_model, "-o", applied, *calibration)
    assert done.returncode == 0, done.stderr
    assert (applied / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_an_interrupted_search_of_version_1_goes_on(pico_model: Path, text: Path, tmp_path: Path):
    command = ("prune", pico_model, "--calibration", text, *SETTINGS)
    evopress = ("--method", "evopress", "--evopress-budget", "small")
    assert sentei(*command, *evopress, "-o", tmp_path / "whole").returncode == 0
    unfinished = tmp_path / "out.search"
    unfinished.mkdir()
    (unfinished / SCORES_FILE).write_bytes((tmp_path / "whole" / SCORES_FILE).read_bytes())
    content = json.loads((tmp_path / "whole" / PLAN_FILE).read_text())
    (unfinished / PLAN_FILE).write_text(json.dumps(of_version_1(content)))
    resumed = (*command, "-o", tmp_path / "out", "--resume")
    refused(sentei(*resumed, "--method", "evopress"), "evopress_budget: 'small' then, 'paper' now")
    refused(sentei(*resumed, "--method", "shortgpt"), "method: 'evopress' then, 'shortgpt' now")
    done = sentei(*resumed, *evopress)
    assert done.returncode == 0, done.stderr
    for file in (PLAN_FILE, "model.safetensors"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_a_search_that_compensates_is_not_resumed_as_one_that_does_not(pico_model: Path, text: Path, tmp_path: Path):
    command = ("prune", pico_model, "--calibration", text, *SETTINGS, "--align", 8)
    assert sentei(*command, "-o", tmp_path / "whole").returncode == 0
    (unfinished := tmp_path / "out.search").mkdir()
    load_plan(tmp_path / "whole").save(unfinished)
    done = sentei(*command, "-o", tmp_path / "out", "--resume", "--no-compensate")
    refused(done, "compensation: True then, False now")


def test_a_card_says_compensated_only_where_it_was_taken():
    plan = load_plan(WRITTEN / "prune", needs_scores=False)
    summary = json.loads((WRITTEN / "prune" / "pruning_summary.json").read_text())
    assert "(2ssp, compensated)" in model_card(plan, summary)
    assert "(2ssp)" in model_card(plan.changed({"compensation": CompensationRecord(taken=False)}), summary)
    assert "(2ssp)" in model_card(plan.changed({"compensation": None}), summary)
