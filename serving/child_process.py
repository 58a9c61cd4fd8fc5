"""A program that runs beside this one, writes to a log, and is never left running."""

import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from serving.lifetime import PARENT_VARIABLE


def own_environment() -> dict[str, str]:
    """The environment of a Python that finds sentei's modules wherever it is started; give it ``-P``.

    A directory ``serving`` where the user happens to stand must not be taken for ours.
    """
    paths = [str(Path(__file__).resolve().parents[1]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


@contextmanager
def child_process(
    command: Sequence[str], environment: Mapping[str, str], log: Path, *, talks: bool = False
) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a command in a process group of its own, which is killed when the context ends.

    Args:
        command: One of ours, which takes care that it ends with this process too, however that ends: most by calling
            :func:`serving.lifetime.end_with_parent`.
        environment: Its whole environment.
        log: Where its output goes.
        talks: Input and output are unbuffered pipes to this process instead, and only errors go to the log.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE if talks else subprocess.DEVNULL,
            stdout=subprocess.PIPE if talks else output,
            stderr=output,
            bufsize=0,
            start_new_session=True,
            env={**environment, PARENT_VARIABLE: str(os.getpid())},
        )
    try:
        yield process
    finally:
        with process, suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
