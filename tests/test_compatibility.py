"""The committed table of families is whole; ``make compatibility`` writes it anew."""

from pathlib import Path

from tests.compatibility import COLUMNS
from toolchain.architecture.families import FAMILIES

PAGE = Path(__file__).parents[1] / "docs/compatibility.md"


def test_every_family_was_tried_everywhere():
    rows = [line.strip("|").split("|") for line in PAGE.read_text(encoding="utf-8").splitlines() if line[:2] == "| "]
    head, *families = [[cell.strip() for cell in row] for row in rows]
    assert head == ["family", *COLUMNS]
    assert [row[0] for row in families] == list(FAMILIES)
    for family, *cells in families:
        assert all(cell.startswith(("yes", "no [")) for cell in cells), family
