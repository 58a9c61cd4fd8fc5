"""The numbers in README, guides and decisions have a source: CONTRIBUTING.md says which words and links count.

So a number that was measured again cannot stay behind in a page, and a number without a source cannot get in.
"""

from pathlib import Path

import pytest

from tests.docs.commands import ROOT
from tests.docs.numbers import blocks, numbers_of, without_source

_DOCS = ROOT / "docs"
# These hold what was measured by hand too; the other pages link to them.
WITH_TRIALS = [_DOCS / "gpu.md", _DOCS / "metrics.md", *sorted((_DOCS / "decisions").glob("*.md"))]
GUIDES = [ROOT / "README.md", *sorted((_DOCS / "guides").glob("*.md")), *sorted((_DOCS / "ja").glob("*.md"))]


@pytest.mark.parametrize("page", [*GUIDES, *WITH_TRIALS], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_each_number_has_a_source(page: Path) -> None:
    unknown = without_source(page.read_text(encoding="utf-8"), page.parent, trials=page in WITH_TRIALS)
    assert unknown == [], "Link the file that holds them in the same paragraph or row, or say what they are."


def test_numbers_are_found() -> None:
    """A pattern that finds nothing would let everything pass."""
    texts = [page.read_text(encoding="utf-8") for page in (*GUIDES, *WITH_TRIALS)]
    assert sum(len(numbers_of(block)) for text in texts for block in blocks(text)) > 500


@pytest.mark.parametrize(
    ("said", "unknown"),
    [
        ("[table](table.md) 1.70 at 25 %", []),
        ("[table](table.md) 1.71 at 25 %", ["1.71"]),
        ("1.70 at 25 %, without a link", ["1.70"]),
        ("It takes 17 minutes, 5 GB and 3 % of 12 layers", ["17", "5", "3"]),
        ("17 分、元モデルの 2.5 倍です", ["17", "2.5"]),
        ("[table](table.md)\n\nanother paragraph: 1.70", ["1.70"]),
        ("- [table](table.md): 1.70\n- another item: 1.70", ["1.70"]),
        ("[table](table.md)\n\n| gain | |\n|---|---|\n| first | 1.17x (1.155 to 1.3) |", ["1.3"]),
        ("| | |\n|---|---|\n| [run](run.json) | 1.23 |\n| the same | 1.234 |", []),
        ("[table](table.md)\n\n| | gain |\n|---|---|\n| [run](run.json) | 1.17 |", ["1.17"]),
        ("| | tokens/s | goal |\n|---|---|---|\n| 16 requests | 2381 | 7 |", ["2381"]),
        ("[run](run.json) 3.27 GB, 48 ms, 24,700 tokens/s, 99 %", []),
        ("[run](run.json) 3.28 GB, 4.8 ms, 24,600 tokens/s, 98 %", ["3.28", "4.8", "24,600", "98"]),
        ("[costs](costs.md) perplexity 6.5, memory 7.25 GB, 8.5 s", []),
        ("[costs](costs.md) perplexity 8.5, memory 8.5 GB, 6.25 s", ["8.5", "8.5", "6.25"]),
        ("[run](run.json) 7.25 s, 7.25x", ["7.25"]),
        ("Qwen2.5-Coder-1.5B needs vLLM 0.25 to 0.33, Python ≥ 3.11 and torch 2.13.0+cpu (arXiv 2501.17771)", []),
        ("`--target speedup=9.9`, `--attainment` (0.9), 60 seconds (`TIMEOUT_S`), 95 % intervals", []),
        ("For example, 1.71 s.", []),
        ("## An example: a run\n\nIt took 1.71 s.", []),
        ("例えば 17 分です。例外は 5 分です。", []),
        ("例外は 5 分です。", ["5"]),
        ("In a trial, it took 1.71 s.", ["1.71"]),
        ("```\n1.71 s\n```", []),
    ],
)
def test_only_what_has_a_source_passes(tmp_path: Path, said: str, unknown: list[str]) -> None:
    (tmp_path / "table.md").write_text("perplexity 1.702, gain 1.170x (1.155 to 1.184)")
    (tmp_path / "costs.md").write_text("| perplexity | peak GB | wall s |\n|---|---|---|\n| 6.5 | 7.25 | 8.5 |\n")
    (tmp_path / "run.json").write_text('{"runs": [1.2344, 3267645440, 0.0481, 24699.7, 0.99], "wall_s": 7.25}')
    assert without_source(f"# Results\n\n{said}\n", tmp_path) == unknown


def test_decisions_may_name_trials(tmp_path: Path) -> None:
    said = "In a trial, it took 1.71 s.\n\nSimulated: 1.72 s.\n\nAnother paragraph: 1.73 s."
    assert without_source(said, tmp_path, trials=True) == ["1.73"]
