"""Every command in the documents is one that can be typed: nothing is run here, but all of it is parsed."""

import re
import tomllib
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import typer
from typer.main import get_command

from serving.benchmark.workload import parse_slo
from tests.docs.commands import DOCUMENTS, ROOT, Command, commands_of, mentions, sentei_commands
from toolchain.cli.app import app
from toolchain.cli.arguments import CheckedCommand
from toolchain.errors import SenteiError
from toolchain.evaluate.task_requests import parse_batch_size, parse_task
from toolchain.metrics.question_metrics import parse_question_metric
from toolchain.prune.budget.allocation import parse_protected
from toolchain.prune.budget.target import parse_targets
from toolchain.text.sources import parse_sources, parse_text

PROGRAM = get_command(app)
# Options whose values have a form that Typer does not know, by the names of their parameters.
FORMS: dict[str, Callable[[Any], object]] = {
    "target": parse_targets,
    "protect": parse_protected,
    "calibration": parse_sources,
    "data": parse_sources,
    "slo": parse_slo,
    "text": lambda texts: [parse_text(str(each)) for each in (texts if isinstance(texts, list) else [texts])],
    "task": lambda tasks: [parse_task(each) for each in tasks],
    "metric": lambda given: [parse_question_metric(each) for each in (given if isinstance(given, list) else [given])],
    "limit_metric": parse_question_metric,
    "batch_size": lambda given: parse_batch_size(given) if isinstance(given, str) else None,
}


def find_command(words: Sequence[str]) -> tuple[Any, list[str]]:
    """The command that the first words name, and the rest of the words."""
    command, rest = PROGRAM, list(words)
    while rest and rest[0] in getattr(command, "commands", {}):
        command, rest = command.commands[rest[0]], rest[1:]
    return command, rest


def what_is_wrong(words: Sequence[str]) -> str | None:
    """Why sentei would not take these words; ``None`` if it would."""
    command, rest = find_command(words)
    if rest in (["--help"], ["--version"]):
        return None
    if not isinstance(command, CheckedCommand):
        return f"there is no command {' '.join(rest[:1])!r}"
    try:
        context = command.make_context("sentei", rest)
        for name, value in context.params.items():
            if value and name in FORMS:
                FORMS[name](value)
    except (typer.Exit, SenteiError) as error:
        return str(error)
    except Exception as error:
        if not hasattr(error, "format_message"):  # Typer brings a click of its own, whose errors have no public name
            raise
        return error.format_message()
    return None


def test_each_command_of_a_block_can_be_typed() -> None:
    shown = [each for document in DOCUMENTS for each in sentei_commands(document)]
    wrong = {str(each): what_is_wrong(each.words) for each in shown}
    assert {command: reason for command, reason in wrong.items() if reason} == {}


def test_prose_names_commands_and_options_that_exist() -> None:
    # Decisions also name what was not chosen.
    documents = [each for each in DOCUMENTS if each.parent.name != "decisions"]
    assert [part for document in documents for each in mentions(document) if (part := unknown_part(each))] == []


def unknown_part(mention: Command) -> str | None:
    """The first word that sentei does not know. A command that is only named, or cut short, needs nothing else."""
    command, rest = find_command(mention.words)
    if command is PROGRAM and rest and re.fullmatch(r"[a-z-]+", rest[0]) and not rest[0].startswith("--"):
        return f"{mention}: no command {rest[0]}"
    own = rest[: rest.index("--")] if "--" in rest else rest
    known = {name for each in command.params for name in (*each.opts, *each.secondary_opts)} | {"--help"}
    for word in own:
        if word.startswith("--") and word.partition("=")[0] not in known:
            return f"{mention}: no option {word}"
    return None


def test_most_commands_are_shown_somewhere() -> None:
    """Else the tests above would pass because nothing is found."""
    shown = {id(find_command(each.words)[0]) for document in DOCUMENTS for each in sentei_commands(document)}
    assert len(shown) >= 20


@pytest.mark.parametrize(
    "words",
    [
        "prune MODEL --sparsity 0.25",  # --out is missing
        "prune MODEL -o out --sparsity a-quarter",
        "prune MODEL -o out --sparsness 0.25",
        "prune MODEL -o out --target speedup=fast",
        "prune MODEL -o out --sparsity 0.2 --protect head:3",
        "benchmark MODEL deploy --engine tgi -o out",
        "export tensorrt pruned -o out",
        "plan",
        "plan show",
        "evaluate MODEL deploy",
    ],
)
def test_a_command_that_cannot_be_typed_is_found(words: str) -> None:
    assert what_is_wrong(words.split())


def test_nobody_is_sent_to_an_index_where_sentei_is_not() -> None:
    """Its name is free there: whoever registers it would run on the machines of all who type the command."""
    by_name = re.compile(r"pip install (?:-\S+ )*['\"]?sentei(?![-\w]*\S*\.whl)")
    found = {
        f"{document.name}: {line.strip()}"
        for document in DOCUMENTS
        for line in document.read_text(encoding="utf-8").splitlines()
        if by_name.search(line)
    }
    [said] = found
    assert said.startswith("install.md: Where it is installed, ")
    assert by_name.search("pip install -U 'sentei[eval]==1'") and not by_name.search("pip install sentei-*.whl")


def test_targets_of_make_extras_and_scripts_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = set(project["optional-dependencies"])
    wrong = []
    for each in (each for document in DOCUMENTS for each in commands_of(document)):
        program, *words = each.words
        if program == "make":
            named = {word for word in words if "=" not in word and not word.startswith("-")}
            wrong += [f"{each}: no target {name}" for name in named - targets]
        if "pip" in (program, *words[:2]):
            asked = {name for word in words for name in re.findall(r"(?:^sentei|^\.)\[([\w,-]+)\]", word)}
            wrong += [f"{each}: no extra {name}" for names in asked for name in set(names.split(",")) - extras]
        if program in ("python", "python3", "bash") and words and words[0].partition("/")[0] in ("benchmarks", "docs"):
            wrong += [f"{each}: no such file"] if not (ROOT / words[0]).is_file() else []
    assert wrong == []
