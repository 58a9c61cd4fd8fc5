"""All methods side by side: the table says what separate commands would, and goes on where it was interrupted."""

import json
from pathlib import Path

import pytest

from tests.command_line import refused, sentei
from tests.counting import calls_of
from toolchain.checkpoint.directory import open_checkpoint
from toolchain.evaluate import method_comparison
from toolchain.plan.plan import load_plan
from toolchain.prune.methods import METHODS


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("other") / "other.txt"
    path.write_text(
        "Bread is baked from flour, water and salt, and old ovens are heated with wood from the forest. " * 20
    )
    return path


def compare(model: Path, text: Path, other: Path, out: Path, *more: object):
    return sentei(
        "compare-methods", model, "-o", out, "--calibration", text, "--samples", 2, "--seq-len", 48, "--align", 8,
        "--evopress-budget", "small", "--text", other, "--windows", 3, *more,
    )  # fmt: skip


def test_every_method_stands_in_the_table(
    pico_model: Path, text: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"prompt": "Bread is", "choices": [" baked", " wood"], "answer": 0}) + "\n")
    opened = calls_of(open_checkpoint, monkeypatch)
    done = compare(pico_model, text, other, tmp_path / "out", "--sparsity", 0.4, "--questions", questions, "--json")
    assert done.returncode == 0, done.stderr
    assert [directory for directory, *_ in opened].count(pico_model) == 1
    document = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert json.loads(done.stdout) == {"directory": str(tmp_path / "out"), **document}
    assert [row["method"] for row in document["rows"]] == list(METHODS)
    assert not (tmp_path / "out.parts").exists()
    for row in document["rows"]:
        kept = tmp_path / "out" / "plans" / f"{row['method']}-0.4"
        assert row["sparsity"] >= 0.4
        assert load_plan(kept).steps[-1].num_block_parameters == row["num_block_parameters"]
        [perplexity], [ratio] = row["perplexity"].values(), row["perplexity_ratio"].values()
        assert ratio["value"] == pytest.approx(perplexity / document["original"]["perplexity"]["other.txt"])
        assert 0 <= row["tasks"]["questions.jsonl"] <= 1
        assert row["speed"] is None

    # What the table says of a plan is what a person finds who applies and evaluates it.
    row = next(row for row in document["rows"] if row["method"] == "blockpruner")
    applied = tmp_path / "applied"
    assert sentei("apply", tmp_path / "out" / "plans" / "blockpruner-0.4", pico_model, "-o", applied).returncode == 0
    assert open_checkpoint(applied).num_parameters == row["num_parameters"]
    measured = sentei("evaluate", applied, "--text", other, "--seq-len", 48, "--windows", 3, "--json")
    assert json.loads(measured.stdout)["evaluations"][0]["perplexity"] == row["perplexity"]["other.txt"]
    table = (tmp_path / "out" / "comparison.md").read_text()
    assert table.count("\n| ") == 2 + 1 + len(document["rows"])
    assert "| shortgpt | 50.0% |" in table
    assert "speed" not in table.split("\n\n")[1]


def test_it_goes_on_cell_by_cell(
    pico_model: Path, text: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    more = ("--sparsity", "0.25,0.5", "--methods", "shortgpt,sliding-window")
    real, pruned = method_comparison.prune, []

    def prune(*arguments, **options):
        if len(pruned) == 1:
            raise KeyboardInterrupt
        pruned.append((arguments[2].method, arguments[2].sparsity))
        return real(*arguments, **options)

    monkeypatch.setattr(method_comparison, "prune", prune)
    done = compare(pico_model, text, other, tmp_path / "out", *more)
    assert done.returncode == 130
    assert "--resume" in done.stderr
    cells = [(method, sparsity) for sparsity in (0.25, 0.5) for method in ("shortgpt", "sliding-window")]
    assert pruned == cells[:1]
    monkeypatch.setattr(
        method_comparison,
        "prune",
        lambda *a, **o: (pruned.append((a[2].method, a[2].sparsity)), real(*a, **o))[1],
    )
    refused(compare(pico_model, text, other, tmp_path / "out", *more), "interrupted", "--resume")
    assert compare(pico_model, text, other, tmp_path / "out", *more, "--resume").returncode == 0
    assert pruned == cells
    rows = json.loads((tmp_path / "out" / "comparison.json").read_text())["rows"]
    assert [(row["method"], row["target_sparsity"]) for row in rows] == cells


def test_a_model_pruned_with_other_options_is_not_taken_up_again(
    pico_model: Path, text: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    real = method_comparison.evaluate

    def interrupted(directory: Path, against: Path | None, *more, **options):
        if against is not None:
            raise KeyboardInterrupt
        return real(directory, against, *more, **options)

    monkeypatch.setattr(method_comparison, "evaluate", interrupted)
    more = ("--sparsity", "0.25", "--methods", "shortgpt")
    assert compare(pico_model, text, other, tmp_path / "out", *more).returncode == 130
    monkeypatch.setattr(method_comparison, "evaluate", real)
    assert compare(pico_model, text, other, tmp_path / "out", *more, "--samples", 1, "--resume").returncode == 0
    plan = load_plan(tmp_path / "out" / "plans" / "shortgpt-0.25")
    assert plan.document.calibration.num_samples == 1


def test_plans_that_are_no_longer_asked_for_stay_out(
    pico_model: Path, text: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    real = method_comparison.save_comparison
    monkeypatch.setattr(method_comparison, "save_comparison", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    more = ("--methods", "shortgpt", "--resume", "--sparsity")
    assert compare(pico_model, text, other, tmp_path / "out", *more, "0.25,0.5").returncode == 130
    monkeypatch.setattr(method_comparison, "save_comparison", real)
    assert compare(pico_model, text, other, tmp_path / "out", *more, "0.5").returncode == 0
    assert [path.name for path in (tmp_path / "out" / "plans").iterdir()] == ["shortgpt-0.5"]


@pytest.mark.acceptance
def test_speed_is_measured_against_the_original(pico_model: Path, text: Path, other: Path, tmp_path: Path):
    done = compare(pico_model, text, other, tmp_path / "out", "--sparsity", "0.5", "--methods", "shortgpt", "--speed")
    assert done.returncode == 0, done.stderr
    [row] = json.loads((tmp_path / "out" / "comparison.json").read_text())["rows"]
    speed = row["speed"]
    assert speed["gain"]["low"] <= speed["gain"]["value"] <= speed["gain"]["high"]
    assert speed["workload"]["output_len"] == 32
    assert f"{speed['gain']['value']:.2f}x" in (tmp_path / "out" / "comparison.md").read_text()


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--methods", "slicegpt"), ("'slicegpt' is not known", "blockpruner")),
        (("--sparsity", "a lot"), ("'a lot' is not understood",)),
        (("--sparsity", "0.2,0.9"), ("cannot be reached", "0.9")),
        (("--windows", 1000), ("too short",)),
    ],
)
def test_bad_input_is_found_before_anything_is_pruned(
    pico_model: Path, text: Path, other: Path, tmp_path: Path, options: tuple, parts: tuple[str, ...]
):
    refused(compare(pico_model, text, other, tmp_path / "out", *options), *parts)
    assert list(tmp_path.iterdir()) == []
