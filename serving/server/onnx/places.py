"""How many requests a server works on at once; who comes when all places are taken is told when to come again."""

import math
import time
from collections import deque
from collections.abc import Callable

from starlette.exceptions import HTTPException

_LONGEST_WAIT_S = 60
_REMEMBERED = 16


class Places:
    """Places of requests, from before their prompts are tokenised until the model is done with them.

    For the event loop alone.
    """

    def __init__(self, number: int, *, refused: Callable[[], None] = lambda: None) -> None:
        """Makes places.

        Args:
            number: How many.
            refused: Is called for each request that finds none.
        """
        self._free, self._refused = number, refused
        self._released: deque[float] = deque(maxlen=_REMEMBERED)

    def take(self) -> "Place":
        """Takes a place.

        Raises:
            HTTPException: 429 with ``Retry-After``: all are taken.
        """
        if not self._free:
            self._refused()
            raise HTTPException(
                429, "The server has as many requests as it takes. Try again later.", {"Retry-After": self._wait_s()}
            )
        self._free -= 1
        return Place(self._release)

    def _release(self) -> None:
        self._free += 1
        self._released.append(time.monotonic())

    def _wait_s(self) -> str:
        """Whole seconds until the next place is free, as often as that was lately."""
        if not self._released:
            return "1"
        between = (time.monotonic() - self._released[0]) / len(self._released)
        return str(min(_LONGEST_WAIT_S, math.ceil(between)))


class Place:
    """One request's."""

    def __init__(self, release: Callable[[], None]) -> None:
        """See :meth:`Places.take`."""
        self._release: Callable[[], None] | None = release

    def leave(self) -> None:
        """Gives it to the next; does nothing the second time."""
        if self._release:
            self._release()
            self._release = None
