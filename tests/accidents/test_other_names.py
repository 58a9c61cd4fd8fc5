"""Names that mean something else to what prints them: brackets, colons, and characters that command a terminal."""

import json
from pathlib import Path

import pytest

from tests.command_line import PLAIN, refused, sentei

SETTINGS = ("--sparsity", 0.3, "--samples", 2, "--seq-len", 16, "--align", 1, *PLAIN)


@pytest.mark.parametrize("name", ["a[/b]", "[red]a", "a:smile:"])
def test_names_are_shown_as_they_are(
    name: str, pico_model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # short paths do not wrap
    model, words, out = Path("model"), Path(name, "text.txt"), Path(name, "out")
    model.symlink_to(pico_model)
    words.parent.mkdir(parents=True)
    words.write_text(text.read_text())
    for command in (
        ("prune", model, "-o", out, "--calibration", words, *SETTINGS),
        ("plan", "curve", out),
        ("plan", "cut", out, "--step", 0, "-o", f"{out}-cut"),
        ("doctor", out),
        ("prune", model, "-o", f"{out}-sweep", "--calibration", words, "--sweep", "0.1:0.2:0.1", *SETTINGS[2:]),
        ("apply", out, model, "-o", f"{out}-applied"),
    ):
        done = sentei(*command)
        assert done.returncode == 0, done.stderr
        assert name in done.stdout, command


def test_a_stranger_s_plan_commands_no_terminal(pico_model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert sentei("prune", pico_model, "-o", out, "--calibration", text, *SETTINGS).returncode == 0
    plan = json.loads((out / "plan.json").read_text())
    evil = "[/x] \x1b]0;title\x07\x1b[2J\x9b2J"
    plan["base_model"]["name"] = plan["metric_source"] = plan["stopped_because"] = plan["calibration"]["source"] = evil
    (out / "plan.json").write_text(json.dumps(plan))
    for command in ("show", "curve"):
        done = sentei("plan", command, out)
        assert done.returncode == 0, done.stderr
        assert "\\x1b]0;title\\x07\\x1b[2J\\x9b2J" in done.stdout.replace("\n", "")
        assert not {"\x1b", "\x07", "\x9b"} & {*done.stdout}
    refused(sentei("plan", "show", "\x1b[2J"), "\\x1b[2J")
