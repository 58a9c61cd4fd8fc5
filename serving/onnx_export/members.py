"""The files of an export, by the names that the export itself gives them."""

from pathlib import Path, PurePosixPath

from toolchain.errors import SenteiError

_LONGEST_NAME = 100


def member(directory: Path, name: str) -> Path:
    """A file of an export.

    A link must lead to a file of the same directory, or of the hub's cache, which keeps the files of a snapshot as
    links into the folder ``blobs`` beside it.

    Args:
        directory: The export.
        name: What one of its files calls it; it may come from a stranger.

    Returns:
        The path, inside the directory.

    Raises:
        SenteiError: There is no such file, or it is not inside the directory.
    """
    relative = PurePosixPath(name)
    inside = not relative.is_absolute() and ".." not in relative.parts and not {"\0", "\\"} & set(name)
    path = directory / name
    try:
        if inside and not path.is_file():
            raise SenteiError(f"{path} does not exist.", "Export the model again.")
        found = path.resolve() if inside else path
    except (OSError, RuntimeError) as error:  # a name that is too long, or links in a circle
        raise SenteiError(f"{name[:_LONGEST_NAME]!a} in {directory} cannot be read.", "Export it again.") from error
    if not (inside and any(found.is_relative_to(home) for home in _homes(directory))):
        raise SenteiError(
            f"{directory}: the file {name[:_LONGEST_NAME]!a} is not inside the directory.",
            "Copy it there if you trust it, or export the model again.",
        )
    return path


def _homes(directory: Path) -> list[Path]:
    home = directory.resolve()
    return [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
