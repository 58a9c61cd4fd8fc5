"""docs/plain_english.py finds what it is for, and nothing in code."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
found_in = runpy.run_path(str(ROOT / "docs/plain_english.py"))["found_in"]


@pytest.mark.parametrize(
    "said",
    [
        "The plan has one line a layer.",
        "It reads 20 tokens a second.",
        "A sentence. Of the tasks each counts.",
        "--device <cpu|cuda> Of the ONNX export (cpu).",
        "It changes speed by percents.",
        "Where memory comes to lie matters.",
        "What was reached stands in the summary.",
        "The same command with --resume goes on from there.",
        "Plan and weights are made anew.",
    ],
)
def test_translated_english_is_found(said: str) -> None:
    assert [line for line, _, _ in found_in(f"# Title\n\n{said}\n")] == [3]


@pytest.mark.parametrize(
    "said",
    [
        "The plan has one line per layer. Of course it can be edited.",
        "```sh\nOf 20 tokens a second\n```",
        "`anew` is a name, and [this](stands in) a link.",
        "Who needs it? There is no option.",
    ],
)
def test_plain_english_and_code_pass(said: str) -> None:
    assert list(found_in(said)) == []
