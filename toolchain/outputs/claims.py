"""An output belongs to one command at a time, which first puts right what a process that died left there."""

import functools
import inspect
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import ParamSpec, TypeVar

from toolchain.errors import SenteiError
from toolchain.outputs.checks import check_output_directory, check_output_file, is_empty_directory, kind_of
from toolchain.outputs.lock import refuse_if_held, take_lock
from toolchain.outputs.names import LOCK, PARTIAL, REPLACED, beside
from toolchain.ranks.launch import is_first

_ANOTHER = "Choose another output."

_P = ParamSpec("_P")
_R = TypeVar("_R")

# Which thread of this process has which output: a command that calls another one may write to the same place.
_held: dict[Path, int] = {}


@contextmanager
def claimed_directory(out: Path, *, force: bool) -> Iterator[None]:
    """Keeps an output directory for this thread alone, from before the work until it stands.

    Missing parents are made, and taken away again if nothing was written. What a process that died left is put right:
    an old output that it had moved aside comes back, what it had not finished is deleted.

    Raises:
        SenteiError: ``out`` is refused (see :func:`check_output_directory`), nothing can be written there, another
            process is writing there, or something that is not ours lies where the unfinished output will be.
    """
    check_output_directory(out, force=True)
    with held(out):
        check_output_directory(out, force=force)
        yield


@contextmanager
def claimed_file(out: Path, *, force: bool) -> Iterator[None]:
    """Likewise for a file; see :func:`claimed_directory`.

    Raises:
        SenteiError: See there and :func:`check_output_file`.
    """
    check_output_file(out, force=True)
    with held(out):
        check_output_file(out, force=force)
        yield


def writes_directory(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Claims the directory that a function is given as ``out`` while it runs; see :func:`claimed_directory`.

    Its ``force`` says whether what is there may be replaced. A function that is not given ``out`` runs as it is, and so
    does a process that shares its command with another one, which writes.
    """
    return _claims(claimed_directory, function)


def writes_file(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Claims the file that a function is given as ``out`` while it runs; see :func:`claimed_file`."""
    return _claims(claimed_file, function)


def _claims(claimed: Callable[..., AbstractContextManager[None]], function: Callable[_P, _R]) -> Callable[_P, _R]:
    signature = inspect.signature(function)

    @functools.wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        if given.arguments["out"] is None or not is_first():
            return function(*args, **kwargs)
        with claimed(given.arguments["out"], force=given.arguments["force"]):
            return function(*args, **kwargs)

    return run


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Holds the lock of an output, of any kind, and puts right what a process that died left there.

    Raises:
        SenteiError: See :func:`claimed_directory`.
    """
    place = Path(os.path.realpath(out.parent)) / out.name
    if _held.get(place) == threading.get_ident():
        yield
        return
    for parent in place.parents:
        if _held.get(parent) != threading.get_ident():
            refuse_if_held(beside(parent, LOCK), out)
    with _parents(out):
        try:
            lock = take_lock(beside(place, LOCK), out)
        except OSError as error:
            raise SenteiError(
                f"Output {out}: nothing can be written in {out.parent} ({error.strerror}).", _ANOTHER
            ) from error
        is_ours = lock.is_left_over
        try:
            if not is_ours:
                _refuse_others(place, out)
            lock.sign()
            is_ours = True
            _put_right(place, out)
            _held[place] = threading.get_ident()
            yield
        finally:
            _held.pop(place, None)
            # What could not be cleared away stays known as ours, for the next command.
            lock.release(keep_file=is_ours and any(map(os.path.lexists, _unfinished(place))))


@contextmanager
def held_in_place(directory: Path) -> Iterator[None]:
    """Holds the lock of an output that stands, while files in it are written again.

    Raises:
        SenteiError: Nothing can be written in it, or another process is writing it.
    """
    if not directory.is_dir():
        yield  # whoever reads it will say so in better words
        return
    try:
        with TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise SenteiError(
            f"Nothing can be written in {directory} ({error.strerror}).", "Copy it to where you may write."
        ) from error
    with ExitStack() as stack:
        # Who may not write beside it cannot replace it either.
        if os.access(directory.resolve().parent, os.W_OK):
            stack.enter_context(held(directory))
        yield


@contextmanager
def _parents(out: Path) -> Iterator[None]:
    """Makes the missing parents of an output, and takes away at the end those that are empty."""
    places = [out.parent, *out.parent.parents]
    missing = [each for each in places if not each.exists()]
    nearest = next(each for each in places if each.exists())
    if not nearest.is_dir():
        raise SenteiError(f"Output {out} lies below {nearest}, which is a {kind_of(nearest)}.", _ANOTHER)
    if missing and ".." in out.parts:
        raise SenteiError(f"Output {out} leads through {missing[-1]}, which does not exist.", "Write it without '..'.")
    try:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SenteiError(f"Output {out}: {out.parent} cannot be made ({error.strerror}).", _ANOTHER) from error
        yield
    finally:
        for each in missing:
            try:
                each.rmdir()
            except OSError:
                break  # it holds the output, or another command's


def _unfinished(place: Path) -> tuple[Path, Path]:
    return beside(place, PARTIAL), beside(place, REPLACED)


def _refuse_others(place: Path, out: Path) -> None:
    """Refuses to delete what no command of ours left: it would have left its lock too."""
    for path in filter(os.path.lexists, _unfinished(place)):
        if not is_empty_directory(path):
            raise SenteiError(
                f"Output {out} needs the name {path.name} while it is unfinished, and something is there that no "
                "interrupted command left.",
                "Choose another output, or move that away.",
            )


def _put_right(place: Path, out: Path) -> None:
    """Clears away what a process that died left beside an output, whose lock is held."""
    partial, replaced = _unfinished(place)
    if os.path.lexists(replaced) and not os.path.lexists(place):
        replaced.rename(place)  # it died between two renames: what was there before it is whole
    for path in (partial, replaced):
        delete(path)
        if os.path.lexists(path):
            raise SenteiError(f"Output {out}: {path}, which an interrupted command left, cannot be deleted.", _ANOTHER)


def delete(path: Path) -> None:
    """Deletes a directory or a file as far as it can be."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
