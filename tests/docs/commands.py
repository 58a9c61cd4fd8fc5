"""The commands that the documents show: from Markdown to words, as a shell would split them."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[2]
# CHANGELOG.md is left out: it names options by the names that they had.
DOCUMENTS = sorted(
    file
    for pattern in ("*.md", "docs/*.md", "docs/guides/**/*.md", "docs/ja/**/*.md", "docs/decisions/**/*.md")
    for file in ROOT.glob(pattern)
    if file.name not in ("CHANGELOG.md", "structure.md")
)
_SHELL = {"sh", "bash", "shell", "console"}
_PROMPT = "$ "
_ASSIGNMENT = re.compile(r"\w+=.*")
# What may stand before a command: words of a shell, and programs that start another.
_BEFORE = {"do", "then", "else", "time", "nohup", "exec", "torchrun", "srun"}


@dataclass(frozen=True)
class Command:
    """One command of a block.

    Attributes:
        file: Relative to the repository.
        line: Of the file, counted from 1; of a command on several lines, the first.
        words: From the program's name on, without assignments, launchers and redirections.
        launcher: What would start it, such as ``torchrun``; empty for the shell.
    """

    file: str
    line: int
    words: tuple[str, ...]
    launcher: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {shlex.join(self.words)}"


def commands_of(document: Path) -> Iterator[Command]:
    """All commands in the document's fenced blocks for a shell, and behind ``$`` in blocks without a language."""
    for block in _tokens(document):
        language = block.info.strip().split(" ")[0]
        if block.type != "fence" or language not in {*_SHELL, ""}:
            continue
        assert block.map is not None
        lines = block.content.splitlines()
        if language or _has_prompt(lines):
            yield from _commands(document, lines, first=block.map[0] + 2)


def commands_of_script(script: Path) -> Iterator[Command]:
    """All commands of a shell script."""
    yield from _commands(script, script.read_text(encoding="utf-8").splitlines(), first=1)


def sentei_commands(document: Path) -> list[Command]:
    """Those of sentei in a document or a script; ``words`` begin after its name."""
    return [
        Command(each.file, each.line, each.words[1:], each.launcher)
        for each in (commands_of if document.suffix == ".md" else commands_of_script)(document)
        if Path(each.words[0]).name == "sentei"
    ]


def mentions(document: Path) -> list[Command]:
    """What prose says of ``sentei`` in code spans: perhaps a part of a command, so not everything it needs."""
    name = document.relative_to(ROOT).as_posix()
    return [
        Command(name, (block.map or [0])[0] + 1, tuple(shlex.split(child.content)[1:]))
        for block in _tokens(document)
        for child in block.children or ()
        if child.type == "code_inline" and child.content.startswith("sentei ")
    ]


@cache
def _tokens(document: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(document.read_text(encoding="utf-8"))


def _commands(file: Path, lines: list[str], *, first: int) -> Iterator[Command]:
    name, has_prompt = file.relative_to(ROOT).as_posix(), _has_prompt(lines)
    for number, line in _whole_lines(lines):
        if has_prompt and not line.startswith(_PROMPT):
            continue  # what the command printed
        for words in _simple_commands(line.removeprefix(_PROMPT)):
            started, launcher = _without_what_starts_it(words)
            if started:
                yield Command(name, first + number, started, launcher)


def _has_prompt(lines: list[str]) -> bool:
    return any(line.startswith(_PROMPT) for line in lines)


def _whole_lines(lines: list[str]) -> Iterator[tuple[int, str]]:
    """Lines that end in a backslash or inside of quotes are joined with the next; each with its number in the block."""
    start, held = 0, ""
    for number, line in enumerate(lines):
        start = start if held else number
        held = f"{held}\n{line}" if held else line
        if held.endswith("\\"):
            held = held.removesuffix("\\")
            continue
        try:
            list(_lexer(held))
        except ValueError:
            continue
        yield start, held
        held = ""
    assert not held, f"a block ends inside of quotes: {held!r}"


def _lexer(line: str) -> shlex.shlex:
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    return lexer


def _simple_commands(line: str) -> Iterator[tuple[str, ...]]:
    """The commands between a shell's operators."""
    words: list[str] = []
    skips_next = False
    for word in _lexer(line):
        if skips_next:
            skips_next = False
        elif set(word) <= set("<>&") and {"<", ">"} & set(word):
            skips_next = True  # where output goes
        elif set(word) <= set("();|&"):
            yield tuple(words)
            words = []
        else:
            words.append(word)
    yield tuple(words)


def _without_what_starts_it(words: tuple[str, ...]) -> tuple[tuple[str, ...], str]:
    launcher = ""
    while words and (words[0] in _BEFORE or _ASSIGNMENT.fullmatch(words[0])):
        if words[0] in ("torchrun", "srun"):
            launcher = words[0]
            return (words[words.index("sentei") :] if "sentei" in words else words), launcher
        words = words[1:]
    return words, launcher
