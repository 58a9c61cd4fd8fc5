"""How long work tells that it goes on, without knowing who listens."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol


class Progress(Protocol):
    """Opens a stage of ``total`` steps; what it yields is called after each step."""

    def __call__(self, description: str, total: int) -> AbstractContextManager[Callable[[], None]]:
        """Opens the stage."""
        ...


@contextmanager
def no_progress(description: str, total: int) -> Iterator[Callable[[], None]]:
    """A :class:`Progress` that tells nobody."""
    yield lambda: None


@dataclass(frozen=True, kw_only=True)
class Listener:
    """Who hears of long work.

    Attributes:
        progress: Of its steps.
        note: Of what is found on the way, in sentences.
    """

    progress: Progress = no_progress
    note: Callable[[str], None] = lambda text: None


NOBODY = Listener()
