"""YAML as people write it: plain values, each with its line, and nothing that means something else than it looks like.

PyYAML's own loaders read YAML 1.1, in which ``no`` is false and ``12:30`` a number. Here, as in YAML 1.2, only ``true``
and ``false`` are truth values and numbers are decimal. Aliases, tags, keys given twice and several documents are
refused.
"""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from toolchain.errors import SenteiError
from toolchain.json_files import read_bytes

_MAX_BYTES = 256 * 1024
_MAX_DEPTH = 12
Place = tuple[str | int, ...]
_INT = re.compile(r"[-+]?[0-9]{1,18}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]{1,3})?")
# What PyYAML takes a value for by its look alone.
_TAGS = {
    f"tag:yaml.org,2002:{name}"
    for name in ("map", "seq", "str", "int", "float", "bool", "null", "timestamp", "merge", "value")
}
_NULL = ("", "~", "null", "Null", "NULL")
_TRUTH = {"true": True, "True": True, "false": False, "False": False}


class _Loader(yaml.SafeLoader):
    """Without aliases: a few lines of them can stand for more than fits into memory."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """See PyYAML."""
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(problem=f"the alias *{event.anchor} is not read", problem_mark=event.start_mark)
        return super().compose_node(parent, index)


@dataclass(frozen=True)
class LinedYaml:
    """What a file holds, and where.

    Attributes:
        content: Mappings, lists and plain values.
        lines: The line of each key or item, counted from 1, by its place: keys and indices from the top.
    """

    content: Any
    lines: dict[Place, int] = field(default_factory=dict)

    def line_of(self, place: Place) -> int:
        """The line of a place, or of the nearest that is there above it."""
        while place and place not in self.lines:
            place = place[:-1]
        return self.lines.get(place, 1)


def read_yaml(path: Path) -> LinedYaml:
    """Reads a file.

    Raises:
        SenteiError: It is missing, too large, not UTF-8, or not YAML in the sense of this module; names the line.
    """
    try:
        text = read_bytes(path, max_bytes=_MAX_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SenteiError(f"{path} is not UTF-8 text ({error}).", "Save it in UTF-8.") from error
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise SenteiError(f"{path} line {line}: this is not YAML ({error.problem}).", _hint(text, line)) from error
    except (yaml.YAMLError, RecursionError) as error:
        raise SenteiError(f"{path} is not YAML ({' '.join(str(error).split())[:200]}).") from error
    found = LinedYaml({})
    return found if node is None else LinedYaml(_value(node, (), found.lines, path), found.lines)


def _hint(text: str, line: int) -> str:
    """What is most often wrong."""
    lines = text.splitlines()
    if any("\t" in each[: len(each) - len(each.lstrip())] for each in lines[max(0, line - 2) : line]):
        return "Indent with spaces; YAML takes no tabs."
    return "Write key: value, with a space after the colon, and indent what belongs to a key by two spaces."


def _value(node: yaml.Node, place: Place, lines: dict[Place, int], path: Path) -> Any:
    line = node.start_mark.line + 1
    lines.setdefault(place, line)
    if len(place) > _MAX_DEPTH:
        raise SenteiError(f"{path} line {line}: this is nested too deeply.", "Write it as in the template.")
    if node.tag not in _TAGS:
        raise SenteiError(f"{path} line {line}: tags such as {node.tag[:40]} are not read.", "Leave the tag out.")
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node)
    if isinstance(node, yaml.SequenceNode):
        return [_value(each, (*place, number), lines, path) for number, each in enumerate(node.value)]
    found: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
        key_line = key_node.start_mark.line + 1
        if key is None or key == "<<":
            raise SenteiError(f"{path} line {key_line}: a key must be a plain word.", "Write key: value.")
        if key in found:
            first = lines[(*place, key)]
            raise SenteiError(
                f"{path} line {key_line}: {key} is given twice, first in line {first}.", "Leave one of them out."
            )
        lines[(*place, key)] = key_line
        found[key] = _value(value_node, (*place, key), lines, path)
    return found


def _scalar(node: yaml.ScalarNode) -> Any:
    text: str = node.value
    if node.style is not None:  # quoted, or a block of text
        return text
    if text in _NULL:
        return None
    if text in _TRUTH:
        return _TRUTH[text]
    if _INT.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) and math.isfinite(float(text)) else text
