"""Finished parts of a long evaluation on disk, so that it can go on where it was interrupted."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from toolchain.errors import SenteiError
from toolchain.json_files import read_json_object
from toolchain.outputs import PARTS, Unfinished, write_text

# Of a task with fifty thousand questions of 2 kB.
MOST_BYTES = 128 * 1024 * 1024


@contextmanager
def unfinished_parts(out: Path, *, force: bool, resume: bool) -> Iterator[Path]:
    """Yields ``<out>.parts``. It is deleted when the context ends well, and stays for ``--resume`` when it does not.

    Args:
        out: What is to be written.
        force: Forget an interrupted run.
        resume: Go on with one, whatever ``force`` is.

    Raises:
        SenteiError: An interrupted run is there, and neither was asked for.
    """
    work = Unfinished(out, PARTS, force=force, resume=resume)
    with work.working():
        work.worth_keeping = True  # every part, from the first on
        yield work.directory


def digest_of(identity: Mapping[str, Any]) -> str:
    """Tells apart what was made from different things, in names of files."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


class Parts:
    """One JSON file a finished part; its name holds a hash of all that the part depends on.

    So a part is only ever taken up again by the same question to the same model, and an evaluation that is asked for
    more (another task, a higher limit) computes only what is new.
    """

    def __init__(self, directory: Path | None) -> None:
        """``None`` keeps nothing; a directory is created with the first part."""
        self._directory = directory

    def known(self, name: str, identity: Mapping[str, Any]) -> bool:
        """Whether a part is there already."""
        path = self._path(name, identity)
        return path is not None and path.is_file()

    def get(self, name: str, identity: Mapping[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A part's result: from disk, or computed and kept.

        Args:
            name: For people; part of the file's name.
            identity: All that the result depends on, as JSON.
            compute: Makes the result, as JSON.

        Raises:
            SenteiError: The part on disk is damaged.
        """
        path = self._path(name, identity)
        if path is None:
            return compute()
        if path.is_file():
            hint = "Remove that file: it is computed again."
            result = read_json_object(path, hint=hint, max_bytes=MOST_BYTES).get("result")
            if not isinstance(result, dict):
                raise SenteiError(f"{path} does not have the fields it should (result).", hint)
            return result
        result = compute()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({"identity": identity, "result": result}, ensure_ascii=False) + "\n")
        return result

    def _path(self, name: str, identity: Mapping[str, Any]) -> Path | None:
        if self._directory is None:
            return None
        return self._directory / f"{re.sub(r'[^A-Za-z0-9.-]+', '_', name)}-{digest_of(identity)}.json"
