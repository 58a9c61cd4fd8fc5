"""What may be an output: nothing that is there is replaced unasked, and some things never are."""

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from toolchain.errors import SenteiError
from toolchain.outputs.lock import refuse_if_held
from toolchain.outputs.names import SUFFIXES

_KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symbolic link",
    stat.S_IFIFO: "FIFO",
    stat.S_IFSOCK: "socket",
}
_LONGEST_NAME = 255 - max(len(f".{suffix}") for suffix in SUFFIXES)  # in bytes
_ANOTHER = "Choose another output."


def check_output_directory(out: Path, *, force: bool, inputs: Iterable[Path] = ()) -> None:
    """Refuses an output that is no directory, or that holds anything, unless forced.

    Args:
        out: Where the command will write.
        force: Whether what is there may be replaced.
        inputs: What the command reads; never replaced, forced or not.

    Raises:
        SenteiError: ``out`` is anything but a directory, an input or a parent of one, or not empty and ``force`` is
            off. Even with ``force``, a git checkout, a parent of the working directory and what holds another output
            that is being written are refused, and always what a directory cannot be renamed to: a symbolic link or a
            mount point.
    """
    _check_words(out)
    resolved = Path(os.path.realpath(out))
    if out.is_symlink() or resolved.is_mount():  # resolved: pathlib takes every "." for a mount point
        kind = "symbolic link" if out.is_symlink() else "mount point"
        raise SenteiError(f"Output {out} is a {kind}, which cannot be replaced.", "Choose a directory below it.")
    if out.exists() and not out.is_dir():
        raise SenteiError(f"Output {out} is a {kind_of(out)}, not a directory.", _ANOTHER)
    for path in inputs:
        if path.resolve() == resolved or resolved in path.resolve().parents:
            raise SenteiError(f"Output {out} would replace the input {path}.", "Choose another output directory.")
    if out.exists() and (Path.cwd().is_relative_to(resolved) or (out / ".git").exists()):
        raise SenteiError(f"Output {out} is a working directory and is never replaced.", "Choose a directory below it.")
    if out.name in ("", ".."):
        raise SenteiError(f"Output {out} does not end in a name.", "Write the name of the directory.")
    if not force and out.is_dir() and any(out.iterdir()):
        raise SenteiError(f"Output directory {out} is not empty.", "Choose another, or add --force to replace it.")
    if force and out.is_dir():
        for lock in out.rglob("*.lock"):
            refuse_if_held(lock, out)


def check_output_file(out: Path, *, force: bool) -> None:
    """Refuses a file that exists, unless forced, and always what is no regular file.

    Raises:
        SenteiError: ``out`` is a directory, a symbolic link, a FIFO or a device, or exists and ``force`` is off.
    """
    _check_words(out)
    if out.name in ("", "..") or (out.is_dir() and not out.is_symlink()):
        raise SenteiError(f"Output {out} is a directory.", "Give a file name.")
    if os.path.lexists(out) and kind_of(out) != "file":
        raise SenteiError(f"Output {out} is a {kind_of(out)}, which is never replaced.", _ANOTHER)
    if out.exists() and not force:
        raise SenteiError(f"Output {out} exists.", "Choose another, or add --force to replace it.")


def kind_of(path: Path) -> str:
    """What lies at a path, in a word; a symbolic link counts as itself."""
    return _KINDS.get(stat.S_IFMT(path.lstat().st_mode), "device")


def is_empty_directory(path: Path) -> bool:
    """Whether a directory is there, not a link to one, and holds nothing."""
    return kind_of(path) == "directory" and not any(path.iterdir())


def _check_words(out: Path) -> None:
    """Refuses a path that a file system or a report cannot hold."""
    try:
        str(out).encode()
    except UnicodeEncodeError as error:
        raise SenteiError(f"Output {os.fsencode(out)!r} is not written in UTF-8.", _ANOTHER) from error
    if (length := len(out.name.encode())) > _LONGEST_NAME:
        raise SenteiError(
            f"Output {out.name[:40]}... has a name of {length} bytes, and at most {_LONGEST_NAME} fit: what is "
            "unfinished lies beside it, under a longer name.",
            "Choose a shorter one.",
        )
    if out.suffix.removeprefix(".") in SUFFIXES:
        raise SenteiError(
            f"Output {out} ends in {out.suffix}, as what is unfinished of another output does.", "Choose another name."
        )
    try:
        out.absolute()
    except FileNotFoundError as error:
        raise SenteiError("The working directory does not exist any more.", "Change to another directory.") from error
