"""``sentei gate``."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from toolchain.cli.console import Output
from toolchain.cli.options import JsonOption, QuietOption
from toolchain.errors import SenteiError

if TYPE_CHECKING:
    from serving.gate.decide import Decision
    from serving.gate.document import GateDocument

_EXIT_CODES = {"promote": 0, "roll back": 1, "wait": 3}
_STDERR = 2


def gate(
    settings: Annotated[Path, typer.Argument(metavar="GATE.yaml", help="Labels of both sides, and limits.")],
    *,
    prometheus: Annotated[
        str | None,
        typer.Option(metavar="URL", help="The Prometheus that scrapes both sides; by default http://127.0.0.1:9090."),
    ] = None,
    apply: Annotated[
        str | None,
        typer.Option(
            metavar="COMMAND",
            help="Run this if the answer is to promote. Words are split as in a shell, but no shell runs.",
        ),
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Judge a canary by its metrics. Exit code 0: promote; 1: roll back; 3: wait for more requests."""
    output = Output(as_json=as_json, quiet=quiet)
    from serving.gate.document import GateDocument
    from serving.gate.prometheus import DEFAULT_URL, Prometheus
    from serving.gate.run import judge
    from serving.gate.words import as_object
    from toolchain.yaml_documents import read_yaml_document

    asked = read_yaml_document(settings, GateDocument, hint="docs/guides/deploy.md shows one with all keys.")
    command = None if apply is None else _words(apply)
    decision = judge(asked, Prometheus(prometheus or DEFAULT_URL), settings.parent)
    output.result(as_object(decision, asked), lambda console: _show(console, decision, asked))
    if command is not None and decision.answer == "promote":
        _run(command)
    raise typer.Exit(_EXIT_CODES[decision.answer])


def _words(command: str) -> list[str]:
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise SenteiError(
            f"--apply {command!r} cannot be split into words ({error}).", "Quote as in a shell."
        ) from error
    if not words or shutil.which(words[0]) is None:
        raise SenteiError(f"--apply: there is no command {words[0] if words else command!r}.", "Give its path.")
    return words


def _run(command: list[str]) -> None:
    sys.stdout.flush()
    # Its output must not stand between ours and who reads that.
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=_STDERR, check=False)
    if done.returncode:
        raise SenteiError(f"The answer was to promote, and {command[0]} ended with exit code {done.returncode}.")


def _show(console: Console, decision: "Decision", asked: "GateDocument") -> None:
    from serving.gate.words import sentence, table

    console.print(sentence(decision, asked))
    if decision.checks:
        shown = Table("", "original", "candidate", "candidate is worse by", "")
        for row in table(decision):
            shown.add_row(*row)
        console.print(shown)
