"""``comparison.json``: every pruning method at every size on one model."""

from typing import Any, Literal

from toolchain.documents import Document, Record
from toolchain.evaluate.document import Change, MeanScore, TextOverlap
from toolchain.evaluate.metric_record import MetricRecord

COMPARISON_FILE = "comparison.json"
# A file by its name, its bytes, and when it was last changed, in nanoseconds.
FileRecord = list[str | int]


class AskedRecord(Record):
    """What the methods share: how they prune, how their results are evaluated, and the files that were read."""

    pruning: dict[str, Any]
    files: list[FileRecord]
    evaluation: dict[str, Any]
    speed: bool
    evaluation_files: list[FileRecord]


class OriginalRecord(Record):
    """The unpruned model: perplexity by text, and the score by task."""

    num_parameters: int
    perplexity: dict[str, float]
    tasks: dict[str, float]


class SpeedRecord(MetricRecord):
    """The speed of a pruned model against the original's, under this load."""

    workload: dict[str, Any]


class MethodRow(Record):
    """One method at one size.

    ``perplexity_ratio`` by text is pruned over original, ``task_difference`` by task pruned minus original.
    ``pruning_s`` is of the last run where pruning was interrupted. ``speed`` is null where it was not asked for.
    """

    method: str
    target_sparsity: float
    sparsity: float
    num_parameters: int
    num_block_parameters: int
    pruning_s: float
    perplexity: dict[str, float]
    tasks: dict[str, float]
    perplexity_ratio: dict[str, Change]
    task_difference: dict[str, Change]
    text_overlaps: list[TextOverlap]
    mean_score: MeanScore | None
    speed: SpeedRecord | None


class ComparisonDocument(Document):
    """All of ``comparison.json``."""

    schema_version: Literal[1]
    kind: Literal["method_comparison"]
    model: str
    settings: AskedRecord
    original: OriginalRecord
    rows: list[MethodRow]
