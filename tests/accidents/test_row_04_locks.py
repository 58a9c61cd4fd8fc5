"""Row 4: two commands into the same output. The second is told who is writing; the first loses nothing."""

import os
import socket
from pathlib import Path

import pytest

from tests.accidents.stopped_commands import stopped
from tests.command_line import PLAIN, refused, sentei

pytestmark = pytest.mark.timeout(300)


def everything(directory: Path) -> list[Path]:
    return sorted(directory.rglob("*"))


def test_the_second_command_is_told_and_the_first_ends_well(pico_model: Path, text: Path, tmp_path: Path):
    work, said = tmp_path / "work", tmp_path / "said"
    (work / "other").mkdir(parents=True)
    said.mkdir()
    out = work / "out"
    prune = (
        "prune",
        pico_model,
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
        *PLAIN,
    )
    with stopped(said, *prune, "-o", out, at="toolchain.prune.apply:write_pruned") as first:
        before = everything(work)
        assert {work / "out.lock", work / "out.partial", work / "out.search"} < set(before)
        holder = f"is being written by process {first.pid} on {socket.gethostname()} (sentei prune) since 20"
        for second in (
            (*prune, "-o", out),
            (*prune, "-o", out, "--force"),
            (*prune, "-o", out, "--resume"),
            (*prune, "-o", work / "other" / ".." / "out", "--force"),
            (*prune, "-o", os.path.relpath(out), "--force"),
            ("prune", pico_model, "--sweep", "0.1:0.3:0.1", "-o", out, "--force"),
            ("apply", out, pico_model, "-o", out, "--force"),
            ("plan", "cut", out, "--step", 1, "-o", out, "--force"),
            ("heal", out, "--against", pico_model, "--data", text, "-o", out, "--force"),
            ("evaluate", pico_model, "--text", text, "-o", out, "--force"),
            ("export", "vllm", pico_model, "-o", out, "--force"),
            ("export", "onnx", pico_model, "-o", out, "--force"),
            ("export", "nemotron-nas", pico_model, "-o", out, "--force"),
            ("quantize", pico_model, "--scheme", "fp8", "-o", out, "--force"),
            ("import", "-o", out, "--force"),
            ("benchmark", pico_model, pico_model, "--engine", "transformers", "-o", out, "--force"),
            ("compare-methods", pico_model, "--text", text, "-o", out, "--force"),
            ("demo", "-o", out, "--force"),
        ):
            refused(sentei(*second), holder)
            assert everything(work) == before, second
        assert first.go_on() == 0, first.stderr
    assert sorted(path.name for path in work.iterdir()) == ["other", "out"]
    assert sentei("plan", "show", out).returncode == 0


def test_a_report_is_written_by_one_command_at_a_time(pruned_pico: Path, tmp_path: Path):
    work, said = tmp_path / "work", tmp_path / "said"
    work.mkdir()
    said.mkdir()
    out = work / "report.html"
    with stopped(said, "report", pruned_pico, "-o", out, at="serving.report.render:build_view") as first:
        refused(sentei("report", pruned_pico, "-o", out, "--force"), f"written by process {first.pid}")
        refused(sentei("plan", "curve", pruned_pico, "-o", out, "--force"), f"written by process {first.pid}")
        assert first.go_on() == 0, first.stderr
    assert [path.name for path in work.iterdir()] == ["report.html"]


def test_an_export_is_not_replaced_while_it_is_verified(pico_model: Path, tmp_path: Path):
    work, said = tmp_path / "work", tmp_path / "said"
    work.mkdir()
    said.mkdir()
    assert sentei("export", "vllm", pico_model, "-o", work / "export").returncode == 0
    verify = ("verify", work / "export", "--against", pico_model, "--engine", "transformers")
    with stopped(said, *verify, at="serving.verify.verify:_prompts") as first:
        before = everything(work)
        holder = f"written by process {first.pid}"
        refused(sentei("export", "vllm", pico_model, "-o", work / "export", "--force"), holder)
        refused(sentei(*verify), holder)
        assert everything(work) == before
        assert first.go_on() == 0, first.stderr
    assert [path.name for path in work.iterdir()] == ["export"]


@pytest.fixture(scope="module")
def pruned_pico(pico_model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pruned") / "out"
    words = (
        "prune",
        pico_model,
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
        *PLAIN,
    )
    assert sentei(*words, "-o", out).returncode == 0
    return out
