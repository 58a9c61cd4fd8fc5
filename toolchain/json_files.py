"""The one way in which JSON is read: within bounds, and with one sentence for whatever is wrong with it.

Files may come from strangers. What Python's parser would let pass and other readers of the same file would take in
another way is refused: keys that are given twice, ``NaN`` and ``Infinity``, half a character of a surrogate pair.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from toolchain.errors import SenteiError

# A list of empty lists takes 21 times its file's size in memory: 350 MB at most.
MAX_BYTES = 16 * 1024 * 1024
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_json(path: Path, *, hint: str = "", max_bytes: int = MAX_BYTES) -> Any:
    """Reads a JSON file.

    Args:
        path: The file.
        hint: What to do where it cannot be read.
        max_bytes: A larger file is refused before it is read.

    Raises:
        SenteiError: It is missing, no regular file, too large, not UTF-8, no JSON, or too deeply nested.
    """
    if not path.is_file():
        raise SenteiError(f"There is no file {path}.", hint)
    try:
        if (size := path.stat().st_size) > max_bytes:
            raise SenteiError(f"{path} has {size:,} bytes, and at most {max_bytes:,} are read.", hint)
        content = path.read_bytes()
    except OSError as error:
        raise SenteiError(f"{path} cannot be read ({error.strerror}).", hint) from error
    return parse_json(content, str(path), hint=hint)


def read_json_object(path: Path, *, hint: str = "", max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Reads a JSON file that holds an object; see :func:`read_json`.

    Raises:
        SenteiError: See there, or it holds something else.
    """
    content = read_json(path, hint=hint, max_bytes=max_bytes)
    if not isinstance(content, dict):
        raise SenteiError(f"{path} does not hold an object.", hint)
    return content


def parse_json(content: str | bytes, where: str, *, hint: str = "") -> Any:
    """Parses JSON.

    Args:
        content: Text, or UTF-8 bytes with or without a byte order mark.
        where: Names it in the error.
        hint: What to do where it cannot be parsed.

    Raises:
        SenteiError: It is no JSON, too deeply nested, or ambiguous; see the module.
    """
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
        found = json.loads(text, object_pairs_hook=_without_repeated_keys, parse_constant=_refuse_constant)
        if _SURROGATE.search(text):
            json.dumps(found, ensure_ascii=False).encode()
    except RecursionError as error:
        raise SenteiError(f"{where} is not readable JSON (it is too deeply nested).", hint) from error
    except UnicodeEncodeError as error:
        raise SenteiError(f"{where} is not readable JSON (it holds half a character).", hint) from error
    except ValueError as error:
        raise SenteiError(f"{where} is not readable JSON ({error}).", hint) from error
    return found


def _without_repeated_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return found


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON number")
