"""Links of the repository's Markdown, as they are on the site: what lies outside of docs/ is taken in beside it."""

import posixpath
import re
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Files outside of docs/ are found below this name.
OUTSIDE = "repository"
_INDEX = "index.md"
_LINK = re.compile(r"(\]\()([^)#\s]*)((?:#[^)\s]*)?\))")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def place_on_site(path: str) -> str:
    """Where a file of the repository is on the site; both relative, in POSIX form."""
    if path == "README.md":
        return _INDEX
    if path == "docs" or path.startswith("docs/"):
        return path.removeprefix("docs").lstrip("/")
    return f"{OUTSIDE}/{path}"


def linked_files(path: str) -> set[str]:
    """What a Markdown file of the repository links to, of the repository, by path."""
    found: set[str] = set()

    def note(target: str) -> str:
        found.add(target)
        return target

    _each_link((ROOT / path).read_text(encoding="utf-8"), path, note)
    return found


def links_on_site(markdown: str, path: str) -> str:
    """The text of the repository's file ``path`` with its links as the site has them."""
    here = posixpath.dirname(place_on_site(path))

    def rewritten(target: str) -> str:
        place = place_on_site(target)
        if (ROOT / target).is_dir():
            place = posixpath.join(place, _INDEX)
        return posixpath.relpath(place, here or ".")

    return _each_link(markdown, path, rewritten)


def _each_link(markdown: str, path: str, replaced: Callable[[str], str]) -> str:
    """Replaces the targets of links to files of the repository, outside of fenced blocks."""
    folder = posixpath.dirname(path)

    def link(found: re.Match[str]) -> str:
        opening, target, rest = found.groups()
        if not target or ":" in target or target.startswith("/"):
            return found[0]
        whole = posixpath.normpath(posixpath.join(folder, target))
        return f"{opening}{replaced(whole)}{rest}"

    parts, end = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [_LINK.sub(link, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, _LINK.sub(link, markdown[end:])])
