"""``sentei_export.json``: what an ONNX export was made from, and the hash of each of its files.

``sentei export onnx`` writes it, and all that run or examine such an export read it. Neither imports the other, so it
stands here.
"""

from typing import Annotated, Literal

from pydantic import Field

from toolchain.documents import Document, Record

EXPORT_FILE = "sentei_export.json"


class FileRecord(Record):
    """One file of the export."""

    bytes: int = Field(ge=0)
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class ExportRecord(Document):
    """All of ``sentei_export.json``; ``files`` by path inside the export."""

    schema_version: Literal[1]
    format: Literal["onnx"]
    precision: str
    device: str
    sentei_version: str
    onnx_ir_version: str
    source_fingerprint: str
    num_hidden_layers: int = Field(ge=1)
    removed_attention: list[int]
    removed_ffn: list[int]
    intermediate_size: list[int]
    files: dict[str, FileRecord]
