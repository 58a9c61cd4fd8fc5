"""What lives and what does not, for tests that kill."""

import time
from collections.abc import Callable
from pathlib import Path


def exists(pid: int) -> bool:
    """Whether a process lives; a zombie that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def descendants(pid: int) -> list[int]:
    """A process's children, theirs, and so on."""
    try:
        tasks = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except (FileNotFoundError, ProcessLookupError):
        return []
    children = [int(child) for task in tasks for child in task.split()]
    return children + [each for child in children for each in descendants(child)]


def wait_for(condition: Callable[[], object], timeout_s: float) -> None:
    """Waits until something is so, and fails where it does not come to be."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s in vain"
        time.sleep(0.1)
