"""The help of every command, as a snapshot: a change of the command line is seen in a diff.

After a change that is meant, write the snapshot anew:

    python -m tests.toolchain.cli.test_options > tests/toolchain/cli/options.txt
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from typer.main import get_command

from tests.command_line import sentei
from toolchain.cli.app import app

SNAPSHOT = Path(__file__).with_name("options.txt")
# So wide that every option has a line of its own.
WIDE = {"COLUMNS": "1000"}
FRAMES_AND_COLORS = re.compile(r"[─│╭╮╰╯]|\x1b\[[0-9;]*m")


def commands(words: tuple[str, ...], command: Any) -> Iterator[tuple[str, ...]]:
    yield words
    for name, child in getattr(command, "commands", {}).items():
        yield from commands((*words, name), child)


def help_of(words: tuple[str, ...]) -> str:
    with mock.patch.dict(os.environ, WIDE):
        done = sentei(*words, "--help")
    assert done.returncode == 0
    lines = [" ".join(FRAMES_AND_COLORS.sub(" ", line).split()) for line in done.stdout.strip().splitlines()]
    usage, rest = lines[: lines.index("")], lines[lines.index("") :]
    # A program that is not called sentei, such as pytest, names itself in the usage.
    arguments = " ".join(usage).partition("[OPTIONS]")[2]
    first = f"Usage: {' '.join(('sentei', *words))} [OPTIONS]{arguments}"
    return "\n".join([first, *(line for line in rest if line)])


def snapshot() -> str:
    return "\n\n".join(help_of(words) for words in commands((), get_command(app)))


def test_the_command_line_is_what_it_was():
    assert snapshot() == SNAPSHOT.read_text(encoding="utf-8").removesuffix("\n")


if __name__ == "__main__":
    print(snapshot())
