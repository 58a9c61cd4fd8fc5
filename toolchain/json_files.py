"""The one way in which JSON is read and compared: within bounds, and with one sentence for whatever is wrong with it.

Files may come from strangers. What Python's parser would let pass and other readers of the same file would take in
another way is refused: keys that are given twice, ``NaN`` and ``Infinity``, half a character of a surrogate pair. So
are numbers and nestings that no file of ours has, and that would end in an overflow further on.

Standard library only: the vLLM plugin imports this module.
"""

import gc
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from toolchain.errors import SenteiError

# A list of empty lists takes 28 times its file's size in memory, 180 MB at most, and a second of time.
MAX_BYTES = 6 * 1024 * 1024
_MAX_DEPTH = 64
# The marks that begin or end something, and how many of them a long line may have; a text's own are among them.
_PARTS, _MOST_PARTS = (b"[", b"{", b",", b'"'), 4_000_000
# Sums, squares and products of two such numbers are still floats.
_MAX_NUMBER = 1e150
_LONGEST_SHOWN = 40
_ABSENT = object()
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
# What may be too large, or no number; strings that look like it only cost time.
_SUSPECT = re.compile(r"\d{140}|[\d.][eE]\+?\d{2,}\s*(?:[,\]}]|\Z)|NaN|Infinity")


def read_json(path: Path, *, hint: str = "", max_bytes: int = MAX_BYTES) -> Any:
    """Reads a JSON file.

    Args:
        path: The file.
        hint: What to do where it cannot be read.
        max_bytes: A larger file is refused before it is read.

    Raises:
        SenteiError: It is missing, no regular file, too large, not UTF-8, no JSON, or too deeply nested.
    """
    return parse_json(read_bytes(path, hint=hint, max_bytes=max_bytes), str(path), hint=hint)


