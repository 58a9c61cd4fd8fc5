"""``sentei poc run`` as a user runs it: from the template, on the real demo model, in ONNX Runtime."""

import json

import pytest

from serving.poc.template import template
from tests.command_line import sentei
from toolchain.text.embedded import write_halves


@pytest.mark.acceptance
@pytest.mark.alone
@pytest.mark.timeout(3600)
def test_from_the_template_to_a_verdict_on_a_real_model(demo_model, tmp_path):
    write_halves(tmp_path)
    filled = template("en").replace("model: CHANGE_ME", f"model: {demo_model}").replace("CHANGE_ME/", "")
    small = {
        "samples: 32": "samples: 8\n  seq_len: 256", "# windows: 100": "windows: 16",
        "  # seq_len: 2048\n  # Your": "  seq_len: 256\n  # Your",
        "input_len: 512": "input_len: 64", "output_len: 128": "output_len: 16", "repeats: 5": "repeats: 4",
        "[0.125, 0.25, 0.375, 0.5]": "[0.125, 0.25]",
    }  # fmt: skip
    for before, after in small.items():
        assert before in filled
        filled = filled.replace(before, after)
    (tmp_path / "poc.yaml").write_text(filled, encoding="utf-8")
    out = tmp_path / "out"
    done = sentei("poc", "run", tmp_path / "poc.yaml", "-o", out)
    assert done.returncode == 0, done.stderr
    verdict = json.loads((out / "verdict.json").read_text(encoding="utf-8"))
    by_name = {each["name"]: each for each in verdict["candidates"]}
    # A model of this size loses more than 20 % at 12.5 %; int8 loses next to nothing and is faster.
    assert by_name["12.5 %"]["perplexity"]["evaluation.txt"]["value"] > 1
    assert by_name["int8"]["verified"] and by_name["int8"]["perplexity"]["evaluation.txt"]["value"] < 1.1
    assert verdict["decision"] == "do not prune" or by_name[verdict["candidate"]]["gain"]["low"] >= 1.1
    assert (out / "report.html").is_file() and (out / "capacity.csv").is_file()
    # Nothing is left to do, and nothing is done again.
    before = {path: path.stat().st_mtime_ns for path in (out / "steps").glob("*.json")}
    assert sentei("poc", "run", tmp_path / "poc.yaml", "-o", out, "--resume").returncode == 0
    assert before == {path: path.stat().st_mtime_ns for path in (out / "steps").glob("*.json")}
