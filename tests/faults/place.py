"""Where a command under test writes: a plain directory, or a small disk that can be filled or made read-only.

The disk is a tmpfs in a mount namespace of its own, so nothing outside of the test sees it. A machine that allows no
namespaces gets a plain directory and weaker stand-ins: a limit on the size of files, and permission bits.
"""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

_DISK = "64m"
_FILLER = "filler"


@cache
def unshare() -> tuple[str, ...]:
    """The words that open a mount namespace here; none where that is not allowed."""
    as_root = ("unshare", "--mount", "--propagation", "private")
    for words in (as_root, (*as_root, "--user", "--map-root-user")):
        with suppress(OSError):
            if subprocess.run([*words, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode == 0:
                return words
    return ()


@dataclass(kw_only=True)
class Place:
    """A directory, as the command sees it and as the test sees it.

    Attributes:
        path: What the command is told.
        seen: The same directory from outside of the namespace.
        enter: Words before a command that take it into the namespace.
    """

    path: Path
    seen: Path
    enter: tuple[str, ...] = ()
    _read_only: bool = field(default=False, init=False)

    @property
    def is_disk(self) -> bool:
        """Whether it can be filled."""
        return bool(self.enter)

    def fill(self) -> None:
        """Leaves no free byte."""
        with (self.seen / _FILLER).open("wb", buffering=0) as filler, suppress(OSError):
            while True:
                filler.write(bytes(1 << 20))
        with (self.seen / _FILLER).open("ab", buffering=0) as filler, suppress(OSError):
            while True:
                filler.write(bytes(64))

    def make_read_only(self) -> None:
        """Nothing can be written any more, by root neither."""
        if self.is_disk:
            subprocess.run([*self.enter, "mount", "-o", "remount,ro", str(self.path)], check=True, capture_output=True)
        else:
            self.seen.chmod(0o555)
        self._read_only = True

    def mend(self) -> None:
        """Undoes :meth:`fill` and :meth:`make_read_only`."""
        if self._read_only and self.is_disk:
            subprocess.run([*self.enter, "mount", "-o", "remount,rw", str(self.path)], check=True, capture_output=True)
        elif self._read_only:
            self.seen.chmod(0o755)
        self._read_only = False
        (self.seen / _FILLER).unlink(missing_ok=True)

    def names(self) -> list[str]:
        """What is in it, but for the filler."""
        return sorted(path.name for path in self.seen.iterdir() if path.name != _FILLER)


def plain_place(directory: Path) -> Place:
    """An ordinary directory."""
    directory.mkdir()
    return Place(path=directory, seen=directory)


@contextmanager
def small_disk(directory: Path) -> Iterator[Place]:
    """A disk that is gone with the context, or with this process; a plain directory where that is not allowed."""
    if not unshare():
        yield plain_place(directory)
        return
    directory.mkdir()
    script = f'mount -t tmpfs -o size={_DISK} none "$0" && echo mounted && exec cat'
    with subprocess.Popen(
        [*unshare(), "sh", "-c", script, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"mounted\n"
            user = ("--user", "--preserve-credentials") if "--user" in unshare() else ()
            enter = ("nsenter", "--target", str(holder.pid), "--mount", *user)
            yield Place(path=directory, seen=Path(f"/proc/{holder.pid}/root{directory}"), enter=enter)
        finally:
            holder.kill()


def is_bound_by_permissions() -> bool:
    """Whether permission bits stop this user."""
    return os.geteuid() != 0
