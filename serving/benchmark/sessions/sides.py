"""What answers for each side of a benchmark, started when it is needed."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Generic, TypeVar

from serving.benchmark.side import Side

T = TypeVar("T")


def free_log(directory: Path, side: Side, repeat: int) -> Path:
    """Where a process writes: what is started again must not write over the log of the one that died."""
    stem, number = f"{side.name}-{repeat}", 1
    while (log := directory / f"{stem}{'' if number == 1 else f'-start{number}'}.log").exists():
        number += 1
    return log


class SideProcesses(Generic[T]):
    """One at a time, and another for each repeat; or all of them, kept throughout."""

    def __init__(self, start: Callable[[Side, int, ExitStack], T], *, keep_all: bool = False) -> None:
        """Starts nothing yet.

        Args:
            start: Given a side, a repeat and a stack that takes what ends the process, starts one.
            keep_all: They run already, and none is ended for another.
        """
        self._start, self._keep_all = start, keep_all
        self._running: dict[Side, tuple[int, T, ExitStack]] = {}

    def get(self, side: Side, repeat: int) -> T:
        """What answers for this side in this repeat."""
        for other, (started_for, _, _) in tuple(self._running.items()):
            if not self._keep_all and (other, started_for) != (side, repeat):
                self.drop(other)
        if side not in self._running:
            with ExitStack() as stack:
                started = self._start(side, repeat, stack)
                self._running[side] = repeat, started, stack.pop_all()
        return self._running[side][1]

    def drop(self, side: Side) -> None:
        """Ends a side's; the next :meth:`get` starts another."""
        if side in self._running:
            self._running.pop(side)[2].close()

    def close(self) -> None:
        """Ends everything."""
        for side in tuple(self._running):
            self.drop(side)
