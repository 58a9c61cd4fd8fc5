"""Text that is on every machine: the prose of Python's language reference, which ships with CPython."""

from pathlib import Path

SOURCE = "Python language reference"


def documents() -> list[str]:
    """All of it, about 110 000 tokens, in the order of its topics' names."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def write_halves(directory: Path) -> None:
    """Writes ``calibration.txt`` and ``evaluation.txt``: the same kind of prose, and no document in both."""
    every = documents()
    for name, half in (("calibration.txt", every[::2]), ("evaluation.txt", every[1::2])):
        (directory / name).write_text("\n\n".join(half), encoding="utf-8")
