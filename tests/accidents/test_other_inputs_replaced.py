"""Inputs that ``--force`` would replace by the output, in commands where no test looked."""

import json
from pathlib import Path

from tests.command_line import PLAIN, refused, sentei


def contents(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_curve_does_not_replace_what_is_not_a_page(pico_model: Path, text: Path, tmp_path: Path) -> None:
    plan = swept(pico_model, text, tmp_path)
    before = contents(plan)
    for name in ("plan.safetensors", "plan.json", "curve", "curve.md"):
        refused(sentei("plan", "curve", plan, "-o", plan / name, "--force"), name, "ends in .html")
    assert contents(plan) == before
    assert sentei("plan", "curve", plan, "-o", plan / "curve.html").returncode == 0


def test_a_plan_is_not_replaced_by_its_model(pico_model: Path, text: Path, tmp_path: Path) -> None:
    plan = swept(pico_model, text, tmp_path)
    before = contents(plan.parent)
    for given in (plan, plan / "plan.json"):
        refused(sentei("apply", given, pico_model, "-o", plan.parent, "--force"), "would replace the input")
    assert contents(plan.parent) == before
    # Into its own directory it is written again: that is how an edited plan takes effect.
    assert sentei("apply", plan, pico_model, "-o", plan, "--force", "--quiet").returncode == 0
    assert json.loads((plan / "plan.json").read_text())["layers"]


def test_a_benchmark_does_not_replace_its_prompts(pico_model: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "results" / "prompts.jsonl"
    prompts.parent.mkdir()
    prompts.write_text('{"prompt": "The sky is", "output_tokens": 2}\n')
    command = ("benchmark", pico_model, "--engine", "transformers", "--prompts", prompts, "-o", prompts.parent)
    refused(sentei(*command, "--force"), "would replace the input", str(prompts))
    assert prompts.is_file()


def swept(model: Path, text: Path, tmp_path: Path) -> Path:
    """One plan of a sweep."""
    settings = ("--samples", 2, "--seq-len", 16, "--align", 1, "--calibration", text, *PLAIN)
    done = sentei("prune", model, "-o", tmp_path / "sweep", "--sweep", "0.1:0.2:0.1", *settings, "--quiet")
    assert done.returncode == 0, done.stderr
    return tmp_path / "sweep" / "0.1"
