"""Each decision is one page: what was chosen, against what, and what would change our mind."""

import re
from pathlib import Path

import pytest

from tests.docs.commands import ROOT

DECISIONS = sorted((ROOT / "docs" / "decisions").glob("*.md"))
_PARTS = ["What was chosen", "Against what", "What would change our mind"]


@pytest.mark.parametrize("page", DECISIONS, ids=lambda page: page.stem)
def test_a_decision_is_one_page_of_the_same_parts(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert [heading for heading in headings if heading in _PARTS] == _PARTS
    words = " ".join(line for line in text.splitlines() if not line.startswith("|")).split()
    assert len(words) <= 700, "Keep what was chosen, and the numbers that decided it."
