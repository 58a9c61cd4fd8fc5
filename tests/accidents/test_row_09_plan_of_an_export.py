"""Row 9: an export carries plan.json without the scores; what needs no scores reads it, in any order."""

import json
import shutil
from pathlib import Path

import pytest

from tests.command_line import refused, sentei
from tests.serving.report.test_render import write_plan, write_results, write_verification


@pytest.fixture
def directories(tmp_path: Path) -> tuple[Path, Path]:
    """A pruned model's directory, and an export of it, as far as plans go."""
    pruned, export = tmp_path / "pruned", tmp_path / "export"
    pruned.mkdir()
    export.mkdir()
    write_plan(pruned)
    shutil.copy(pruned / "plan.json", export)
    write_verification(export)
    return pruned, export


def ok(*command: object) -> str:
    done = sentei(*command)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_show_and_curve_of_an_export(directories: tuple[Path, Path]):
    pruned, export = directories
    assert ok("plan", "show", export) == ok("plan", "show", pruned)
    # Long paths are wrapped.
    drawn = ["".join(ok("plan", "curve", each).split()).replace(str(each), "DIR") for each in directories]
    assert drawn[0] == drawn[1]
    known, unknown = (json.loads(ok("plan", "show", each, "--json")) for each in directories)
    assert all(layer["kept_neurons"] for layer in known["layers"])
    # Which ones are kept only the scores say: nothing is made up.
    assert all(layer.pop("kept_neurons") is None for layer in unknown["layers"])
    assert [{**layer, "kept_neurons": None} for layer in known["layers"]] == [
        {**layer, "kept_neurons": None} for layer in unknown["layers"]
    ]


def test_report_in_any_order(directories: tuple[Path, Path], tmp_path: Path):
    pruned, export = directories
    write_results(tmp_path / "bench", gains=[1.2, 1.2, 1.2])
    pages = []
    for number, order in enumerate(((export,), (export, pruned), (pruned, export), (tmp_path / "bench", export))):
        page = tmp_path / f"report-{number}.md"
        ok("report", *order, "-o", page)
        pages.append(page.read_text())
        assert "25" in pages[-1]
    assert pages[1] == pages[2]


@pytest.mark.parametrize("command", [("why", "0"), ("diff",), ("cut", "--step", "1", "-o", "out")])
def test_what_needs_the_scores_says_who_has_them(directories: tuple[Path, Path], tmp_path: Path, command: tuple):
    pruned, export = directories
    name, *more = command
    places = [export, pruned] if name == "diff" else [export]
    more = [tmp_path / "out" if each == "out" else each for each in more]
    refused(sentei("plan", name, *places, *more), str(export / "plan.safetensors"), "directory of the pruned model")


def test_scores_that_are_there_and_damaged_are_still_said(directories: tuple[Path, Path]):
    pruned, _ = directories
    (pruned / "plan.safetensors").write_bytes(b"\0" * 20)
    refused(sentei("plan", "show", pruned), "plan.safetensors is damaged")
