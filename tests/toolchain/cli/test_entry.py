"""How the program begins and how it is interrupted."""

import builtins
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from toolchain.cli import entry


def test_ctrl_c_during_the_imports_is_one_word(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    real = builtins.__import__

    def interrupted(name, *rest):
        if name == "toolchain.cli.app":
            raise KeyboardInterrupt
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", interrupted)
    with pytest.raises(SystemExit) as end:
        entry.main()
    assert (end.value.code, capsys.readouterr().err) == (130, "Interrupted.\n")


COMMAND = """
import signal, sys, time
from unittest import mock
from toolchain.cli import app

def work() -> None:
    try:
        print("working", flush=True)
        time.sleep(60)
    finally:
        print("clearing away", flush=True)
        time.sleep(1)
        print("cleared", flush=True)

signal.signal(signal.SIGHUP, signal.SIG_IGN if sys.argv[1:] == ["nohup"] else signal.SIG_DFL)
with mock.patch.object(app, "app", work):
    app.main()
"""


@contextmanager
def working(*words: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", COMMAND, *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout and process.stdout.readline() == "working\n"
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_second_ctrl_c_does_not_break_off_the_clearing_away(number: signal.Signals):
    with working() as process:
        process.send_signal(number)
        assert process.stdout and process.stdout.readline() == "clearing away\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
        assert (out, err, process.returncode) == ("cleared\n", "Interrupted.\n", 130)


def test_under_nohup_a_job_outlives_its_terminal():
    with working("nohup") as process:
        process.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)


FAULT = """
import sys, typer
from unittest import mock
from toolchain.cli import app

commands = typer.Typer(pretty_exceptions_enable=False)
fault = eval(sys.argv.pop())

@commands.command()
def work() -> None:
    raise fault

with mock.patch.object(app, "app", commands):
    app.main()
"""


@pytest.mark.parametrize(
    ("fault", "asked", "said"),
    [
        ("ValueError('no such luck')", "", "Error: sentei itself failed (ValueError: no such luck)"),
        ("ValueError('no such luck')", "1", "Error: sentei itself failed (ValueError: no such luck)"),
        ("EOFError()", "", ""),
        ("BrokenPipeError(32, 'Broken pipe')", "", ""),
    ],
)
def test_a_fault_of_sentei_is_no_failed_check(fault: str, asked: str, said: str, tmp_path):
    environment = {**os.environ, "TMPDIR": str(tmp_path), "SENTEI_TRACEBACK": asked}
    command = [sys.executable, "-c", FAULT, fault]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 70
    assert said in done.stderr
    assert ("Traceback" in done.stderr) == bool(asked)


def test_a_library_that_cannot_be_imported_is_no_failed_check(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "toolchain.cli.app", None)
    with pytest.raises(SystemExit) as end:
        entry.main()
    assert end.value.code == 70 and "ModuleNotFoundError" in capsys.readouterr().err
