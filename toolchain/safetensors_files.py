"""What is checked of safetensors files before the library opens them. Standard library only, for the vLLM plugin."""

from pathlib import Path

from toolchain.errors import SenteiError
from toolchain.json_files import MAX_BYTES, read_json_object

# The headers of a model of 126 layers have 110 KB. The library itself reads up to 100 MB, which takes many seconds.
_MOST_HEADER_BYTES = MAX_BYTES
_LONGEST_NAME = 200


def shards_in(index: Path) -> list[str]:
    """The files that a safetensors index names, all of them directly beside it.

    Raises:
        SenteiError: It is damaged, or names something elsewhere.
    """
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise SenteiError(f"{index} is not a valid safetensors index (weight_map must name a file for each tensor).")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or name == ".." or "\0" in name or len(name) > _LONGEST_NAME:
            raise SenteiError(f"{index} points outside its directory ({name!r}).")
    return names


def check_header_size(path: Path) -> None:
    """Checks how long a file says its header is: that many bytes are parsed at once.

    Raises:
        SenteiError: It is too long, or the file ends within it.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
    except OSError as error:
        raise SenteiError(f"{path} cannot be read ({error.strerror}).") from error
    if length > _MOST_HEADER_BYTES:
        raise SenteiError(
            f"{path} is corrupt or truncated (its header would have {length:,} bytes).", "Download or copy it again."
        )


def let_others_read(directory: Path) -> None:
    """Gives weights the permissions of the config beside them: the library lets their owner alone read them."""
    for file in directory.glob("*.safetensors"):
        file.chmod((directory / "config.json").stat().st_mode & 0o777)
