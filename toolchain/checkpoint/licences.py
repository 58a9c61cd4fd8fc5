"""The licences that a model directory states: in its card's metadata, and as files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.errors import SenteiError
from toolchain.json_files import read_bytes

_CARD = "README.md"
# The hub's names for them.
_KEYS = ("license", "license_name", "license_link")
_OTHER = "other"
_MAX_BYTES = 1024 * 1024
_LONGEST = 200


@dataclass(frozen=True, kw_only=True)
class Licence:
    """One licence.

    Attributes:
        name: What the card calls it, such as ``apache-2.0``, or the name of the file.
        text: What the file says; ``None`` where the card names it.
    """

    name: str
    text: str | None = None


def stated_licences(directory: Path) -> list[Licence]:
    """The licences that a directory states; empty where it states none.

    Of what sentei wrote they are those of the base model: licence files are carried along from directory to directory,
    and so is what the card says, except where an export has another card.
    """
    files = sorted(path for path in directory.glob("LICENSE*") if path.is_file())
    return [
        *(Licence(name=name) for name in _named(licence_of_card(directory))),
        *(Licence(name=path.name, text=_text(path)) for path in files),
    ]


def licence_of_card(directory: Path) -> dict[str, str | list[str]]:
    """What a model card's metadata says of the licence, in the hub's keys; empty where it says nothing readable."""
    metadata = _metadata(directory / _CARD)
    found = {}
    for key in _KEYS:
        value = metadata.get(key)
        if all(isinstance(each, str) and 0 < len(each) <= _LONGEST for each in _listed(value)):
            found[key] = value
    return {key: value for key, value in found.items() if value}


def _named(metadata: dict[str, str | list[str]]) -> list[str]:
    names = metadata.get("license")
    return _listed(metadata.get("license_name", names) if names == _OTHER else names)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _metadata(card: Path) -> dict[str, Any]:
    text = _text(card) if card.is_file() else None
    if text is None or not text.startswith("---"):
        return {}
    from huggingface_hub import metadata_load

    try:
        return metadata_load(card) or {}
    except Exception:  # whatever YAML's parser says of what a stranger wrote: then the card states nothing
        return {}


def _text(path: Path) -> str | None:
    try:
        return read_bytes(path, max_bytes=_MAX_BYTES).decode()
    except (SenteiError, UnicodeDecodeError):  # too long to be a licence, or no text: its name is still stated
        return None
