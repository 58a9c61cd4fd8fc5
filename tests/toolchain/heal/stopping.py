"""Ctrl-C at a step of the work."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Stop(KeyboardInterrupt):
    """Ctrl-C."""


def stopping_at(step: int, *, stage: str | None = None):
    """A progress that is interrupted when so many steps are done: of a stage, or of all together."""
    done = 0

    @contextmanager
    def progress(description: str, total: int) -> Iterator[Callable[[], None]]:
        def advance() -> None:
            nonlocal done
            done += stage in (None, description)
            if done == step:
                raise Stop

        yield advance

    return progress
