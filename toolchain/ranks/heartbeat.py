"""Which ranks are alive, and the last words of those that are not.

Each rank has a thread that writes its next beat into the job's store twice a second, and reads the others'. A process
that was killed or stopped (SIGSTOP, a machine that froze) beats no more. A rank that ends by itself leaves its last
word as its last beat, so that others can say why the job ended. No torch here but for the store that is given.
"""

import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from toolchain.errors import INTERRUPTED, SenteiError

BEAT_S = 0.5
# Where a connection broke or a signal came, so many seconds without a beat are a death.
_DEAD_S = 3.0
_LONGEST_SEARCH_S = 6.0
# A rank hears of the end when it next talks to the others, which on a busy machine can take a while.
_LONGEST_WAIT_S = 10.0


class Store(Protocol):
    """What is used of :class:`torch.distributed.TCPStore`."""

    def set(self, key: str, value: str) -> None:
        """Writes a value."""
        ...

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """Reads values that are there."""
        ...


class RankLost(SenteiError):
    """Another rank ended, died or hangs."""

    def __init__(self, message: str, hint: str = "", exit_code: int = 2) -> None:
        super().__init__(message, hint)
        self.exit_code = exit_code


@dataclass(kw_only=True)
class _Seen:
    """What was seen of a rank: its last beat, and when it was new."""

    beat: dict[str, Any] = field(default_factory=dict)
    since: float = field(default_factory=time.monotonic)


class Heartbeats:
    """The beats of a job's ranks."""

    def __init__(
        self, store: Store, *, rank: int, hosts: Sequence[str], silence_s: float, first_holds_store: bool
    ) -> None:
        """``store`` is a connection of its own; ``hosts`` has the name of each rank's machine."""
        self._store, self._rank, self._hosts, self._silence_s = store, rank, hosts, silence_s
        self._first_holds_store = first_holds_store
        self._seen = {other: _Seen() for other in range(len(hosts)) if other != rank}
        self._looked = time.monotonic()
        self._store_is_lost = False
        self._last_word: dict[str, Any] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Begins to beat; every rank has written a first beat already."""
        self._thread.start()

    def check(self) -> None:
        """Does nothing as long as the others are alive.

        Raises:
            RankLost: One has ended, or has been silent for too long.
        """
        for other, seen in self._seen.items():
            if word := self._bad_word(other):
                raise self._stopped(other, word)
            if self._looked - seen.since > self._silence_s and not self._has_ended(other):
                raise RankLost(
                    f"Rank {other} of {len(self._hosts)} ({self._hosts[other]}) has not answered for "
                    f"{self._silence_s:g} seconds: it was stopped or hangs.",
                    _GO_ON,
                )
        if self._store_is_lost:
            raise self._without_store()

    def lost(self, reason: str) -> RankLost:
        """Finds out who broke a connection, from the beats of the next seconds."""
        return self._culprit() or RankLost(f"The ranks lost their connection ({reason}).", _GO_ON)

    def why_interrupted(self) -> RankLost | None:
        """Who made the launcher end this rank; ``None`` if all were interrupted."""
        return self._culprit()

    def say_last_word(self, sentence: str, exit_code: int) -> bool:
        """Says how this rank ends; whether that is out within some seconds. If not, the store would hang the caller."""
        self._last_word = {"sentence": sentence, "exit_code": exit_code}
        self._ended.set()
        self._thread.join(timeout=2 * _DEAD_S)
        return not self._thread.is_alive()

    def leave(self) -> None:
        """Tells that this rank looks at the store no more: the process that holds it need not stay for it."""
        try:
            self._store.set(beat_key(self._rank), json.dumps({**self._last_word, "left": True}))
        except RuntimeError:
            self._store_is_lost = True

    def wait_for_others(self) -> None:
        """Waits until the others that are alive have left the store, for some seconds."""
        end = time.monotonic() + _LONGEST_WAIT_S
        while time.monotonic() < end and not self._store_is_lost:
            if all(seen.beat.get("left") or self._is_silent(other) for other, seen in self._seen.items()):
                return
            self._look()
            time.sleep(BEAT_S / 5)

    @property
    def speaks(self) -> bool:
        """Whether this is the lowest rank alive: it alone tells why the job ended."""
        return all(self._is_silent(other) for other in self._seen if other < self._rank)

    def _culprit(self) -> RankLost | None:
        end = time.monotonic() + _LONGEST_SEARCH_S
        while time.monotonic() < end:
            self._look()
            for other in self._seen:
                if (word := self._bad_word(other)) and word["exit_code"] != INTERRUPTED:
                    return self._stopped(other, word)
            if self._store_is_lost:
                return self._without_store()
            for other in self._seen:
                if self._is_silent(other):
                    return self._died(other)
            if all(map(self._has_ended, self._seen)):
                return None
            time.sleep(BEAT_S / 5)
        return None

    def _is_silent(self, other: int) -> bool:
        if self._store_is_lost and self._first_holds_store and other == 0:
            return not self._has_ended(other)
        return self._looked - self._seen[other].since > _DEAD_S and not self._has_ended(other)

    def _has_ended(self, other: int) -> bool:
        return "sentence" in self._seen[other].beat

    def _bad_word(self, other: int) -> dict[str, Any] | None:
        beat = self._seen[other].beat
        return beat if beat.get("exit_code") else None

    def _stopped(self, other: int, word: dict[str, Any]) -> RankLost:
        where = f"Rank {other} of {len(self._hosts)} ({self._hosts[other]})"
        return RankLost(f"{where} stopped: {word['sentence']}", exit_code=int(word["exit_code"]))

    def _without_store(self) -> RankLost:
        if self._first_holds_store:
            return self._died(0)
        return RankLost("torchrun, through which the ranks know of each other, does not answer.", _GO_ON)

    def _died(self, other: int) -> RankLost:
        return RankLost(f"Rank {other} of {len(self._hosts)} ({self._hosts[other]}) died.", _GO_ON)

    def _beat(self) -> None:
        number = 0
        try:
            while True:
                number += 1
                ended = self._ended.wait(BEAT_S)
                beat = {"number": number, **self._last_word}
                self._store.set(beat_key(self._rank), json.dumps(beat))
                self._look()
                if ended:
                    return
        except RuntimeError:  # with the process that holds the store
            self._store_is_lost = True

    def _look(self) -> None:
        try:
            beats = self._store.multi_get([beat_key(other) for other in self._seen])
        except RuntimeError:
            self._store_is_lost = True
            return
        now = time.monotonic()
        for seen, beat in zip(self._seen.values(), map(json.loads, beats), strict=True):
            if beat != seen.beat:
                seen.beat, seen.since = beat, now
        self._looked = now


def beat_key(rank: int) -> str:
    """Where a rank's beats are in the store."""
    return f"beat/{rank}"


_GO_ON = "What was found is kept: start the job again with --resume."