def read_json_object(path: Path, *, hint: str = "", max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Reads a JSON file that holds an object; see :func:`read_json`.

    Raises:
        SenteiError: See there, or it holds something else.
    """
    content = read_json(path, hint=hint, max_bytes=max_bytes)
    if not isinstance(content, dict):
        raise SenteiError(f"{path} does not hold an object.", hint)
    return content


def read_json_lines(path: Path, *, hint: str = "", max_bytes: int = MAX_BYTES) -> Iterator[tuple[str, Any]]:
    """Reads a file with one JSON value per line, line by line; blank lines are left out.

    Args:
        path: The file; of any size.
        hint: What to do where it cannot be read.
        max_bytes: A longer line is refused; so is one longer than :data:`MAX_BYTES` that holds many things.

    Yields:
        Words that name the line, and its value.

    Raises:
        SenteiError: The file is missing, no regular file or cannot be read, or a line is too long or not readable
            JSON; see :func:`parse_json`.
    """
    _check_regular(path, hint)
    number = 0
    try:
        with path.open("rb") as file:
            while line := file.readline(max_bytes + 1):
                number += 1
                where = f"{path} line {number}"
                if len(line) > max_bytes:
                    raise SenteiError(f"{where} is longer than {max_bytes:,} bytes.", "Split it into several.")
                if len(line) > MAX_BYTES and num_parts(line) > _MOST_PARTS:
                    raise SenteiError(f"{where} is longer than {MAX_BYTES:,} bytes and is not one long text.", hint)
                if line.strip():
                    yield where, parse_json(line, where, hint=hint)
    except OSError as error:
        raise SenteiError(f"{path} cannot be read ({error.strerror}).", hint) from error


def num_parts(content: bytes) -> int:
    """How many marks of JSON there are; it bounds the memory that the parsed values take."""
    return sum(map(content.count, _PARTS))


def read_bytes(path: Path, *, hint: str = "", max_bytes: int = MAX_BYTES) -> bytes:
    """Reads a regular file that is not too large.

    Raises:
        SenteiError: It is missing, no regular file, too large, or cannot be read.
    """
    _check_regular(path, hint)
    try:
        if (size := path.stat().st_size) > max_bytes:
            raise SenteiError(f"{path} has {size:,} bytes, and at most {max_bytes:,} are read.", hint)
        return path.read_bytes()
    except OSError as error:
        raise SenteiError(f"{path} cannot be read ({error.strerror}).", hint) from error


def parse_json(content: str | bytes, where: str, *, hint: str = "") -> Any:
    """Parses JSON.

    Args:
        content: Text, or UTF-8 bytes with or without a byte order mark.
        where: Names it in the error.
        hint: What to do where it cannot be parsed.

    Raises:
        SenteiError: It is no JSON, too deeply nested, ambiguous, or has a number that is none or too large; see the
            module.
    """
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
    except UnicodeDecodeError as error:
        raise SenteiError(f"{where} is not UTF-8 text ({error}).", hint) from error
    try:
        with _no_collection():
            found = json.loads(text, object_pairs_hook=_without_repeated_keys)
        if _SURROGATE.search(text):
            json.dumps(found, ensure_ascii=False).encode()
    except RecursionError as error:
        raise SenteiError(f"{where} is not readable JSON (it is too deeply nested).", hint) from error
    except UnicodeEncodeError as error:
        raise SenteiError(f"{where} is not readable JSON (it holds half a character).", hint) from error
    except ValueError as error:
        raise SenteiError(f"{where} is not readable JSON ({error}).", hint) from error
    if text.count("[") + text.count("{") > _MAX_DEPTH:
        _check_depth(found, where, hint)
    if _SUSPECT.search(text) and (unusual := _unusual_number(found)):
        field, number = unusual
        said = f"{number:.3g}" if isinstance(number, float) else f"a number of {len(str(abs(number)))} digits"
        raise SenteiError(f"{where} is not readable JSON ({field.lstrip('.')[:200] or 'it'} is {said}).", hint)
    return found


def first_difference(one: Any, other: Any, where: str = "") -> tuple[str, str, str] | None:
    """The first place where two JSON values differ, in the order of the keys, and what stands there.

    Args:
        one: A value as JSON has it.
        other: Another.
        where: What the place's name begins with.

    Returns:
        The place, as in ``text.sources[1].weight``, and both values for people; ``None`` if all is the same.
    """
    pairs: Iterator[tuple[Any, Any, str]]
    if isinstance(one, dict) and isinstance(other, dict):
        keys = {**one, **other}
        pairs = ((one.get(key, _ABSENT), other.get(key, _ABSENT), f"{where}.{key}".lstrip(".")) for key in keys)
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = ((*both, f"{where}[{number}]") for number, both in enumerate(zip(one, other, strict=True)))
    else:
        return None if one == other else (where, _shown(one), _shown(other))
    return next((found for each in pairs if (found := first_difference(*each))), None)


def _shown(value: object) -> str:
    if value is _ABSENT:
        return "nothing"
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[: _LONGEST_SHOWN - 3]}..."


@contextmanager
def _no_collection() -> Iterator[None]:
    """Millions of new lists make Python look through all there are for cycles, again and again; JSON has none."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _check_regular(path: Path, hint: str) -> None:
    try:
        if path.is_file():
            return
        what = "is no regular file" if path.exists() else "does not exist"
    except OSError as error:
        what = f"cannot be read ({error.strerror})"
    raise SenteiError(f"{path} {what}.", hint)


def _without_repeated_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {repeated[:80]!r} is there twice")
    return found


def _check_depth(found: Any, where: str, hint: str) -> None:
    level = [found]
    for _ in range(_MAX_DEPTH):
        level = [
            child
            for node in level
            if isinstance(node, (dict, list))
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return
    raise SenteiError(f"{where} is not readable JSON (it is too deeply nested).", hint)


def _unusual_number(node: Any) -> tuple[str, float] | None:
    """The field of the first number that is none or too large, and that number."""
    if isinstance(node, (dict, list)):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            if isinstance(value, (dict, list, float, int)) and (found := _unusual_number(value)):
                return f".{key}{found[0]}", found[1]
    elif isinstance(node, (float, int)) and not -_MAX_NUMBER <= node <= _MAX_NUMBER:
        return "", node
    return None
