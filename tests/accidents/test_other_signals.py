"""Signals as people and shells send them: several at once, early, to a background job, from a terminal that closes."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

# A command that works until it is stopped, and takes a moment to clear away.
_COMMAND = """
import time
from toolchain.cli import app

def work():
    print("working", flush=True)
    try:
        time.sleep({seconds})
    except KeyboardInterrupt:
        time.sleep(0.5)
        print("cleared away", flush=True)
        raise

app.app = work
app.main()
"""


def start(seconds: float, prepare: Callable[[], object]) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", _COMMAND.format(seconds=seconds)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=prepare,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "working\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_comes_several_times_does_not_break_off_the_clearing_away(number: signal.Signals) -> None:
    process = start(60, lambda: signal.signal(number, signal.SIG_DFL))
    for _ in range(3):
        process.send_signal(number)
        time.sleep(0.05)
    assert process.communicate(timeout=30) == ("cleared away\n", "Interrupted.\n")
    assert process.returncode == 130


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_what_the_shell_had_ignored_stays_ignored(number: signal.Signals) -> None:
    process = start(1, lambda: signal.signal(number, signal.SIG_IGN))
    process.send_signal(number)
    assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == 0


def test_an_interrupt_while_the_program_is_loaded_shows_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n")
    program = tmp_path / "sentei"
    program.write_text("from toolchain.cli.app import main\nmain()\n")
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")
