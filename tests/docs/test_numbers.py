"""README's measured numbers stand in the files that are linked beside them.

So a number that was measured again cannot stay behind in README, and a number without a source cannot get in.
"""

import json
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.docs.commands import ROOT

README = ROOT / "README.md"
# What no file of the repository holds, and why it may be said.
DEMO = "14.39 16.55 1.15 25.1 134.5 107.9 19.8 26.8 33.0 1.23 1.21 1.25 1.24 27.8 30.8 1.10 1.04 1.16 1.26"
VERSIONS = "2.5 5.14 0.25 0.26 0.33"
EXAMPLES = dict.fromkeys(DEMO.split(), "printed by the run of make demo that docs/report.png shows")
EXAMPLES |= dict.fromkeys(VERSIONS.split(), "a version of vLLM, Transformers or Qwen in a table")
_LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")
_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`[^`]*`")
_VERSION = re.compile(r"(Python|vLLM|Transformers|torch|CUDA|Runtime|arXiv)( ≥| >=|,| and| to| \d+(\.\d+)+)+")
# With decimals, and no part of a name: not Qwen2.5-Coder-1.5B, but 1.23x.
_MEASURED = re.compile(r"(?<![\w.-])\d+\.\d+(?=x?(?![\w.-]*\w))")
_ANY_NUMBER = re.compile(r"\d+(?:\.\d+)?")


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """What is said, and the text whose links are its sources.

    A table belongs with the paragraph before it. A row that has a link of its own has that source alone.
    """
    paragraphs = ["", *re.split(r"\n\s*\n", _FENCE.sub("", text))]
    for before, paragraph in pairwise(paragraphs):
        if not paragraph.lstrip().startswith("|"):
            yield paragraph, paragraph
            continue
        for row in paragraph.splitlines():
            yield row, row if _LINK.search(row) else f"{before}\n{paragraph}"


def numbers_of(said: str) -> list[str]:
    prose = _LINK.sub("]", _CODE.sub("", said))
    return _MEASURED.findall(_VERSION.sub("", prose))


def evidence_of(text: str, folder: Path) -> list[float]:
    """Every number in the results and documents that the text links to."""
    found: list[float] = []
    for name in _LINK.findall(text):
        file = (folder / name).resolve()
        if name.startswith(("http:", "https:")) or not file.is_file():
            continue
        if file.suffix == ".json":
            found += numbers_in(json.loads(file.read_text(encoding="utf-8")))
        elif file.suffix == ".md":
            found += map(float, _ANY_NUMBER.findall(file.read_text(encoding="utf-8").replace(",", "")))
    return found


def numbers_in(content: Any) -> Iterator[float]:
    if isinstance(content, dict | list):
        for each in content.values() if isinstance(content, dict) else content:
            yield from numbers_in(each)
    elif isinstance(content, int | float):
        yield float(content)


def without_source(text: str, folder: Path = ROOT) -> list[str]:
    """The numbers that are not those of a linked file, rounded to as many decimals."""
    unknown = []
    for said, sources in blocks(text):
        evidence = evidence_of(sources, folder)
        for number in numbers_of(said):
            half = 0.5 * 10.0 ** -len(number.partition(".")[2]) + 1e-9
            if not any(abs(each - float(number)) <= half for each in evidence):
                unknown.append(number)
    return unknown


def test_each_measured_number_stands_in_a_file_that_is_linked_beside_it() -> None:
    text = README.read_text(encoding="utf-8")
    assert any(numbers_of(said) for said, _ in blocks(text)), "README shows no results"
    unknown = [number for number in without_source(text) if number not in EXAMPLES]
    assert unknown == [], "Link the file that holds them in the same paragraph, or say in EXAMPLES why there is none."


@pytest.mark.parametrize(
    ("said", "unknown"),
    [
        ("[table](table.md) 1.70 at 25 %", []),
        ("[table](table.md) 1.71 at 25 %", ["1.71"]),
        ("1.70 at 25 %, without a link", ["1.70"]),
        ("[table](table.md)\n\nanother paragraph: 1.70", ["1.70"]),
        ("[table](table.md)\n\n| gain | 1.17x (1.155 to 1.3) |", ["1.3"]),
        ("[table](table.md)\n\n| [run](run.json) | 1.23 |\n| the same | 1.17, 1.234 |", []),
        ("[table](table.md)\n\n| [run](run.json) | 1.17 |", ["1.17"]),
        ("Qwen2.5-Coder-1.5B needs vLLM 0.25 to 0.33 and Python ≥ 3.11", []),
        ("`--target speedup=9.9`", []),
    ],
)
def test_only_what_was_measured_passes(tmp_path: Path, said: str, unknown: list[str]) -> None:
    (tmp_path / "table.md").write_text("perplexity 1.702, gain 1.170x (1.155 to 1.184)")
    (tmp_path / "run.json").write_text('{"gain": [{"value": 1.2344}]}')
    assert without_source(f"# Results\n\n{said}\n", tmp_path) == unknown
