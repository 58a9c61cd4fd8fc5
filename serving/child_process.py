"""A program that runs beside this one, writes to a log, and is never left running."""

import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from serving.vllm_launcher import PARENT_VARIABLE


@contextmanager
def child_process(
    command: Sequence[str], environment: Mapping[str, str], log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a command in a process group of its own, which is killed when the context ends.

    Args:
        command: One of ours, which calls :func:`serving.vllm_launcher.end_with_parent`: so it ends with this process
            too, however that ends.
        environment: Its whole environment.
        log: Where its output goes.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**environment, PARENT_VARIABLE: str(os.getpid())},
        )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
