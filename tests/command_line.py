"""Runs ``sentei``: in this process, which spares importing torch each time, or as a program of its own."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path
from subprocess import CompletedProcess
from unittest import mock

from toolchain.cli.app import main

PROGRAM = str(Path(sys.executable).with_name("sentei"))

# Of sentei prune: neither gradients nor re-fitting, for tests of something else.
PLAIN = ("--widths", "uniform", "--no-compensate")


def sentei(*arguments: object) -> CompletedProcess[str]:
    """The command in this process."""
    command = ["sentei", *map(str, arguments)]
    stdout, stderr, exit_code = io.StringIO(), io.StringIO(), 0
    with (
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
        mock.patch.object(sys, "argv", command),
        mock.patch.dict(os.environ),
    ):
        try:
            main()
        except SystemExit as end:
            exit_code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return CompletedProcess(command, exit_code, stdout.getvalue(), stderr.getvalue())


def sentei_program(*arguments: object) -> CompletedProcess[str]:
    """The installed program, in a process of its own."""
    command = [PROGRAM, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def refused(done: CompletedProcess[str], *parts: str) -> None:
    """Checks that bad input ended as it should: one sentence with these parts on stderr, and exit code 2."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    for part in parts:
        assert part in done.stderr.replace("\n", " ")
