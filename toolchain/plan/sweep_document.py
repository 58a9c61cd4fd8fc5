"""``sweep.json``: the plans of one model for several sparsities."""

from typing import Literal

from toolchain.documents import Document, Record
from toolchain.plan.document import BaseModelRecord

SWEEP_FILE = "sweep.json"


class SweptPlan(Record):
    """One plan. ``directory`` lies beside ``sweep.json``; ``metric`` is the plan's at its last step."""

    directory: str
    target_sparsity: float
    sparsity: float
    num_block_parameters: int
    metric: float
    num_attention_removals: int
    stopped_because: str | None


class SweepDocument(Document):
    """All of ``sweep.json``."""

    schema_version: Literal[1]
    kind: Literal["sweep"]
    base_model: BaseModelRecord
    metric: str
    metric_original: float
    plans: list[SweptPlan]
