"""Processes that end with the one that started them, however that one ended.

The child waits for the end of a pipe whose other end the parent holds: the system closes it when the parent ends. The
child needs no processor time for that. The parent's process id would not do where a script stands between the two. What
sentei starts has this pipe as its stdin; what :mod:`multiprocessing` starts has another.

Standard library only: vLLM's child processes import this before anything else.
"""

import multiprocessing
import multiprocessing.connection  # not left to the thread below: a child forked meanwhile would have half of it
import multiprocessing.util
import os
import select
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path

# Set in a process that sentei started with a pipe as its stdin: when the pipe ends, this process ends itself.
TIED_VARIABLE = "SENTEI_ENDS_WITH_STDIN"
# Set in a process whose vLLM engine was started by sentei: the plugin then ties the engine to it.
ENGINE_VARIABLE = "SENTEI_ENGINE_ENDS_WITH_PARENT"


def own_environment() -> dict[str, str]:
    """The environment of a Python that finds sentei's modules wherever it is started; give it ``-P``.

    A directory ``serving`` where the user happens to stand must not be taken for ours.
    """
    paths = [str(Path(__file__).resolve().parents[1]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def tied(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a child that calls :func:`end_with_parent`.

    Start it with ``stdin=subprocess.PIPE``, and leave that pipe open as long as the child shall live.
    """
    return {**environment, TIED_VARIABLE: "1"}


def end_with_parent(*, reads_stdin: bool = False) -> None:
    """Ties this process, and its group if it leads one, to the process that started it with :func:`tied`.

    Does nothing where :data:`TIED_VARIABLE` is not set.

    Args:
        reads_stdin: Requests come through the same pipe. Otherwise stdin becomes empty, also for this process's own
            children, of which one may wait for what nobody will write.
    """
    if not os.environ.pop(TIED_VARIABLE, ""):
        return
    pipe = os.dup(0)
    if not reads_stdin:
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
    threading.Thread(target=_end_with_pipe, args=(pipe,), daemon=True).start()


def _end_with_pipe(pipe: int) -> None:
    """Kills this process once a pipe's other end is closed, whatever is still to be read from it."""
    waiting = select.poll()
    waiting.register(pipe, 0)  # nothing but the end, which is always reported
    waiting.poll()
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def end_with_multiprocessing_parent(*, being_spawned: bool = False) -> None:
    """Ties this process to the one that started it with :mod:`multiprocessing`, and its forked children to it.

    Only the process itself is killed, never its group: a server that was started from a shell shares it with others.

    Args:
        being_spawned: The main module is being imported in a new child, which learns who its parent is a moment later.
    """
    # A child that is forked does not import anything again.
    multiprocessing.util.register_after_fork(_watch_multiprocessing_parent, lambda watch: watch())
    if being_spawned or multiprocessing.parent_process() is not None:
        _watch_multiprocessing_parent()


def _watch_multiprocessing_parent() -> None:
    threading.Thread(target=_end_with_multiprocessing_parent, daemon=True).start()


def _end_with_multiprocessing_parent() -> None:
    while (parent := multiprocessing.parent_process()) is None:
        time.sleep(0.05)
    parent.join()  # reads a pipe, so it holds for subreapers and fork servers too, unlike the parent's process id
    os.kill(os.getpid(), signal.SIGKILL)
