"""Several processes that run one command, as a launcher starts them."""

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from toolchain.cli.app import main

_LONGEST_S = 120.0


@dataclass(frozen=True)
class Process:
    """A child that runs ``sentei``, and what it has said."""

    pid: int
    log: Path

    def end(self) -> int:
        """Waits; the exit code, or the negative number of the signal that killed it."""
        deadline = time.monotonic() + _LONGEST_S
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        self.kill()
        raise AssertionError(f"It did not end: {self.said}")

    def kill(self) -> int:
        """Kills it, stopped or not."""
        os.kill(self.pid, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    @property
    def said(self) -> str:
        """On stdout and stderr."""
        return self.log.read_text()


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def start_ranks(
    directory: Path,
    commands: Sequence[Sequence[object]],
    *,
    first: Callable[[int], None] = lambda rank: None,
    timeout_s: float = 60,
) -> list[Process]:
    """Starts a job. Forked, for torch is imported here already.

    Args:
        directory: Gets a log per rank.
        commands: The command of each rank.
        first: Called in each process before the command, with its rank: makes accidents.
        timeout_s: After which a silent rank is given up.
    """
    port, started = free_port(), []
    for rank, command in enumerate(commands):
        variables = {"RANK": rank, "WORLD_SIZE": len(commands), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        # Both, for an engine of vLLM within pytest's own process leaves its LOCAL_WORLD_SIZE behind.
        variables |= {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": len(commands), "SENTEI_RANK_TIMEOUT_S": timeout_s}
        log = directory / f"rank-{rank}.log"
        pid = os.fork()
        if not pid:
            _run(command, {name: str(value) for name, value in variables.items()}, log, lambda: first(rank))  # noqa: B023
        started.append(Process(pid, log))
    return started


def end_after_a_kill(ranks: Sequence[Process]) -> None:
    """Waits for two ranks of which the second is killed: the first ends soon, and says so in one sentence."""
    started = time.monotonic()
    assert [each.end() for each in ranks] == [2, -signal.SIGKILL]
    assert time.monotonic() - started < 30
    [sentence] = [line for line in ranks[0].said.splitlines() if line.startswith("Error")]
    assert "Rank 1 of 2" in sentence and "died" in sentence and "--resume" in sentence
    assert "Traceback" not in ranks[0].said


def _run(command: Sequence[object], variables: dict[str, str], log: Path, first: Callable[[], None]) -> None:
    """The whole life of a child, which never returns into pytest."""
    code = 99
    try:
        os.environ.update(variables)
        torch.set_num_threads(1)
        sys.argv = ["sentei", *map(str, command)]
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        first()
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        os._exit(code)
