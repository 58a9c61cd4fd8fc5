"""Finished parts of a long evaluation on disk, so that it can go on where it was interrupted."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from toolchain.errors import SenteiError, reason_of
from toolchain.json_files import read_json_object
from toolchain.outputs import PARTS, Unfinished, whole_file, write_text
from toolchain.safetensors_files import check_header_size

# Of a task with fifty thousand questions of 2 kB.
MOST_BYTES = 128 * 1024 * 1024
_LOSSES = "losses"
_LONGEST_NAME = 100
_HINT = "Remove that file: it is computed again."


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
            return _read(path)
        result = compute()
        _write(path, identity, result)
        return result

    def get_with_losses(
        self,
        name: str,
        identity: Mapping[str, Any],
        compute: Callable[[], tuple[dict[str, Any], NDArray[np.float32]]],
        shape: tuple[int, int],
    ) -> tuple[dict[str, Any], NDArray[np.float32]]:
        """A part whose result is JSON and losses; these stand in a file of their own, where each takes 4 bytes.

        Args:
            name: See :meth:`get`.
            identity: Likewise.
            compute: Makes the result, as JSON, and the losses.
            shape: Of the losses.

        Returns:
            The result, and the losses, float32 ``[num_windows, seq_len - 1]``.

        Raises:
            SenteiError: The part on disk is damaged.
        """
        path = self._path(name, identity)
        if path is None:
            return compute()
        if path.is_file() and losses_file(path).is_file():
            return _read(path), read_losses(path, shape)
        result, losses = compute()
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(losses_file(path)) as partial:
            partial.write_bytes(save({_LOSSES: losses}))
        _write(path, identity, result)
        return result, losses

    def _path(self, name: str, identity: Mapping[str, Any]) -> Path | None:
        if self._directory is None:
            return None
        said = re.sub(r"[^A-Za-z0-9.-]+", "_", name)[:_LONGEST_NAME]
        return self._directory / f"{said}-{digest_of(identity)}.json"


def losses_file(part: Path) -> Path:
    """Where the losses of a part lie: beside it."""
    return part.with_suffix(".safetensors")


def read_losses(part: Path, shape: tuple[int, int]) -> NDArray[np.float32]:
    """The losses of a part, float32.

    Raises:
        SenteiError: They are missing or damaged, or of another shape.
    """
    path = losses_file(part)
    check_header_size(path)
    try:
        with safe_open(path, framework="np") as file:
            stored = file.get_slice(_LOSSES)
            if stored.get_dtype() != "F32" or tuple(stored.get_shape()) != shape:
                raise SenteiError(f"{path} must hold float32 {list(shape)}.", _HINT)
            losses: NDArray[np.float32] = file.get_tensor(_LOSSES)
    except (SafetensorError, OSError) as error:
        raise SenteiError(f"{path} is damaged ({reason_of(error)}).", _HINT) from error
    if not np.isfinite(losses).all():
        raise SenteiError(f"{path} holds NaN or Inf.", _HINT)
    return losses


def _read(path: Path) -> dict[str, Any]:
    result = read_json_object(path, hint=_HINT, max_bytes=MOST_BYTES).get("result")
    if not isinstance(result, dict):
        raise SenteiError(f"{path} does not have the fields it should (result).", _HINT)
    return result


def _write(path: Path, identity: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    text = json.dumps({"identity": identity, "result": result}, ensure_ascii=False) + "\n"
    # What is too large to be read again is computed again.
    if len(text.encode()) <= MOST_BYTES:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
