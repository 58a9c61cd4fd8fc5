"""``sentei poc``: from the template to the report, with steps that write what their commands would."""

import csv
import json
import re
import shutil
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import pytest

from serving.forecast.device_probe import DevicePeaks
from serving.poc import prepare, run
from serving.poc.plan_of_steps import swept_by
from serving.poc.run_steps import StepRunner
from serving.poc.walk import expected_steps
from tests.command_line import refused, sentei
from tests.conftest import make_pico
from tests.serving.poc.world import Truth, World
from toolchain.errors import INTERRUPTED
from toolchain.model.loading import load_tokenizer

QUESTION = '{"prompt": "A", "choices": ["b", "c"], "answer": 0, "subject": "safety"}\n'


@pytest.fixture
def poc(pico_model, tmp_path, monkeypatch) -> Path:
    """The Japanese template, filled in, with everything that it names."""
    peaks = DevicePeaks(device="cpu", dtype="float32", flops_per_s=1e11, bytes_per_s=1e10)
    monkeypatch.setattr(prepare, "probe_device", lambda device, dtype: peaks)
    path = tmp_path / "poc.yaml"
    assert sentei("poc", "init", "-o", path, "--lang", "ja").returncode == 0
    text = path.read_text(encoding="utf-8").replace("model: CHANGE_ME", f"model: {pico_model}")
    text = text.replace("CHANGE_ME/calibration.txt", "calibration.txt").replace("CHANGE_ME/evaluation.txt", "held.txt")
    path.write_text(text.replace("questions: []", "questions: [own.jsonl]"), encoding="utf-8")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "calibration.txt").write_text("Trees are pruned in winter. " * 200)
    (tmp_path / "held.txt").write_text("In summer they bear fruit. " * 200)
    (tmp_path / "calibration.txt").symlink_to(tmp_path / "texts" / "calibration.txt")
    (tmp_path / "own.jsonl").write_text(QUESTION)
    return path


def acted(monkeypatch, **truths: Truth) -> World:
    world = World(truths={name.replace("_", "."): truth for name, truth in truths.items()})
    monkeypatch.setattr(run, "StepRunner", lambda **settings: world)
    return world


def test_a_template_is_written_once(tmp_path):
    path = tmp_path / "poc.yaml"
    assert sentei("poc", "init", "-o", path).returncode == 0
    refused(sentei("poc", "init", "-o", path), "exists")
    assert sentei("poc", "init", "-o", path, "--force", "--lang", "ja").returncode == 0
    assert "ガードレール" in path.read_text(encoding="utf-8")
    refused(sentei("poc", "run", path, "-o", tmp_path / "out"), "line 10: ", "CHANGE_ME")


def test_a_dry_run_says_the_steps_and_their_time_and_writes_nothing(poc, tmp_path):
    done = sentei("poc", "run", poc, "-o", tmp_path / "out", "--dry-run", "--json")
    steps = json.loads(done.stdout)["steps"]
    assert [each["name"] for each in steps][:5] == [
        "evaluate original", "plans", "export original", "prune 12.5 %", "evaluate 12.5 %"
    ]  # fmt: skip
    assert all(0 < each["seconds"] < 3600 for each in steps)
    assert not (tmp_path / "out").exists()
    shown = sentei("poc", "run", poc, "-o", tmp_path / "out", "--dry-run")
    assert "benchmark 50 %" in shown.stdout and "in all" in shown.stdout


def test_a_dry_run_says_what_is_left_of_a_run_that_was_interrupted(poc, tmp_path):
    out = tmp_path / "out"
    prepared = prepare.prepare(poc)
    steps = prepared.steps(out)
    runner = runner_of(prepared, out)
    for step in (steps.evaluated_original, steps.sweep):
        step.out.mkdir(parents=True)
        runner._write(step, runner.key_of(step), list(step.arguments), exit_code=0, error=None, seconds=1.0)
    # Searched for by itself, since the plans of the others are there.
    text = poc.read_text(encoding="utf-8")
    poc.write_text(text.replace("sparsities: [", "sparsities: [0.2, "), encoding="utf-8")
    before = sorted(out.rglob("*"))
    done = sentei("poc", "run", poc, "-o", out, "--dry-run", "--json")
    found = {each["name"]: each for each in json.loads(done.stdout)["steps"]}
    assert [name for name, each in found.items() if each["done"]] == ["evaluate original", "plans"]
    assert "prune 20 %" in found
    left = sum(each["seconds"] for each in found.values() if not each["done"])
    shown = " ".join(sentei("poc", "run", poc, "-o", out, "--dry-run").stdout.split())
    assert f"About {timedelta(seconds=left)} left" in shown and "plans finished" in shown
    assert sorted(out.rglob("*")) == before
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    refused(sentei("poc", "run", poc, "-o", other, "--dry-run"), "no proof of concept")


