"""Sweeps, curves, differences and reasons, as a person asks for them."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.command_line import PLAIN, refused, sentei
from toolchain.checkpoint.directory import open_checkpoint
from toolchain.plan.plan import load_plan

SETTINGS = ("--samples", 2, "--seq-len", 64, "--align", 8, *PLAIN)


@pytest.fixture(scope="module")
def pruned(pico_model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("views") / "pruned"
    protect = ("--protect", "attention:0", "--protect", "ffn:3")
    done = prune(pico_model, text, out, "--sparsity", 0.3, "--attention-removals", 2, *protect)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def swept(pico_model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("views") / "sweep"
    done = prune(pico_model, text, out, "--sweep", "0.2:0.4:0.1", "--attention-removals", 1)
    assert done.returncode == 0, done.stderr
    return out


def prune(model: Path, text: Path, out: Path, *more: object) -> subprocess.CompletedProcess[str]:
    return sentei("prune", model, "-o", out, "--calibration", text, *SETTINGS, *more)


def told(*arguments: object) -> dict:
    done = sentei(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_sweep_has_the_plans_that_separate_runs_have(pico_model: Path, text: Path, swept: Path, tmp_path: Path):
    result = json.loads((swept / "sweep.json").read_text())
    assert [entry["directory"] for entry in result["plans"]] == ["0.2", "0.3", "0.4"]
    assert [entry["sparsity"] for entry in result["plans"]] == sorted(entry["sparsity"] for entry in result["plans"])
    assert prune(pico_model, text, tmp_path / "alone", "--sparsity", 0.3, "--attention-removals", 1).returncode == 0
    assert (swept / "0.3" / "plan.json").read_bytes() == (tmp_path / "alone" / "plan.json").read_bytes()
    assert sentei("apply", swept / "0.4", pico_model, "-o", tmp_path / "applied").returncode == 0
    assert open_checkpoint(tmp_path / "applied").num_block_parameters == result["plans"][2]["num_block_parameters"]
    assert not swept.with_name("sweep.search").exists()


def test_a_sweep_looks_at_the_neurons_once(
    pico_model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from toolchain.prune.search import two_stage as search

    calls, real = [], search.neuron_importance
    monkeypatch.setattr(search, "neuron_importance", lambda *args, **kw: (calls.append(1), real(*args, **kw))[1])
    assert prune(pico_model, text, tmp_path / "out", "--sweep", "0.1:0.4:0.1").returncode == 0
    assert len(calls) == 1


def test_a_killed_sweep_is_resumed(pico_model: Path, text: Path, swept: Path, tmp_path: Path):
    out = tmp_path / "sweep"
    command = ["prune", pico_model, "-o", out, "--calibration", text, *SETTINGS]
    command += ["--sweep", "0.2:0.4:0.1", "--attention-removals", 1]
    # Slowed down, the interruption falls into the last of the three.
    slow = (
        "import sys, time; from toolchain.prune.search import two_stage as search; real = search.Search._removal\n"
        "def removal(self, plan, tried):\n"
        "    time.sleep(60 * (plan.document.target_sparsity > 0.35)); return real(self, plan, tried)\n"
        "search.Search._removal = removal; from toolchain.cli.app import main; sys.argv[0] = 'sentei'; main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", slow, *map(str, command)],
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores Ctrl-C, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    last = tmp_path / "sweep.search" / "0.4" / "plan.json"
    try:
        deadline = time.monotonic() + 120
        while not (last.exists() and len(json.loads(last.read_text())["stage_1"]) >= 4):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=60)[1]
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert "--resume" in errors
    assert "Traceback" not in errors
    refused(sentei(*command), "interrupted search", "--resume")
    done = sentei(*command, "--resume")
    assert done.returncode == 0, done.stderr
    for name in ("0.2", "0.3", "0.4"):
        assert (out / name / "plan.json").read_bytes() == (swept / name / "plan.json").read_bytes()


@pytest.mark.parametrize(
    ("sweep", "sentence"),
    [
        ("0.5:0.1:0.1", "upwards"), ("0.1:0.5:0", "upwards"), ("0.1:0.5", "not understood"),
        ("a:b:c", "not understood"), ("0.2,x", "not understood"), ("0.2,nan", "inside"), ("0.2,1.5", "inside"),
        ("0.2,0.2", "would be called 0.2"),
    ],
)  # fmt: skip
def test_bad_sweeps(pico_model: Path, text: Path, tmp_path: Path, sweep: str, sentence: str):
    refused(prune(pico_model, text, tmp_path / "out", "--sweep", sweep), sentence)
    refused(prune(pico_model, text, tmp_path / "out", "--sweep", sweep, "--sparsity", 0.2), "Give --sparsity")


def test_a_list_gives_the_plans_that_a_range_gives(pico_model: Path, text: Path, swept: Path, tmp_path: Path):
    out = tmp_path / "listed"
    done = prune(pico_model, text, out, "--sweep", "0.4,0.2", "--attention-removals", 1)
    assert done.returncode == 0, done.stderr
    assert sorted(each.name for each in out.iterdir() if each.is_dir()) == ["0.2", "0.4"]
    for name in ("0.2", "0.4"):
        assert (out / name / "plan.json").read_bytes() == (swept / name / "plan.json").read_bytes()


def test_the_curve_of_a_sweep_is_one_page(swept: Path, tmp_path: Path):
    shown = told("plan", "curve", swept, "-o", tmp_path / "curve.html")
    assert len(shown["curves"]) == 3
    page = (tmp_path / "curve.html").read_text()
    assert "http-equiv" not in page
    for plan in ("0.2", "0.3", "0.4"):
        last = load_plan(swept / plan).steps[-1]
        assert f"{last.metric:.4g}" in page
    refused(sentei("plan", "curve", swept, "-o", tmp_path / "curve.html"), "exists")
    refused(sentei("plan", "curve", tmp_path / "nowhere"), "no plan")


def test_a_sweep_does_not_leave_its_directory(swept: Path, tmp_path: Path):
    shutil.copytree(swept, tmp_path / "sweep")
    raw = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    raw["plans"][0]["directory"] = "../elsewhere"
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps(raw))
    refused(sentei("plan", "curve", tmp_path / "sweep"), "not a directory beside it")


def test_a_plan_does_not_differ_from_itself_and_an_edit_shows(pruned: Path, tmp_path: Path):
    same = told("plan", "diff", pruned, pruned)
    assert same["layers"] == []
    assert same["settings"] == {}
    shutil.copytree(pruned, tmp_path / "edited")
    raw = json.loads((tmp_path / "edited" / "plan.json").read_text())
    before = raw["layers"][1]["intermediate_size"]
    raw["layers"][1]["intermediate_size"] = before - 3
    raw["layers"][0]["attention"] = "remove"
    (tmp_path / "edited" / "plan.json").write_text(json.dumps(raw))
    found = told("plan", "diff", pruned, tmp_path / "edited")["layers"]
    assert [layer["layer"] for layer in found] == [0, 1]
    assert found[0]["attention"] == ["keep", "remove"]
    assert found[1]["intermediate_size"] == [before, before - 3]
    assert found[1]["neurons_kept_by_both"] == before - 3
    assert f"{before} → {before - 3}" in sentei("plan", "diff", pruned, tmp_path / "edited").stdout


def test_plans_for_different_models_are_not_compared(pruned: Path, tmp_path: Path):
    shutil.copytree(pruned, tmp_path / "other")
    raw = json.loads((tmp_path / "other" / "plan.json").read_text())
    raw["base_model"]["weights_sha256"] = "0" * 64
    (tmp_path / "other" / "plan.json").write_text(json.dumps(raw))
    refused(sentei("plan", "diff", pruned, tmp_path / "other"), "different models")


def test_why_tells_what_the_search_saw(pruned: Path):
    plan = load_plan(pruned)
    first, second = plan.document.trace
    winner = told("plan", "why", pruned, first.removed)["attention"]
    assert winner["decision"] == "remove"
    assert [(step["step"], step["rank"]) for step in winner["steps"]] == [(1, 1)]
    kept = next(layer for layer in range(1, 4) if layer not in (first.removed, second.removed))
    seen = told("plan", "why", pruned, kept)["attention"]
    assert [step["metric"] for step in seen["steps"]] == [first.candidates[kept], second.candidates[kept]]
    assert seen["steps"][1]["rank"] == 1 + sorted(second.candidates.values()).index(second.candidates[kept])
    protected = told("plan", "why", pruned, 0)["attention"]
    assert protected == {"decision": "keep", "protected": True, "steps": []}
    ffn = told("plan", "why", pruned, 3)["ffn"]
    assert (ffn["intermediate_size"], ffn["protected"], ffn["most_removed"]) == (48, True, None)
    assert "protected" in sentei("plan", "why", pruned, 0).stdout
    refused(sentei("plan", "why", pruned, 4), "no layer 4")


@pytest.mark.parametrize("widths", ["uniform", "ranked"])
def test_every_allocation_meets_the_target(pico_model: Path, text: Path, tmp_path: Path, widths: str):
    done = prune(pico_model, text, tmp_path / "out", "--sparsity", 0.3, "--widths", widths)
    assert done.returncode == 0, done.stderr
    plan, sizes = load_plan(tmp_path / "out"), open_checkpoint(pico_model)
    neuron, unit = 3 * 32, 3 * 32 * 8
    removed = sizes.num_block_parameters - plan.steps[-1].num_block_parameters
    excess = removed - 0.3 * sizes.num_block_parameters
    assert 0 <= excess < unit
    assert all(layer.intermediate_size % 8 == 0 for layer in plan.layout)
    assert neuron * sum(48 - layer.intermediate_size for layer in plan.layout) <= removed
    document = plan.document
    assert (document.allocation, document.widths) == ("formula", widths)
    assert len(document.trace) == document.target_attention_removals
