"""A run of hours is interrupted: what is finished is not done again, and what changed is."""

import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from serving.poc.plan_of_steps import Step
from serving.poc.run_steps import StepRunner

# Counts its runs, and does what it is told: python -c CODE OUT WHAT [--force --resume]
PROGRAM = """
import os, pathlib, signal, sys
out, what, *options = sys.argv[1:]
with pathlib.Path(out).with_suffix(".runs").open("a") as file:
    print(*options, file=file)
if what == "fail":
    print(f"Error: {out} is too large.\\nGet more memory.", file=sys.stderr)
    sys.exit(2)
if what == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if what == "interrupt":
    sys.exit(130)
pathlib.Path(out).mkdir(exist_ok=True)
sys.exit(1 if what == "differ" else 0)
"""


def runner_in(directory: Path, inputs: object = 1) -> StepRunner:
    return StepRunner(
        directory=directory, runs_in=directory, inputs=lambda step: inputs, estimate=lambda step: 10.0,
        upcoming=list, tell=lambda line: None,
    )  # fmt: skip


def step_in(directory: Path, what: str = "write", **changed) -> Step:
    return replace(
        Step(
            name="prune 25 %", work="prune", program=("-c", PROGRAM), arguments=(str(directory / "out"), what),
            out=directory / "out", resumes=True,
        ),
        **changed,
    )  # fmt: skip


def runs(directory: Path) -> list[str]:
    return (directory / "out.runs").read_text().splitlines()


def test_a_finished_step_is_not_run_again(tmp_path):
    for _ in range(2):
        assert runner_in(tmp_path)(step_in(tmp_path)).error is None
    assert runs(tmp_path) == ["--force"]


def test_a_step_is_run_anew_where_its_inputs_or_its_command_or_what_it_needs_changed(tmp_path):
    step = step_in(tmp_path)
    runner_in(tmp_path)(step)
    runner_in(tmp_path, inputs=2)(step)
    runner_in(tmp_path, inputs=2)(replace(step, arguments=(*step.arguments, "--samples")))
    runner_in(tmp_path, inputs=2)(replace(step, arguments=(*step.arguments, "--samples"), needs=(step,)))
    assert len(runs(tmp_path)) == 4
    # What was begun with other inputs is not gone on with.
    assert all("--resume" not in each for each in runs(tmp_path))


def test_a_step_whose_output_was_deleted_is_run_again(tmp_path):
    runner_in(tmp_path)(step_in(tmp_path))
    (tmp_path / "out").rmdir()
    runner_in(tmp_path)(step_in(tmp_path))
    assert len(runs(tmp_path)) == 2


def test_an_interrupted_step_is_gone_on_with(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        runner_in(tmp_path)(step_in(tmp_path, "interrupt"))
    with pytest.raises(KeyboardInterrupt):
        runner_in(tmp_path)(step_in(tmp_path, "interrupt"))
    assert runs(tmp_path) == ["--force", "--force --resume"]


def test_a_failed_step_says_why_in_one_line_and_is_tried_again(tmp_path):
    for _ in range(2):
        found = runner_in(tmp_path)(step_in(tmp_path, "fail"))
        assert (found.error, found.check_failed) == ("out is too large. Get more memory.", False)
    assert len(runs(tmp_path)) == 2


def test_a_killed_step_names_the_signal(tmp_path):
    assert (
        f"signal {signal.SIGKILL.value} (memory may have run out)"
        in runner_in(tmp_path)(step_in(tmp_path, "kill")).error
    )


@pytest.mark.parametrize(("work", "times"), [("export", 1), ("verify", 1), ("benchmark", 2), ("evaluate", 2)])
def test_an_export_that_failed_its_check_fails_once_and_anything_else_is_tried_again(work, times, tmp_path):
    for _ in range(2):
        found = runner_in(tmp_path)(step_in(tmp_path, "differ", work=work))
        assert found.error and found.check_failed
    assert len(runs(tmp_path)) == times


def test_parts_of_the_original_are_where_the_step_finds_them(tmp_path):
    seeds = tmp_path / "original" / "parts"
    seeds.mkdir(parents=True)
    names = {f"original-text-0123456789abcdef.{each}" for each in ("json", "safetensors")}
    for name in names:
        (seeds / name).write_bytes(b"\xff")
    runner_in(tmp_path)(step_in(tmp_path, seeded_from=seeds))
    assert runs(tmp_path) == ["--force --resume"]
    taken = {each.name: each.read_bytes() for each in (tmp_path / "out.parts").iterdir()}
    assert taken == dict.fromkeys(names, b"\xff")


def test_the_record_says_what_was_run(tmp_path):
    runner_in(tmp_path)(step_in(tmp_path))
    record = json.loads((tmp_path / "steps" / "prune-25.json").read_text())
    assert record["exit_code"] == 0 and record["command"][0] == "sentei"


def test_the_time_that_is_left_follows_what_the_steps_took(tmp_path):
    done = step_in(tmp_path)
    ahead = replace(done, name="evaluate", out=tmp_path / "later")
    runner = replace(runner_in(tmp_path), upcoming=lambda: [done, ahead])
    assert runner.remaining_s() == 20
    runner(done)
    # A step that took a hundredth of its estimate makes the other one shorter too.
    assert 0 < runner.remaining_s() < 5


def test_names_that_are_not_latin_have_records_of_their_own(tmp_path):
    runner = runner_in(tmp_path)
    one = step_in(tmp_path, name="evaluate 東京")
    other = replace(one, name="evaluate 大阪", arguments=(str(tmp_path / "other"), "write"), out=tmp_path / "other")
    runner(one)
    runner(other)
    assert runner.is_done(one) and runner.is_done(other)
