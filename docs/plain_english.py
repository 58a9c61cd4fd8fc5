"""Finds translated English in what people read: README, the pages in docs/, and the help of every command.

``python docs/plain_english.py`` prints each phrase with what to write instead, and fails if it found one.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent / "site"))

from links import FENCE, ROOT

# Tests write these, or collect them from docstrings and older releases.
_NOT_READ = {"structure.md", "compatibility.md", "reliability.md", "CHANGELOG.md"}
# The snapshot of every command's help, which a test keeps true.
_HELP = ROOT / "tests/toolchain/cli/options.txt"
_CODE = re.compile(rf"{FENCE.pattern}|`[^`\n]*`|\]\([^)]*\)", FENCE.flags)
_COUNTED = "tokens|windows|bytes|bits?|requests|nats|seconds|ms|once|numbers?|neurons|lines?|layers|parts|characters"
_THINGS = "second|minute|hour|token|layer|step|request|candidate|parameter|weight|row|cell|run|line|rank|block|GPU"
PHRASES = {
    rf"\b(?:{_COUNTED}) an? (?:{_THINGS})\b": "'per'",
    r"(?:^|[.:;>] )Of (?!course)": "begin with the subject",
    r"\bNone where\b": "'null if'",
    r"(?<![Tt]here )\bis no\b(?! (?:longer|worse|better|slower))|\bwhat is no(?:ne)?\b": "say what it is",
    r"(?:^|[.] )Who(?:ever)? (?![^.]*\?)": "'people who', or 'if you'",
    r"\bby percents\b|\bsome percent\b": "'by a few percent'",
    r"\bcomes? to lie\b|\blies? (?:in|beside|below|elsewhere|at)\b": "'is in'",
    r"\bstands? (?:in|beside|behind|before|at|among)\b(?! for)": "'is in', or 'has'",
    r"\b[Gg]o(?:es|ne)? on\b": "'continue'",
    r"\banew\b": "'again'",
    r"\b[Ll]ikewise\b": "'the same'",
    r"\bas ever\b|\bat hand\b|\bfound out\b|\bgives? way\b|\ball the same\b": "say it plainly",
    r"\b(?:thereof|thereby|hereby|therein|wherein|whereof|henceforth|whence)\b": "say it plainly",
    r"\btold apart\b|\bare told\b": "'distinguish', or 'report'",
    r"\bsuch as (?:hang|do|have|are)\b": "'which'",
    r"\bthere where\b|\bwhere there (?:is|are) none\b": "'if'",
    r"\bare at least\b": "'reach'",
}  # fmt: skip


def read_by_people() -> list[Path]:
    """README, the other pages that people write, and the help of the commands."""
    pages = sorted({*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")})
    return [*(page for page in pages if page.name not in _NOT_READ), _HELP]


def found_in(text: str) -> Iterator[tuple[int, str, str]]:
    """Line, phrase and advice. Code is blanked, and lines keep their numbers."""
    prose = _CODE.sub(lambda code: re.sub(r"[^\n]", " ", code[0]), text)
    for phrase, better in PHRASES.items():
        for hit in re.finditer(phrase, prose, re.MULTILINE):
            yield prose.count("\n", 0, hit.start()) + 1, hit[0].strip(), better


def main() -> None:
    """Prints what was found, and fails if anything was."""
    found = [(page, *each) for page in read_by_people() for each in found_in(page.read_text(encoding="utf-8"))]
    for page, line, phrase, better in found:
        print(f"{page.relative_to(ROOT)}:{line}: {phrase!r}: write {better}")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
