"""A lock per output: two commands that write to the same place would destroy each other's work.

The kernel holds the lock (``flock``), so it ends with its process, however that dies. The file ``<out>.lock`` says who
holds it. A file that outlives its process is harmless, and it is evidence: what lies unfinished beside it is ours.
"""

import errno
import fcntl
import json
import os
import shlex
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from toolchain.errors import SenteiError

_FIELDS = frozenset({"pid", "host", "command", "since"})
_MAX_BYTES = 4096
_ATTEMPTS = 20
_NOT_SUPPORTED = {errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK}


@dataclass(frozen=True, kw_only=True)
class Lock:
    """A lock that this process holds.

    Attributes:
        path: The file.
        descriptor: Of the open file; the kernel's lock hangs on it.
        is_left_over: The file of a process that died was there before.
    """

    path: Path
    descriptor: int
    is_left_over: bool

    def sign(self) -> None:
        """Writes into the file who holds the lock."""
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, json.dumps(_self_description()).encode() + b"\n", 0)

    def release(self, *, keep_file: bool) -> None:
        """Gives the lock back.

        Args:
            keep_file: Leave the file as evidence that what lies beside it is ours.
        """
        try:
            # Not if somebody deleted it and another process has made its own since.
            if not keep_file and _is_same_file(self.descriptor, self.path):
                self.path.unlink()
        except OSError:
            pass  # an empty lock file is harmless, and may lie where nothing can be written any more
        finally:
            os.close(self.descriptor)


def take_lock(path: Path, out: Path) -> Lock:
    """Takes the lock, or says who has it.

    Args:
        path: The lock's file, in an existing directory.
        out: What it locks, for messages.

    Raises:
        SenteiError: Another process holds it, or a file that is not a lock lies there.
        OSError: The file cannot be made.
    """
    for _ in range(_ATTEMPTS):
        if (lock := _try_lock(path, out)) is not None:
            return lock
    raise SenteiError(f"Output {out} cannot be locked: others take and leave {path.name} all the time.", "Try again.")


def refuse_if_held(path: Path, out: Path) -> None:
    """Refuses an output that lies above or below another one, whose lock is this and which is being written.

    Raises:
        SenteiError: A process holds the lock.
    """
    if not path.is_file():
        return
    with suppress(OSError), path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if (holder := _parse(file.read(_MAX_BYTES))) is not None:
                raise _held(holder, out, what=path.with_suffix("")) from error


def _try_lock(path: Path, out: Path) -> Lock | None:
    """``None`` where the process that held the lock deleted its file in the same moment."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise _foreign(path, out)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _held(_parse(_read(descriptor)), out) from error
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:  # some network file systems know no locks: the user must take care
                raise
        if not _is_same_file(descriptor, path):
            os.close(descriptor)
            return None
        before = _read(descriptor)
        if before and _parse(before) is None:
            raise _foreign(path, out)
    except BaseException:
        os.close(descriptor)
        raise
    return Lock(path=path, descriptor=descriptor, is_left_over=bool(before))


def _read(descriptor: int) -> bytes:
    return os.pread(descriptor, _MAX_BYTES, 0)


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _self_description() -> dict[str, Any]:
    # Without what stands after the command: options may hold what others on this machine need not read.
    command = [Path(sys.argv[0]).name, *sys.argv[1:2]] if sys.argv else ["python"]
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "command": shlex.join(command),
        "since": datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
    }


def _parse(content: bytes) -> Mapping[str, Any] | None:
    """What a lock file says; ``None`` if it was not written by :func:`take_lock`."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and found.keys() == _FIELDS else None


def _held(holder: Mapping[str, Any] | None, out: Path, what: Path | None = None) -> SenteiError:
    who = "another process"
    if holder is not None:
        # A stranger's file may hold what a terminal takes for commands.
        words = {name: "".join(filter(str.isprintable, str(value)))[:200] for name, value in holder.items()}
        who = "process {pid} on {host} ({command}) since {since}".format_map(words)
    which = f"Output {out} is" if what is None else f"Output {out} meets {what}, which is"
    return SenteiError(f"{which} being written by {who}.", "Wait until that ends, stop it, or choose another output.")


def _foreign(path: Path, out: Path) -> SenteiError:
    return SenteiError(
        f"Output {out} needs the name {path.name} for its lock, and something that is not a lock of sentei's is there.",
        "Choose another output, or move that away.",
    )
