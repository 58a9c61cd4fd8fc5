"""Output directories that appear whole or not at all."""

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from toolchain.errors import SenteiError


def check_output_directory(out: Path, *, force: bool, inputs: Iterable[Path] = ()) -> None:
    """Refuses an output directory that holds anything, unless forced. Called before long work starts.

    Args:
        out: Where the command will write.
        force: Whether what is there may be replaced.
        inputs: What the command reads; never replaced, forced or not.

    Raises:
        SenteiError: ``out`` is a file, an input or a parent of one, or not empty and ``force`` is off. Even with
            ``force``, a git checkout and a parent of the working directory are refused, and always what a directory
            cannot be renamed to: a symbolic link or a mount point.
    """
    if out.is_file():
        raise SenteiError(f"Output {out} is a file, not a directory.")
    if out.is_symlink() or out.absolute().is_mount():
        kind = "symbolic link" if out.is_symlink() else "mount point"
        raise SenteiError(f"Output {out} is a {kind}, which cannot be replaced.", "Choose a directory below it.")
    resolved = out.resolve()
    for path in inputs:
        if path.resolve() == resolved or resolved in path.resolve().parents:
            raise SenteiError(f"Output {out} would replace the input {path}.", "Choose another output directory.")
    if out.exists() and (Path.cwd().is_relative_to(resolved) or (out / ".git").exists()):
        raise SenteiError(f"Output {out} is a working directory and is never replaced.", "Choose a directory below it.")
    if not force and out.is_dir() and any(out.iterdir()):
        raise SenteiError(f"Output directory {out} is not empty.", "Choose another, or add --force to replace it.")


def beside(out: Path, suffix: str) -> Path:
    """``<out>.<suffix>``, where what belongs to an output lies while it is unfinished.

    Unlike ``with_name`` it takes ``.`` and ``/``, so that :func:`check_output_directory` is what refuses them.
    """
    return out.parent / f"{out.name}.{suffix}"


@contextmanager
def new_directory(out: Path, *, force: bool = False) -> Iterator[Path]:
    """Yields ``<out>.partial`` to write into; renames it to ``out`` on success, deletes it on failure.

    With ``force`` an existing ``out`` is replaced as a whole, and only after everything was written.

    Raises:
        SenteiError: See :func:`check_output_directory`.
    """
    check_output_directory(out, force=force)
    partial = beside(out, "partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    replace_directory(partial, out)


def replace_directory(finished: Path, out: Path) -> None:
    """Renames a finished directory to ``out``; what was there is deleted last."""
    replaced = beside(out, "replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if out.exists():
        out.rename(replaced)
    finished.rename(out)
    shutil.rmtree(replaced, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Writes a file beside its place, then renames it, so that a reader never sees half of it."""
    partial = beside(path, "partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
