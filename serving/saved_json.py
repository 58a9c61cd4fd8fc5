"""JSON files that sentei has written, read again: which schema they have, and whose fault a missing field is."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.errors import SenteiError, is_out_of_memory, reason_of

_SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Source:
    """One JSON file: where it was, and what it holds."""

    path: Path
    content: Mapping[str, Any]


@contextmanager
def fields_of(source: Source) -> Iterator[Mapping[str, Any]]:
    """Yields a file's content; a field that is missing or of the wrong kind is reported with the file's name.

    Raises:
        SenteiError: Inside, a field was not what it should be.
    """
    with blamed_for_fields(str(source.path)):
        yield source.content


@contextmanager
def blamed_for_fields(where: str) -> Iterator[None]:
    """Reports a field that is missing or of the wrong kind with the name of the file; see :func:`fields_of`."""
    try:
        yield
    except (SenteiError, OSError):
        raise
    # Wherever arithmetic, a chart or a table first stumbles over what is not there.
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise SenteiError(
            f"{where} does not have the fields it should ({type(error).__name__}: {reason_of(error)}).",
            "Was it edited, or written by another version?",
        ) from error


def checked(source: Source) -> Source:
    """The source, if its schema is the one that is read here.

    Raises:
        SenteiError: It is not.
    """
    version = source.content.get("schema_version")
    if version != _SCHEMA_VERSION:
        raise SenteiError(
            f"{source.path}: schema_version is {version!r}, and this sentei reads {_SCHEMA_VERSION}.",
            "Use the sentei that wrote it, or make the file again.",
        )
    return source
