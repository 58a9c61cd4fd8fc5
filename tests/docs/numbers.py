"""The measured numbers of a page, and whether each has a source: a file that is linked beside it, or a word that says
what it is. CONTRIBUTING.md has the rules for those who write.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from tests.docs.commands import ROOT
from tests.docs.test_site import module

FENCE: re.Pattern[str] = module("links").FENCE
_LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")
_CODE = re.compile(r"`[^`]*`")
_OPTION = re.compile(r"`(?:--[\w-]+|[A-Z]+_[A-Z_]+)`")
_HEADING = re.compile(r"#+ ")
_ITEM = re.compile(r"\n(?=\s*(?:[-*]|\d+\.) )")
# What has versions beside the pinned packages; and papers, whose numbers and sections look the same.
_PROGRAMS = (
    "Python|vLLM|torch|CUDA|Runtime|Envoy|Prometheus|promtool|CycloneDX|YAML|llm-compressor|aiperf|schema"
    "|arXiv|sections?"
)
_PACKAGES = {
    name
    for file in (ROOT / "requirements").glob("*.txt")
    for name in re.findall(r"^[\w-]+(?===)", file.read_text(encoding="utf-8"), re.MULTILINE)
}
_VERSION = re.compile(
    rf"(?<!\w)(?:{_PROGRAMS}|{'|'.join(map(re.escape, _PACKAGES))})"
    r"(?: ≥| >=|,| and| (?:up )?to|'s|\s\d+(?:\.\d+)+(?![\dx]))+|\d+\.\d+\.\d[\w.+-]*",
    re.IGNORECASE,
)
# What nobody measured: the usual sparsities, the level of intervals, a value beside its option, the steps of a canary.
_SETTING = re.compile(
    r"(?:12\.5|25|37\.5|50|95)(?:(?:,| and| to| or) [\d.]+)* ?%"
    r"|`--` \(\d[\d.]*(?: \w+)?\)|\d+ \w+ \(`--`"
    r"|\d+ % of the traffic"
)
_UNITS = {
    "x": 1, "times": 1, "nats": 1, "倍": 1, "tokens/s": 1, "tok/s": 1, "%": 0.01, "ms": 0.001,
    "s": 1, "seconds": 1, "秒": 1, "minutes": 60, "minute": 60, "分": 60, "hours": 3600, "hour": 3600, "時間": 3600,
    "MB": 1e6, "GB": 1e9, "MiB": 2**20, "GiB": 2**30, "M": 1e6,
}  # fmt: skip
_SECONDS = {"s", "ms", "seconds", "秒", "minutes", "minute", "分", "hours", "hour", "時間"}
_BYTES = {"MB", "GB", "MiB", "GiB"}
_UNIT = "|".join(sorted(map(re.escape, _UNITS), key=len, reverse=True))
_WORD_UNIT = re.compile(rf"(?<![\w'’])(?:{_UNIT})(?!\w)")
# 1.23x and 5 %, but 5 s: the 1970s are not measured.
_BEHIND = rf"(?: ?(?=[%x倍秒分時])| )({_UNIT})(?![A-Za-z0-9_/野]|あたり)"
_NUMBER = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?"
# With decimals or with a unit, and no part of a name: not Qwen2.5-Coder-1.5B, but 1.23x.
_MEASURED = re.compile(
    rf"(?<![\w.,-])(?:\d[\d,]*\.\d+(?=(?:{_BEHIND})?(?![\w.-]*\w))|(?:{_NUMBER})(?={_BEHIND}))", re.ASCII
)
# Of "359 and 717 s" both are seconds.
_OWN_UNIT = re.compile(rf"(?:(?:,| and| to| or| of| →) \d[\d.,]*)*{_BEHIND}")
_NUMERIC_CELL = re.compile(r"[\d\s.,;()*/×x±→−%<>≈+-]*\d[\d\s.,;()*/×x±→−%<>≈+-]*")
_WORD_OF_SOURCE = re.compile(r"\b[Ee]xample\b|例(?!外)|\b[Hh]a(?:s|ve) a test\b")
_WORD_OF_TRIAL = re.compile(r"\b(?:[Tt]rials?|[Ss]imulate[ds]|[Cc]alculated)\b")


@dataclass(frozen=True)
class Block:
    """A paragraph, an item of a list, or a row of a table.

    Attributes:
        said: Its text.
        linked: The text whose links lead to the files that hold its numbers.
        words: The text that may say what its numbers are: an example, a trial.
        is_row: Whether it is a row of a table below the head.
    """

    said: str
    linked: str
    words: str
    is_row: bool = False


def blocks(text: str) -> Iterator[Block]:
    """A table belongs with the paragraph before it; a row with a link of its own has that source alone.

    Everything below a heading belongs with that heading.
    """
    heading = ""
    for before, paragraph in pairwise(["", *re.split(r"\n\s*\n", FENCE.sub("", text))]):
        if _HEADING.match(paragraph):
            heading = paragraph
            continue
        for block in _parts(before, paragraph):
            yield replace(block, words=f"{heading}\n{block.words}")


def _parts(before: str, paragraph: str) -> Iterator[Block]:
    if not paragraph.lstrip().startswith("|"):
        yield from (Block(item, item, item) for item in _ITEM.split(paragraph))
        return
    head, *rows = paragraph.splitlines()
    whole, words = f"{before}\n{paragraph}", f"{before}\n{head}"
    yield Block(head, whole, words)
    goals = {column for column, cell in enumerate(head.split("|")) if cell.strip() == "goal"}
    for row in rows:
        said = "|".join(cell for column, cell in enumerate(row.split("|")) if column not in goals)
        yield Block(said, row if _LINK.search(row) else whole, f"{words}\n{row}", is_row=True)


def numbers_of(block: Block) -> list[str]:
    """The measured numbers as they are written, each once."""
    return list(dict.fromkeys(number for number, _ in _measured(block)))


def _measured(block: Block) -> Iterator[tuple[str, str]]:
    """Each number with the unit behind it, if there is one."""
    prose = _CODE.sub(lambda code: "`--`" if _OPTION.fullmatch(code[0]) else "``", block.said)
    prose = _SETTING.sub("", _VERSION.sub("", _LINK.sub("]", prose)))
    for number in _MEASURED.finditer(prose):
        unit = _OWN_UNIT.match(prose, number.end())
        yield number[0], unit[1] if unit else ""
    for cell in prose.split("|")[2:] if block.is_row else ():
        if _NUMERIC_CELL.fullmatch(cell):
            yield from ((number, "") for number in re.findall(_NUMBER, cell))


def without_source(text: str, folder: Path, *, trials: bool = False) -> list[str]:
    """The numbers that no linked file holds, rounded to as many decimals, and that no word marks."""
    unknown = []
    for block in blocks(text):
        if _WORD_OF_SOURCE.search(block.words) or (trials and _WORD_OF_TRIAL.search(block.words)):
            continue
        evidence = [number for file in _linked(block.linked, folder) for number in _evidence(file)]
        in_table = block.said.lstrip().startswith("|")
        around = set(_WORD_UNIT.findall(block.said + block.words)) if in_table else set()
        for number, unit in dict.fromkeys(_measured(block)):
            if not _is_among(number, evidence, {unit} if unit else around):
                unknown.append(number)
    return unknown


def _is_among(number: str, evidence: list[tuple[float, str]], units: set[str]) -> bool:
    """Whether the evidence has the number, rounded to as many decimals; 24,700 has three digits, not five."""
    digits, _, decimals = number.replace(",", "").partition(".")
    zeros = len(digits) - len(digits.rstrip("0")) if not decimals else 0
    half = 0.5 * 10.0 ** (min(zeros, max(len(digits) - 3, 0)) - len(decimals)) + 1e-9
    factors, kinds = {1.0, *(_UNITS[unit] for unit in units)}, {"", *map(_kind, units)}
    return any(
        abs(each / factor - float(f"{digits}.{decimals}")) <= half
        for each, kind in evidence
        for factor in factors
        if kind in kinds
    )


def _kind(unit: str) -> str:
    """What a unit measures: a number of seconds is no evidence for a perplexity."""
    return "seconds" if unit in _SECONDS else "bytes" if unit in _BYTES else ""


def _linked(text: str, folder: Path) -> list[Path]:
    names = [name for name in _LINK.findall(text) if not name.startswith(("http:", "https:"))]
    return [file for file in ((folder / name).resolve() for name in names) if file.is_file()]


@cache
def _evidence(file: Path) -> tuple[tuple[float, str], ...]:
    """Every number of the file, with what it measures if its column, its key or the word behind it says so."""
    if file.suffix in (".png", ".svg"):
        return ()
    content = file.read_text(encoding="utf-8")
    return tuple(_in_json(json.loads(content), "") if file.suffix == ".json" else _in_text(content))


def _in_json(content: Any, kind: str) -> Iterator[tuple[float, str]]:
    if isinstance(content, dict):
        for key, each in content.items():
            of_key = _kind_of_key(key)
            is_ratio = isinstance(each, dict) and key != "seconds"  # such as that of ttft_ms, with its interval
            yield from _in_json(each, "" if is_ratio else of_key or kind)
    elif isinstance(content, list):
        for each in content:
            yield from _in_json(each, kind)
    elif isinstance(content, int | float):
        yield float(content), kind


def _kind_of_key(key: str) -> str:
    if key.endswith(("_s", "_ms", "seconds")) and not key.endswith("_per_s"):
        return "seconds"
    return "bytes" if key.endswith("_bytes") else ""


def _in_text(content: str) -> Iterator[tuple[float, str]]:
    kinds: list[str] = []
    for line in content.splitlines():
        cells = line.split("|") if line.startswith("|") else [line]
        if len(cells) == 1:
            kinds = []
        elif not kinds:
            kinds = [_kind(cell.strip().rpartition(" ")[2]) for cell in cells]
        for place, cell in enumerate(cells):
            for number in re.finditer(_NUMBER, cell):
                unit = _OWN_UNIT.match(cell, number.end())
                kind = _kind(unit[1]) if unit else kinds[place] if place < len(kinds) else ""
                yield float(number[0].replace(",", "")), kind
