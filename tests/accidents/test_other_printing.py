"""What files of strangers call things is printed as it is: no styles, links, moved cursors or HTML."""

import io
import json
import shutil
from pathlib import Path

import pytest

from serving.report.render import render_report
from tests.command_line import sentei
from tests.serving.report.test_render import write_evaluation, write_plan, write_summary
from toolchain.cli.commands.serve import generate

NAMES = ["llama[v2]", "a[/bold]", "[link=http://evil]here", "hub:key:train", "x\x1b]0;title\x07\x1b[2J", "\u009b2J"]


@pytest.mark.parametrize("name", NAMES)
def test_names_of_plans(tmp_path: Path, name: str):
    directory = tmp_path / "plan"
    directory.mkdir()
    write_plan(directory, name=name)
    plan = json.loads((directory / "plan.json").read_text())
    (directory / "plan.json").write_text(json.dumps(plan | {"method": name, "metric": name, "stopped_because": name}))
    for command in (("show",), ("curve",), ("why", "2")):
        done = sentei("plan", command[0], directory, *command[1:])
        assert done.returncode == 0, done.stderr
        assert not {"\x1b", "\x07", "\u009b"} & set(done.stdout)
    shown = sentei("plan", "show", directory).stdout
    assert "".join(each if each.isprintable() else f"\\x{ord(each):02x}" for each in name) in shown


def test_directories_with_brackets_and_spaces(pico_model: Path, tmp_path: Path, text: Path):
    model, out = tmp_path / "日本 [x]" / "mo[" / "del]", tmp_path / "出 [" / "力]"
    shutil.copytree(pico_model, model)
    for command in (
        ("doctor", model),
        ("evaluate", model, "--text", text, "--seq-len", "16", "-o", out),
        ("export", "vllm", model, "-o", tmp_path / "[/export]"),
        ("report", out, "-o", tmp_path / "[/report].html"),
    ):
        done = sentei(*command)
        assert done.returncode in (0, 1), done.stderr  # doctor: where vLLM is not installed
        assert "sentei itself failed" not in done.stderr


def test_markdown_holds_no_html_links_or_pictures_of_others(tmp_path: Path):
    evil = "m](javascript:alert(1)) ![x](http://evil/p.png) <img src=http://evil>\n# big"
    (tmp_path / "in").mkdir()
    write_plan(tmp_path / "in", name=evil)
    write_summary(tmp_path / "in", name=evil)
    write_evaluation(tmp_path / "in", text=evil)
    render_report([tmp_path / "in"], tmp_path / "report.md")
    page = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "javascript" in page
    for part in ("m](", "![x](", " <img", "\n# big"):
        assert part not in page


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_what_a_model_writes_commands_no_terminal(pico_model: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("serving.engines.generate.stream_text", lambda *_, **__: iter(["one\n", "\x1b]0;title\x07"]))
    terminal, file = _Terminal(), io.StringIO()
    for stream in (terminal, file):
        monkeypatch.setattr("sys.stdout", stream)
        generate(pico_model, prompt="hi")
    assert terminal.getvalue().startswith("one\n\\x1b]0;title\\x07")
    assert file.getvalue().startswith("one\n\x1b]0;title\x07")
