"""Outputs appear whole or not at all.

What is being written lies beside the output, under its name: ``<out>.partial`` until it is renamed, and
``<out>.replaced`` for the moment in which the new takes the place of the old.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from toolchain.errors import SenteiError
from toolchain.outputs.checks import check_output_directory, check_output_file
from toolchain.outputs.claims import claimed_directory, delete
from toolchain.outputs.names import PARTIAL, REPLACED, beside


@contextmanager
def new_directory(out: Path, *, force: bool = False) -> Iterator[Path]:
    """Yields ``<out>.partial`` to write into; renames it to ``out`` on success, deletes it on failure.

    With ``force`` an existing ``out`` is replaced as a whole, and only after everything was written.

    Raises:
        SenteiError: See :func:`claimed_directory`; or what was written was removed meanwhile, or something is in its
            place now that was not there before.
    """
    with claimed_directory(out, force=force):
        partial = beside(out, PARTIAL)
        try:
            partial.mkdir()
            yield partial
            check_output_directory(out, force=force)
            replace_directory(partial, out)
        except Exception as error:
            if not isinstance(error, SenteiError) and not partial.is_dir():
                raise SenteiError(f"{partial} was removed while it was being written.", "Run it again.") from error
            raise
        finally:
            delete(partial)


def replace_directory(finished: Path, out: Path) -> None:
    """Renames a finished directory to ``out``; what was there is deleted last, and comes back if that fails."""
    replaced = beside(out, REPLACED)
    try:
        if out.exists():
            out.rename(replaced)
        finished.rename(out)
    except BaseException:
        if replaced.exists() and not out.exists():
            replaced.rename(out)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields ``<path>.partial`` to write to, and renames it to ``path``, so that a reader never sees half of a file.

    A process that is killed at any instant leaves the old file or the new one.
    """
    partial = beside(path, PARTIAL)
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all.

    Raises:
        SenteiError: ``path`` is no regular file.
    """
    check_output_file(path, force=True)
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
