"""Reads ``poc.yaml``: every mistake ends with its line, what is wrong, and what to write."""

from pathlib import Path

from serving.poc.document import PocDocument
from toolchain.yaml_documents import read_yaml_document

_TEMPLATE = "sentei poc init writes a file with all keys."


def read_poc(path: Path) -> PocDocument:
    """Reads and checks a file; the files that it names are looked at later.

    Raises:
        SenteiError: ``poc.yaml line N: what is wrong``, for the first mistake.
    """
    return read_yaml_document(path, PocDocument, hint=_TEMPLATE)
