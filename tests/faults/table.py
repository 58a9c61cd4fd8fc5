"""Writes ``docs/reliability.md`` from what the tests of faults observed: ``make reliability``.

Each test says what it saw by ``record_property("reliability", Observed(...).as_json())``.
"""

import json
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

_OPTION = "--reliability"
_HEADERS = ("command", "exit code", "what it says", "what is left", "what the next run does")
_FAULTS = (
    "Ctrl-C", "SIGTERM", "SIGKILL", "disk full", "output removed", "output read-only", "input removed", "memory limit",
)  # fmt: skip
_INTRODUCTION = """\
# What happens when something goes wrong

Written by `make reliability` from what the tests in `tests/faults/` observed. Edit those tests instead.

Each row is one experiment, or several that ended alike. A test starts the real program on a small model and waits
until the named stage begins. It then causes the fault, and looks at the exit code, the message and the disk. Then it
mends the fault and runs the same command again, with `--resume` where the message offers it. `OUT` is the output
directory. "Nothing" means that nothing of the failed run is left.

"The same result" means that the next run writes what an undisturbed run writes: weights, plans and graphs byte for
byte, and every other number except times and speeds. In every row the inputs kept their bytes. An older `OUT` that
`--force` would replace was untouched until the new one was complete. No process went on running.
"""


@dataclass(frozen=True, kw_only=True)
class Observed:
    """What a fault did to a command."""

    fault: str
    command: str
    stage: str
    exit_code: int
    said: str
    left: str
    next_run: str

    def as_json(self) -> str:
        """For :func:`record_property`."""
        return json.dumps(asdict(self))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(_OPTION, type=Path, help="Write the table of faults to this file.")


def pytest_configure(config: pytest.Config) -> None:
    # Where pytest-xdist shares the tests out, this process alone sees all of them.
    if (file := config.getoption(_OPTION)) and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Table(file))


class _Table:
    """Collects what was observed, and writes it when all tests are done."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._observed: list[Observed] = []
        self._failed: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._failed.append(report.nodeid.rpartition("::")[2])
        elif report.when == "call":
            self._observed += [
                Observed(**json.loads(str(value))) for name, value in report.user_properties if name == "reliability"
            ]

    def pytest_sessionfinish(self) -> None:
        self._file.write_text(self._text(), encoding="utf-8")

    def _text(self) -> str:
        parts = [_INTRODUCTION]
        self._observed.sort(key=lambda each: (_FAULTS.index(each.fault), each.command))
        for fault in dict.fromkeys(each.fault for each in self._observed):
            parts.append(f"## {fault}\n")
            parts.append("| " + " | ".join(_HEADERS) + " |\n" + "|---" * len(_HEADERS) + "|")
            parts[-1] += "".join(f"\n{row}" for row in self._rows(fault)) + "\n"
        if self._failed:
            parts.append("## Failed\n\n" + "\n".join(f"- {name}" for name in self._failed) + "\n")
        return "\n".join(parts)

    def _rows(self, fault: str) -> list[str]:
        """One row for all experiments that ended alike."""
        alike: dict[tuple[str, ...], list[Observed]] = defaultdict(list)
        for each in self._observed:
            if each.fault == fault:
                alike[str(each.exit_code), each.said, each.left, each.next_run].append(each)
        return [f"| {_commands(group)} | {' | '.join(cells)} |" for cells, group in alike.items()]


def _commands(group: list[Observed]) -> str:
    stages: dict[str, list[str]] = defaultdict(list)
    for each in group:
        stages[each.command].append(each.stage)
    return "<br>".join(f"`{command}`: {', '.join(dict.fromkeys(where))}" for command, where in stages.items())
