"""``provenance.json``: what a signed export was made from, by which programs, and how it was verified."""

from typing import Annotated, Literal

from pydantic import Field

from toolchain.documents import Document, Record
from toolchain.plan.document import CalibrationRecord

PROVENANCE_FILE = "provenance.json"

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class BaseModelProvenance(Record):
    """The model that was pruned. ``weights_sha256`` is over every tensor's name, dtype, shape and bytes."""

    name: str
    model_type: str
    weights_sha256: str


class PlanProvenance(Record):
    """What was removed: ``sha256`` is that of ``plan.json``, which lies in the same directory.

    ``sentei_version`` and ``versions`` are of the programs that pruned.
    """

    sha256: Sha256
    method: str
    target_sparsity: float
    sentei_version: str
    versions: dict[str, str]


class HealingProvenance(Record):
    """A training after pruning. ``text_sha256`` is over the token ids as int64 bytes."""

    teacher: str
    teacher_sha256: str
    text: str
    text_sha256: str


class VerdictRecord(Record):
    """What ``verification.json`` says, in short: ``sha256`` is that of the file.

    ``engine`` is what ran the export, or ``safetensors`` where its tensors were compared and nothing was run.
    ``not_run`` says what could not be run, and is empty where all could.
    """

    sha256: Sha256
    sentei_version: str
    passed: Literal[True]
    engine: str
    dtype: str | None
    not_run: str


class ProvenanceDocument(Document):
    """All of ``provenance.json``.

    ``created_at`` is UTC, in ISO 8601. ``sentei_version`` and ``versions`` are of the machine that signed.
    ``checkpoint_sha256`` is over every tensor of the checkpoint that was exported. ``base_model``, ``plan`` and
    ``calibration`` are null where there is no plan: then the checkpoint is an unpruned model, and nothing else is known
    of where it came from. ``calibration`` says which text decided what was removed; its ``sha256`` is over the token
    ids as int64 bytes.
    """

    schema_version: Literal[1]
    kind: Literal["provenance"]
    created_at: str
    sentei_version: str
    versions: dict[str, str]
    format: Literal["vllm", "onnx", "nemotron-nas"]
    base_model: BaseModelProvenance | None
    checkpoint_sha256: str
    plan: PlanProvenance | None
    calibration: CalibrationRecord | None
    healing: list[HealingProvenance]
    verification: VerdictRecord
