"""What is checked of a tokenizer's files before a library reads them whole, and makes of them what they say."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from toolchain.errors import SenteiError
from toolchain.json_files import num_parts, parse_json

# Twice the largest known, Gemma 3's.
_MOST_BYTES = 64_000_000
# What a tokenizer reads beside its settings, and reads whole.
_FILES = ("tokenizer.*", "vocab.*", "merges.txt", "*chat_template*", "additional_chat_templates/*")
# The library counts from 0 to the highest id: 9 s and 4 GB for one of 10^9. The largest vocabularies have 262 thousand.
_MOST_TOKENS = 10_000_000
# 262 thousand tokens with 600 thousand merges, each a pair, have 5 million.
_MOST_PARTS = 6_000_000
# A whole number of so many digits where a value may stand.
_LARGE_NUMBER = re.compile(rb"[:,\[]\s*\d{8}")


def check_tokenizer_files(directory: Path) -> None:
    """Refuses files that would take more memory than any model's tokenizer.

    Raises:
        SenteiError: One is too large, is no file, or gives a token an id that no vocabulary reaches.
    """
    for path in (path for pattern in _FILES for path in directory.glob(pattern)):
        is_folder = path.is_dir() and "chat_template" in path.name
        if not is_folder and (not path.is_file() or path.stat().st_size > _MOST_BYTES):
            raise SenteiError(f"{path} is not a file, or larger than {_MOST_BYTES:,} bytes.")
    for name in ("tokenizer.json", "vocab.json", "added_tokens.json"):
        if (directory / name).is_file():
            _check_ids(directory / name)


def _check_ids(path: Path) -> None:
    content = path.read_bytes()
    if _LARGE_NUMBER.search(content) is None:
        return  # without parsing megabytes
    if num_parts(content) > _MOST_PARTS:
        raise SenteiError(f"{path} has more parts than any model's tokenizer.", "Download or copy it again.")
    largest = max(_ids(parse_json(content, str(path))), default=0)
    if largest >= _MOST_TOKENS:
        raise SenteiError(
            f"{path} gives a token the id {str(largest)[:20]}, and no vocabulary has {_MOST_TOKENS:,} tokens.",
            "Download or copy it again.",
        )


def _ids(found: Any) -> Iterator[int]:
    """The ids of a ``tokenizer.json``, or of a file of tokens and their ids."""
    if not isinstance(found, dict):
        return
    model, added = found.get("model"), found.get("added_tokens")
    tables = [found, model.get("vocab")] if isinstance(model, dict) else [found]
    places = [each.values() for each in tables if isinstance(each, dict)]
    places += [each.values() for each in added if isinstance(each, dict)] if isinstance(added, list) else []
    yield from (value for values in places for value in values if isinstance(value, int))
