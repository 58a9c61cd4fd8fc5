"""What the stages of a run have computed so far, on disk: a file per stage, replaced as a whole."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from toolchain.checkpoint.directory import DTYPES, TensorInfo
from toolchain.errors import SenteiError, reason_of
from toolchain.json_files import parse_json
from toolchain.outputs import whole_file
from toolchain.safetensors_files import check_header_size

_SAID = "sentei"


@dataclass(frozen=True)
class StageFiles:
    """Files of one run. A process that is killed leaves each of them as it was, or as it was to become.

    Attributes:
        directory: Where they are; made when the first is written.
        belongs_to: Of what they were computed, in a few words or as a digest. What belongs to something else counts as
            not there.
    """

    directory: Path
    belongs_to: str

    def save(self, name: str, tensors: Mapping[str, torch.Tensor], said: Mapping[str, Any] | None = None) -> None:
        """Writes tensors, and JSON beside them, in place of what was there.

        Raises:
            OSError: The disk is full or not writable.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        metadata = {_SAID: json.dumps({"belongs_to": self.belongs_to, "said": dict(said or {})})}
        with whole_file(self._file(name)) as partial:
            try:
                save_file({key: each.cpu().contiguous() for key, each in tensors.items()}, partial, metadata)
            except SafetensorError as error:
                raise OSError(f"{partial}: {reason_of(error)}") from error

    def load(self, name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """What was saved; ``None`` if nothing was, or of something else.

        Raises:
            SenteiError: The file is damaged.
        """
        if (said := self._said(name)) is None:
            return None
        return {key: info.read(key) for key, info in self._infos(name).items()}, said

    def save_tensors(self, name: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, TensorInfo]:
        """Writes tensors, and says where they are now."""
        self.save(name, tensors)
        return self._infos(name)

    def saved_tensors(self, name: str) -> dict[str, TensorInfo]:
        """Where tensors are that were saved before; none if they were not."""
        return {} if self._said(name) is None else self._infos(name)

    def _file(self, name: str) -> Path:
        return self.directory / f"{name}.safetensors"

    def _said(self, name: str) -> dict[str, Any] | None:
        file = self._file(name)
        if not file.exists():
            return None
        check_header_size(file)
        try:
            with safe_open(file, framework="pt") as opened:
                metadata = opened.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise _damaged(file, reason_of(error)) from error
        found = parse_json(metadata.get(_SAID, "{}"), str(file))
        if not isinstance(found, dict) or found.get("belongs_to") != self.belongs_to:
            return None
        said: dict[str, Any] = found["said"]
        return said

    def _infos(self, name: str) -> dict[str, TensorInfo]:
        file = self._file(name)
        try:
            with safe_open(file, framework="pt") as opened:
                headers = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118 (not a mapping)
                return {
                    key: TensorInfo(file, tuple(each.get_shape()), _DTYPES[each.get_dtype()])
                    for key, each in headers.items()
                }
        except (SafetensorError, OSError, KeyError) as error:
            raise _damaged(file, reason_of(error)) from error


_DTYPES: Mapping[str, torch.dtype] = {**DTYPES, "F64": torch.float64, "I64": torch.int64}


def _damaged(file: Path, reason: str) -> SenteiError:
    return SenteiError(f"{file} is damaged ({reason}).", "Delete it: what it holds is computed again.")
