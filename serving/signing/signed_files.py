"""The files that a signature covers: all of a directory, and nothing outside of it."""

import os
from pathlib import Path

from toolchain.errors import SenteiError

# The name that model-signing's own command line takes too.
SIGNATURE_FILE = "model.sig"


def signed_files(directory: Path) -> list[str]:
    """Lists every file below a directory, hidden ones too, except the signature itself.

    Returns:
        Paths relative to the directory, with ``/`` between their parts, sorted.

    Raises:
        SenteiError: It is no directory, or holds a link, a device, a FIFO or a socket, a directory that cannot be read,
            or a name that is not UTF-8.
    """
    if not directory.is_dir():
        raise SenteiError(f"Directory {directory} does not exist.", "Give a directory that sentei export wrote.")
    found = sorted(_below(directory, ""))
    return [name for name in found if name != SIGNATURE_FILE]


def _below(directory: Path, prefix: str) -> list[str]:
    found: list[str] = []
    try:
        entries = list(os.scandir(directory))
    except OSError as error:
        raise SenteiError(
            f"{directory} cannot be read ({error.strerror}), so nobody can say what is in it.",
            "Make it readable, or remove it.",
        ) from error
    for entry in entries:
        name = f"{prefix}{entry.name}"
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise SenteiError(f"{directory} holds a name that is not UTF-8: {name!a}.", "Rename that file.") from error
        if entry.is_dir(follow_symlinks=False):
            found += _below(directory / entry.name, f"{name}/")
        elif entry.is_file(follow_symlinks=False):
            found.append(name)
        else:
            kind = "symbolic link" if entry.is_symlink() else "device, FIFO or socket"
            raise SenteiError(
                f"{directory / entry.name} is a {kind}, and a signature covers files alone.",
                "Remove it if it does not belong there; else copy the directory with cp -rL, which copies what links "
                "lead to.",
            )
    return found