def test_a_run_ends_with_a_verdict_a_sheet_and_a_report(poc, tmp_path, monkeypatch):
    acted(monkeypatch, **{"25 %": Truth(loss=1.5)})
    out = tmp_path / "out"
    done = sentei("poc", "run", poc, "-o", out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("「12.5 %」の採用を推奨します。")
    assert (out / "verdict.txt").read_text(encoding="utf-8").splitlines()[0] == done.stdout.splitlines()[0]
    verdict = json.loads((out / "verdict.json").read_text(encoding="utf-8"))
    assert (verdict["decision"], verdict["candidate"]) == ("deploy", "12.5 %")
    sheet = list(csv.reader((out / "capacity.csv").read_text(encoding="utf-8").splitlines()))
    assert [row[0] for row in sheet[1:3]] == ["original", "12.5 %"]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert '<html lang="ja">' in page and "採用を推奨します" in page
    # The candidate in detail is the one that was chosen.
    assert "held.txt" in page


def test_what_is_there_is_gone_on_with_only_if_asked(poc, tmp_path, monkeypatch):
    acted(monkeypatch)
    out = tmp_path / "out"
    assert sentei("poc", "run", poc, "-o", out).returncode == 0
    refused(sentei("poc", "run", poc, "-o", out), "--resume")
    poc.write_text(poc.read_text(encoding="utf-8").replace("most_perplexity: 1.20", "most_perplexity: 1.01"))
    again = sentei("poc", "run", poc, "-o", out, "--resume", "--json")
    assert json.loads(again.stdout)["decision"] == "do not prune"
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    refused(sentei("poc", "run", poc, "-o", other, "--resume"), "no proof of concept")
    assert [each.name for each in other.iterdir()] == ["thesis.txt"]


def runner_of(prepared: prepare.Prepared, out: Path) -> StepRunner:
    return StepRunner(
        directory=out, runs_in=prepared.path.parent, inputs=prepared.inputs_of, estimate=lambda step: 1.0,
        upcoming=list, tell=lambda line: None,
    )  # fmt: skip


def keys_of_steps(poc: Path) -> dict[str, str]:
    prepared, out = prepare.prepare(poc), poc.with_name("out")
    runner = runner_of(prepared, out)
    return {each.name: runner.key_of(each) for each in expected_steps(prepared.steps(out), prepared.siblings, [0.25])}


def test_a_new_guard_rail_of_metrics_is_measured_and_nothing_else_again(poc, tmp_path):
    """Pruning, exports and benchmarks take hours or days, and no question changes them."""
    before = keys_of_steps(poc)
    evaluations = {"evaluate original", "evaluate 25 %", "evaluate int8"}
    assert evaluations < set(before) and {"plans", "prune 25 %", "export int8", "benchmark 25 %"} < set(before)
    (tmp_path / "safe.jsonl").write_text(QUESTION)
    text = poc.read_text(encoding="utf-8")
    assert "  # metrics: " in text
    poc.write_text(text.replace("  # metrics: ", "  metrics: {accuracy:safe.jsonl: 0.5} # "), encoding="utf-8")
    railed = keys_of_steps(poc)
    assert {name for name in before if railed[name] != before[name]} == evaluations
    (tmp_path / "safe.jsonl").write_text(2 * QUESTION)
    assert {name for name, key in keys_of_steps(poc).items() if key != railed[name]} == evaluations
    # What a model is made with changes all that is made with it.
    (tmp_path / "calibration.txt").write_text("Pruned in spring. " * 200)
    remade = keys_of_steps(poc)
    assert {"plans", "prune 25 %", "evaluate 25 %", "benchmark 25 %"} < {n for n in before if remade[n] != railed[n]}


def test_a_new_sibling_is_measured_and_nothing_else_again(poc, pico_model, tmp_path):
    before = keys_of_steps(poc)
    shutil.copytree(pico_model, tmp_path / "small")
    text = poc.read_text(encoding="utf-8")
    poc.write_text(text.replace("siblings: []", "siblings: [small]"), encoding="utf-8")
    added = keys_of_steps(poc)
    assert added.items() > before.items()
    assert set(added) - set(before) == {f"{verb} small" for verb in ("evaluate", "export", "benchmark")}
    # Another small model of the same name is measured anew, and nothing else is.
    shutil.rmtree(tmp_path / "small")
    make_pico(tmp_path / "small", intermediate_size=64)
    load_tokenizer(pico_model).save_pretrained(tmp_path / "small")
    changed = keys_of_steps(poc)
    assert {name for name in added if changed[name] != added[name]} == set(added) - set(before)


@dataclass(kw_only=True)
class Runs:
    """Runs of one file with other sparsities, as they are but for the commands, whose files a :class:`World` writes."""

    poc: Path
    interrupts: set[str] = field(default_factory=set)
    done: list[str] = field(default_factory=list)

    def runner(self, **settings) -> StepRunner:
        world = World(truths={})

        class Acted(StepRunner):
            def _run(runner, step, arguments):
                log = runner._log(step)
                log.parent.mkdir(exist_ok=True)
                log.touch()
                if step.name in self.interrupts:
                    return INTERRUPTED
                self.done.append(step.name)
                if not step.out.exists():
                    world(step)
                    step.out.mkdir(parents=True, exist_ok=True)
                return 0

        return Acted(**settings)

    def __call__(self, *sparsities: float) -> set[str]:
        """The steps that were run."""
        asked, text = f"sparsities: {list(sparsities)}", self.poc.read_text(encoding="utf-8")
        self.poc.write_text(re.sub(r"sparsities: \[.*?\]", asked, text), encoding="utf-8")
        before = len(self.done)
        ended = sentei("poc", "run", self.poc, "-o", self.poc.with_name("out"), "--resume")
        assert ended.returncode == (INTERRUPTED if self.interrupts else 0), ended.stderr
        return set(self.done[before:])

    @property
    def swept(self) -> list[float]:
        return swept_by(json.loads((self.poc.with_name("out") / "steps" / "plans.json").read_text())["command"])


@pytest.fixture
def runs(poc, monkeypatch) -> Runs:
    found = Runs(poc=poc)
    monkeypatch.setattr(run, "StepRunner", found.runner)
    return found


def test_a_new_sparsity_is_made_and_nothing_else_again(runs, tmp_path):
    """Each candidate takes hours, and its plan is the same whatever else is asked for."""
    assert {"plans", "prune 25 %", "benchmark 33.3333 %"} < runs(0.25, 1 / 3)
    assert runs(0.25, 0.3, 1 / 3) == {f"{verb} 30 %" for verb in ("prune", "evaluate", "export", "benchmark")}
    assert runs(0.25) == runs(0.3) == set()
    shutil.rmtree(tmp_path / "out" / "plans")
    assert runs(0.25, 0.3, 1 / 3) == {"plans"}
    assert runs.swept == [0.25, 0.333333]
    # What the plans are made with makes them all again, together.
    (tmp_path / "calibration.txt").write_text("Pruned in spring. " * 200)
    assert {"plans", "prune 25 %", "benchmark 30 %"} < runs(0.25, 0.3)
    assert runs.swept == [0.25, 0.3]


def test_an_interrupted_sweep_is_gone_on_with_if_all_of_it_is_still_wanted(runs):
    runs.interrupts = {"plans"}
    runs(0.25, 0.5)
    runs(0.25, 0.4, 0.5)
    assert runs.swept == [0.25, 0.5]
    runs(0.25, 0.4)
    assert runs.swept == [0.25, 0.4]


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        ("text: [held.txt]", "text: [gone.txt]", "gone.txt does not exist"),
        ("text: [calibration.txt]", "text: [0.5:calibration.txt, held.txt]", "held.txt has no weight"),
        ("text: [held.txt]", "text: [held.txt, ./calibration.txt]", "calibration.txt is calibration text too"),
        ("text: [held.txt]", "text: [texts]", "texts is calibration text too"),
        ("questions: [own.jsonl]", "questions: [gone.jsonl]", "gone.jsonl does not exist"),
        ("  # groups: ", "  groups: {law: 0.9} # ", "no question has the subject law"),
        ("  # metrics: ", "  metrics: {valid_json:gone.jsonl: 0.9} # ", "gone.jsonl does not exist"),
        ("  # metrics: ", "  metrics: {f1:own.jsonl#class=d: 0.9} # ", "no question has the right answer 'd'"),
        ("siblings: []", "siblings: [no/such/model/at/all]", "no/such/model"),
    ],
)
def test_what_the_file_names_is_looked_at_before_anything_runs(right, wrong, said, poc, tmp_path):
    text = poc.read_text(encoding="utf-8")
    assert right in text
    poc.write_text(text.replace(right, wrong), encoding="utf-8")
    done = sentei("poc", "run", poc, "-o", tmp_path / "out")
    refused(done, said)
    found = int(done.stderr.partition(" line ")[2].partition(":")[0])
    assert wrong.strip() in poc.read_text(encoding="utf-8").splitlines()[found - 1]
    assert not (tmp_path / "out").exists()
