"""``pruning_summary.json``: what was removed, and what it cost on the calibration text.

It stands beside the plan, which it sums up: ``sentei prune`` writes it, and reports, which never prune, read it.
"""

from typing import Literal

from toolchain.documents import Document, Record
from toolchain.plan.target_record import TargetRecord

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
    """Whether re-fitted weights were taken, and the perplexities on held-out windows that decided it.

    Earlier versions did not write the original's.
    """

    held_out_perplexity_original: float | None = None
    held_out_perplexity_before: float | None
    held_out_perplexity_after: float
    taken: bool


class LimitSummary(Record):
    """How much damage was accepted, and how much there is.

    ``measured`` is the metric of the written model, with its compensation if ``compensated``, and ``original`` that of
    the original. Both are measured on ``num_windows`` windows of ``text``, on which nothing was scored and to which
    nothing was fitted; null for a metric that does not read the calibration text, which ``source`` names.
    """

    metric: str
    source: str | None
    higher_is_better: bool
    value: float
    original: float
    measured: float
    compensated: bool
    num_windows: int | None
    text: str | None


class TwoRemovalsSummary(Record):
    """What removing two attentions would cost and gain, where the plan removes none.

    ``layers`` are the two whose attention does least damage. ``metric_*`` is ``metric`` on the search's windows before
    compensation: of the plan, and with the two removed and FFNs so much wider that the sparsity is the same. Bytes are
    in the checkpoint's dtype: ``decode_weight_bytes_*`` are read for each generated token, ``kv_bytes_per_token_*``
    kept for each token of a conversation.
    """

    layers: list[int]
    metric: str
    metric_without_removals: float
    metric_with_removals: float
    decode_weight_bytes_without_removals: int
    decode_weight_bytes_with_removals: int
    kv_bytes_per_token_without_removals: int
    kv_bytes_per_token_with_removals: int


class PruningSummary(Document):
    """All of ``pruning_summary.json``.

    ``compensation`` is null where no weights were fitted again, ``limit`` where there was none, and ``two_removals``
    where attentions were removed, or where the person or the method leaves them alone. Earlier versions had neither of
    those two. ``num_ties`` of the attentions went by perplexity, among those that left the same metric. ``target`` is
    null where a sparsity was asked for, or the shape is no longer the one that was chosen.
    """

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
    limit: LimitSummary | None = None
    num_ties: int = 0
    two_removals: TwoRemovalsSummary | None = None
    target: TargetRecord | None = None
    duration_s: float
