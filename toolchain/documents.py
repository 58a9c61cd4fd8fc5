"""The files that sentei writes as JSON are pydantic models; this is what the models have in common.

A model stands beside the code that writes its file. ``docs/write_schemas.py`` writes their JSON Schemas.
"""

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from toolchain.errors import SenteiError
from toolchain.json_files import read_json_object

# A whole number stays one, so that a file that is read and written again has the same bytes.
Number = int | float
_WRITTEN_OTHERWISE = "Was it edited, or written by another version?"
_LONGEST_NAME = 100


class Record(BaseModel):
    """A part of a file. Unknown keys are refused: a typing error must not be read as something that is missing."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Document(Record):
    """A whole file. Fields are written in their order."""

    def content(self) -> dict[str, Any]:
        """What the file holds; a field that was never set is left out."""
        return self.model_dump(exclude_unset=True)

    def to_json(self, *, indent: int | None = 2, ensure_ascii: bool = True) -> str:
        """The file's text."""
        return json.dumps(self.content(), indent=indent, ensure_ascii=ensure_ascii) + "\n"


AnyDocument = TypeVar("AnyDocument", bound=BaseModel)


def read_document(path: Path, model: type[AnyDocument], *, hint: str = _WRITTEN_OTHERWISE) -> AnyDocument:
    """Reads a file and checks it against its model.

    Args:
        path: The file.
        model: What it should hold.
        hint: What to do where it cannot be read.

    Raises:
        SenteiError: It cannot be read, or a field is missing, unknown or of the wrong kind; names the field.
    """
    return check_document(read_json_object(path, hint=hint), str(path), model, hint=hint)


def check_document(
    content: object, where: str, model: type[AnyDocument], *, hint: str = _WRITTEN_OTHERWISE
) -> AnyDocument:
    """Checks what was read against its model; see :func:`read_document`.

    Args:
        content: What the file holds.
        where: Names the file in the error.
        model: What it should hold.
        hint: What to do where it does not.

    Raises:
        SenteiError: A field is missing, unknown or of the wrong kind.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(ascii(part)[1:-1] if isinstance(part, str) else str(part) for part in first["loc"])
        if len(field) > _LONGEST_NAME:
            field = f"{field[:_LONGEST_NAME]}..."
        raise SenteiError(f"{where} does not have the fields it should ({field}: {first['msg']}).", hint) from error
