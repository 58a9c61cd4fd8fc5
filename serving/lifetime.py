"""Processes that end with the one that started them, however that one ended.

Standard library only: vLLM's child processes import this before anything else.
"""

import multiprocessing
import multiprocessing.connection  # not left to the thread below: a child forked meanwhile would have half of it
import multiprocessing.util
import os
import signal
import threading
import time

# Set to a process id: when that process is no longer the parent, this one ends itself and its whole group.
PARENT_VARIABLE = "SENTEI_LAUNCHER_PARENT"
# Set in a process whose vLLM engine was started by sentei: the plugin then ties the engine to it.
ENGINE_VARIABLE = "SENTEI_ENGINE_ENDS_WITH_PARENT"


def end_with_parent() -> None:
    """Ties this process and its group to the process that :data:`PARENT_VARIABLE` names, if it names one."""
    if parent := os.environ.pop(PARENT_VARIABLE, ""):
        threading.Thread(target=_end_group_with, args=(int(parent),), daemon=True).start()


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


def _end_group_with(parent: int) -> None:
    """Kills the process group once ``parent`` is gone."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(os.getpgrp(), signal.SIGKILL)
