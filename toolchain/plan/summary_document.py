"""``pruning_summary.json``: what was removed, and what it cost on the calibration text.

It stands beside the plan, which it sums up: ``sentei prune`` writes it, and reports, which never prune, read it.
"""

from typing import Literal

from toolchain.documents import Document, Record

PRUNING_SUMMARY_FILE = "pruning_summary.json"


class SizeRecord(Record):
    """How large one of the models is."""

    name: str
    num_parameters: int
    num_block_parameters: int
    weight_bytes: int


class CalibrationMetricRecord(Record):
    """The plan's metric, before and after.

    ``source`` is null where it was measured on the calibration text. ``after_stage_1`` is null for methods without
    stages, ``pruned`` where nothing was measured after the model was written.
    """

    name: str
    source: str | None
    original: float
    after_stage_1: float | None
    after_stage_2: float
    pruned: float | None


class CompensationSummary(Record):
    """Whether re-fitted weights were taken, and the perplexities on held-out windows that decided it."""

    held_out_perplexity_before: float | None
    held_out_perplexity_after: float
    taken: bool


class PruningSummary(Document):
    """All of ``pruning_summary.json``. ``compensation`` is null where no weights were fitted again."""

    schema_version: Literal[1]
    kind: Literal["pruning_summary"]
    original: SizeRecord
    pruned: SizeRecord
    sparsity: float
    removed_attention: list[int]
    intermediate_size: list[int]
    calibration_metric: CalibrationMetricRecord
    num_refitted: int
    compensation: CompensationSummary | None
    stopped_because: str | None
    duration_s: float
