"""An unset variable of the shell does not mean the working directory."""

from pathlib import Path

import pytest

from tests.command_line import refused, sentei
from toolchain.errors import SenteiError
from toolchain.text.sources import parse_sources, parse_text

EMPTY = [
    ("prune {model} -o {out} --sparsity 0.25 --calibration", "--calibration is empty"),
    ("prune {model} --sparsity 0.25 -o", "-o is empty"),
    ("prune {model} -o {out} --sparsity 0.25 --metric", "--metric is empty"),
    ("evaluate {model} --text", "--text is empty"),
    ("evaluate {model} --questions", "--questions is empty"),
    ("heal {model} --against {model} -o {out} --data", "--data is empty"),
    ("generate {model} --prompt", "--prompt is empty"),
    ("plan show", "An argument is empty"),
    ("plan show --json", "An argument is empty"),
    ("doctor", "An argument is empty"),
    ("serve", "An argument is empty"),
]


@pytest.mark.parametrize(("line", "sentence"), EMPTY)
def test_empty_values(pico_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, sentence: str):
    # A text that must not be taken lies in the working directory.
    (tmp_path / "private.txt").write_text("Not for calibration. " * 1000)
    monkeypatch.chdir(tmp_path)
    words = [word.format(model=pico_model, out=tmp_path / "out") for word in line.split()]
    refused(sentei(*words, ""), sentence, "a variable of your shell is not set")
    assert [path.name for path in tmp_path.iterdir()] == ["private.txt"]


def test_an_empty_value_behind_an_equals_sign(pico_model: Path):
    refused(sentei("evaluate", pico_model, "--text="), "--text is empty")


@pytest.mark.parametrize("given", ["0.5:", "0.5: ", "", " "])
def test_texts_as_the_library_reads_them(given: str):
    with pytest.raises(SenteiError):
        parse_sources([given])


def test_no_text_is_no_directory():
    with pytest.raises(SenteiError, match="empty"):
        parse_text("")


def test_a_blank_output(pico_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    refused(sentei("export", "vllm", pico_model, "-o", " "), "--out is empty")
    assert not list(tmp_path.iterdir())


def test_a_task_without_its_file(pico_model: Path):
    refused(sentei("evaluate", pico_model, "--task", "piqa="), "the file is empty")
