"""A program that runs beside this one, writes to a log, and is never left running."""

import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from toolchain.lifetime import tied


@contextmanager
def child_process(
    command: Sequence[str],
    environment: Mapping[str, str],
    log: Path,
    *,
    talks: bool = False,
    directory: Path | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a command in a process group of its own, which is killed when the context ends.

    Args:
        command: One of ours, which calls :func:`toolchain.lifetime.end_with_parent`, so that it ends with this process
            too, however that ends.
        environment: Its whole environment.
        log: Where its output goes.
        talks: It takes requests from stdin and answers on an unbuffered pipe; only errors go to the log.
        directory: Where it runs; by default, where this process does.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if talks else output,
            stderr=output,
            bufsize=0,
            start_new_session=True,
            env=tied(environment),
            cwd=directory,
        )
    try:
        yield process
    finally:
        with process, suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
