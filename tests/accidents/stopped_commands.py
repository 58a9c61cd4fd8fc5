"""Commands in processes of their own, stopped where a test wants to look at them, and killed or let go from there.

One server process imports the libraries; each command is a fork of it, which costs no time.
"""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

_LIBRARIES = ["torch", "transformers", "toolchain.cli.app", "toolchain.prune.pipeline", "toolchain.evaluate.run"]
_PATIENCE_S = 120


class StoppedCommand:
    """``sentei`` with some words, at rest in one of its functions."""

    def __init__(self, process: Any, place: Path) -> None:
        self._process, self._place = process, place
        self.pid: int = process.pid

    @property
    def stderr(self) -> str:
        return (self._place / "stderr").read_text()

    def go_on(self) -> int:
        """Lets it end; returns its exit code."""
        (self._place / "go").touch()
        return self._end()

    def kill(self, number: signal.Signals) -> int:
        """Sends a signal and waits; returns the exit code, negative for a signal that ended it."""
        os.kill(self.pid, number)
        return self._end()

    def _end(self) -> int:
        self._process.join(_PATIENCE_S)
        assert self._process.exitcode is not None, self.stderr
        return self._process.exitcode


@contextmanager
def stopped(place: Path, *words: object, at: str, call: int = 1) -> Iterator[StoppedCommand]:
    """Starts a command and yields it when it comes to rest.

    Args:
        place: An empty directory for what it says.
        words: After ``sentei``.
        at: Where it rests, as in ``toolchain.prune.apply:compensate``.
        call: Before which call of that function.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_LIBRARIES)
    process = context.Process(target=_run, args=(place, [str(word) for word in words], at, call))
    process.start()
    try:
        until = time.monotonic() + _PATIENCE_S
        while not (place / "rests").exists():
            said = (place / "stderr").read_text() if (place / "stderr").exists() else ""
            assert process.is_alive(), said
            assert time.monotonic() < until, said
            time.sleep(0.02)
        yield StoppedCommand(process, place)
    finally:
        process.kill()
        process.join()


def _run(place: Path, words: list[str], at: str, call: int) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(place / name, os.O_WRONLY | os.O_CREAT), number)
    module, _, path = at.partition(":")
    *owners, name = path.split(".")
    owner: Any = import_module(module)
    for each in owners:
        owner = getattr(owner, each)
    function, calls = getattr(owner, name), 0

    def rest(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            (place / "rests").touch()
            until = time.monotonic() + _PATIENCE_S
            while not (place / "go").exists() and time.monotonic() < until:
                time.sleep(0.02)
        return function(*args, **kwargs)

    setattr(owner, name, rest)
    sys.argv = ["sentei", *words]
    import_module("toolchain.cli.app").main()
