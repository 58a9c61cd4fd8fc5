"""Row 6: what a command leaves that was ended by SIGTERM or SIGKILL is found, used or removed by the next."""

import signal
from pathlib import Path

import pytest

from tests.accidents.stopped_commands import stopped
from tests.command_line import PLAIN, refused, sentei

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    (tmp_path / "said").mkdir()
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def prune(model: Path, text: Path, *more: object) -> tuple:
    return (
        "prune",
        model,
        "--sparsity",
        0.3,
        "--calibration",
        text,
        "--samples",
        2,
        "--seq-len",
        32,
        "--align",
        1,
        *more,
    )


@pytest.mark.parametrize("at", ["toolchain.prune.compensation:_refit_layer", "toolchain.prune.apply:write_pruned"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_prune_leaves_only_what_the_next_one_uses(
    pico_model: Path, text: Path, work: Path, at: str, number: signal.Signals
):
    command = (*prune(pico_model, text, "--widths", "uniform"), "-o", work / "out")
    with stopped(work.parent / "said", *command, at=at) as running:
        code = running.kill(number)
    if number is signal.SIGTERM:
        assert code == 130
        assert names(work) == ["out.search"]
        assert "The same command with --resume continues from there." in running.stderr
        assert "Interrupted." in running.stderr
    else:
        assert code == -9
        written = ["out.partial"] if "write" in at else []
        assert names(work) == ["out.lock", *written, "out.search"]  # nothing with a name that nobody can guess
    refused(sentei(*command), "out.search holds an interrupted search.", "Add --resume")
    assert names(work) == ["out.search"]
    assert sentei(*command, "--resume").returncode == 0
    assert names(work) == ["out"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_command_with_force_leaves_the_old_output_whole(
    pico_model: Path, text: Path, work: Path, number: signal.Signals
):
    out = work / "out"
    out.mkdir()
    (out / "old").write_text("old")
    command = ("export", "vllm", pico_model, "-o", out)
    with stopped(work.parent / "said", *command, "--force", at="export.vllm:_compare") as running:
        assert (work / "out.partial" / "model.safetensors").exists()
        running.kill(number)
    assert (out / "old").read_text() == "old"
    refused(sentei(*command), "out is not empty")
    assert names(work) == ["out"]
    assert names(out) == ["old"]


@pytest.mark.parametrize("call", [1, 2])
def test_a_command_killed_while_it_replaces_the_old_output_loses_nothing(
    pico_model: Path, text: Path, work: Path, call: int
):
    out, plan = work / "out", work.parent / "plan"
    assert sentei(*prune(pico_model, text, *PLAIN, "--attention-removals", 1), "-o", plan).returncode == 0
    assert sentei("plan", "cut", plan, "--step", 1, "-o", out).returncode == 0
    (out / "old").write_text("old")
    command = ("plan", "cut", plan, "--step", 1, "-o", out)
    with stopped(work.parent / "said", *command, "--force", at="pathlib:Path.rename", call=call) as running:
        running.kill(signal.SIGKILL)
    assert (
        names(work) == ["out.lock", "out.partial", "out.replaced"] if call == 2 else ["out", "out.lock", "out.partial"]
    )
    refused(sentei(*command), "out is not empty")
    assert names(work) == ["out"]
    assert (out / "old").read_text() == "old"
    assert sentei(*command, "--force").returncode == 0
    assert names(work) == ["out"]
    assert not (out / "old").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_evaluation_goes_on(pico_model: Path, text: Path, work: Path, number: signal.Signals):
    command = ("evaluate", pico_model, "--text", text, "--windows", 2, "--seq-len", 32, "-o", work / "out")
    with stopped(work.parent / "said", *command, at="shutil:copytree") as running:
        running.kill(number)
    if number is signal.SIGTERM:
        assert names(work) == ["out.parts"]
        assert "The same command with --resume continues from there." in running.stderr
    refused(sentei(*command), "out.parts holds an interrupted run.", "Add --resume")
    assert names(work) == ["out.parts"]
    assert sentei(*command, "--resume").returncode == 0
    assert names(work) == ["out"]


def test_a_terminated_healing_says_how_to_go_on(pico_model: Path, text: Path, work: Path):
    pruned = work.parent / "pruned"
    assert sentei(*prune(pico_model, text, *PLAIN), "-o", pruned).returncode == 0
    command = ("heal", pruned, "--against", pico_model, "--data", text, "--steps", 2, "--batch-size", 1)
    command = (*command, "--seq-len", 32, "--dtype", "float32", "-o", work / "out")
    with stopped(work.parent / "said", *command, at="toolchain.heal.heal:_write_weights") as running:
        assert running.kill(signal.SIGTERM) == 130
    assert names(work) == ["out.heal"]
    assert "out.heal holds what was done so far. The same command with --resume" in running.stderr.replace("\n", " ")


def test_a_killed_healing_does_not_lose_the_pruning(pico_model: Path, text: Path, work: Path):
    command = (*prune(pico_model, text, *PLAIN), "--heal-steps", 2, "-o", work / "out")
    with stopped(work.parent / "said", *command, at="toolchain.heal.heal:_write_weights") as running:
        running.kill(signal.SIGKILL)
    assert {"healed.heal", "pruned"} < set(names(work / "out.unhealed"))
    refused(sentei(*command), "out.unhealed holds an interrupted pruning with healing.", "Add --resume")
    done = sentei(*command, "--resume")
    assert done.returncode == 0, done.stderr
    assert names(work) == ["out"]


def test_a_terminated_comparison_says_how_to_go_on(pico_model: Path, text: Path, work: Path):
    command = ("compare-methods", pico_model, "--methods", "shortgpt", "--sparsity", 0.3, "--calibration", text)
    command = (*command, "--text", text, "--samples", 2, "--windows", 2, "--seq-len", 32, "-o", work / "out")
    with stopped(work.parent / "said", *command, at="toolchain.evaluate.method_comparison:prune") as running:
        assert running.kill(signal.SIGTERM) == 130
    assert names(work) == ["out.parts"]
    assert "The same command with --resume continues from there." in running.stderr
