"""``plan.json``: what each field of a plan's document means, and how it is checked. No torch here."""

import json
from collections.abc import Mapping
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from toolchain.architecture.layout import LARGEST, MOST_LAYERS
from toolchain.plan.target_record import TargetRecord

SCHEMA_VERSION: Final = 2


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class BaseModelRecord(_Record):
    """The model the plan was made for."""

    name: str
    model_type: str
    num_hidden_layers: int = Field(ge=1, le=MOST_LAYERS)
    intermediate_size: int = Field(ge=1, le=LARGEST)
    num_block_parameters: int = Field(ge=1)
    weights_sha256: str


class TextSourceRecord(_Record):
    """What one text gave to a mixture: ``weight`` is its share of 1, ``sha256`` over its token ids as int64 bytes."""

    source: str
    weight: float
    num_windows: int
    sha256: str


class CalibrationRecord(_Record):
    """The text the plan was made with: ``sha256`` is over the token ids as int64 bytes.

    ``sources`` is empty in plans from before there were mixtures. ``bos`` is the token that each window begins with;
    null if there is none, and in plans from before it was recorded (then only Gemma 3's windows have one).
    ``chat_template`` says whether there are chats among the texts, which go through the model's chat template.
    """

    source: str
    sha256: str
    num_samples: int
    seq_len: int
    sources: list[TextSourceRecord] = []
    bos: int | None = None
    chat_template: bool = False


class PlannedLayer(_Record):
    """What is kept of one layer. An explicit ``kept_neurons`` overrides the ranking by importance."""

    layer: int = Field(ge=0)
    attention: Literal["keep", "remove"]
    intermediate_size: int = Field(ge=0)
    kept_neurons: list[int] | None = None


class Rung(_Record):
    """One step of stage 1: every layer's FFN width, the decoder-block parameters then left, and the metric.

    ``limit_metric`` is what the limit looks at, if that is another metric.
    """

    intermediate_size: list[int]
    num_block_parameters: int
    metric: float
    limit_metric: float | None = None


class Dropped(_Record):
    """A candidate that lost a race before the end: the metric on the tokens read by then, and the leader's on those."""

    num_tokens: int
    metric: float
    best: float


class Removal(_Record):
    """One step of stage 2: the attention removed, the metric after it, and the candidates' metrics by layer.

    ``ties`` has the perplexity, on the first calibration window, of the candidates that shared the best metric: that of
    them with the lowest one was removed. It is null where one candidate alone was the best.
    """

    removed: int
    metric: float
    candidates: dict[int, float]
    dropped: dict[int, Dropped] | None = None
    ties: dict[int, float] | None = None
    num_block_parameters: int
    limit_metric: float | None = None


class BlockStep(_Record):
    """One step of a method that removes whole attentions and FFNs: all that is gone after it, and the metric then.

    ``score`` is what the method itself went by, if that is not the metric, and ``candidates`` that of each candidate.
    ``generation`` is the last one of an evolution that this was the best of.
    """

    attention: list[int]
    ffn: list[int]
    metric: float
    num_block_parameters: int
    score: float | None = None
    generation: int | None = None
    candidates: dict[str, float] | None = None


class RefitRecord(_Record):
    """A projection that was re-fitted: the ridge chosen, and the error on held-out windows before and after.

    Errors are shares of what the projection should have said, in squares.
    """

    layer: int
    projection: str
    ridge: float
    error_before: float
    error_after: float


class CompensationRecord(_Record):
    """Output projections were re-fitted on the calibration text; ``refits`` is empty until it is done.

    ``final_norm_factor`` is what the norm before the head was multiplied by; null in plans from before it was.
    ``held_out_perplexity_*`` is measured on the calibration windows that no projection was fitted to: of the original
    (which earlier versions did not write), and of the pruned model before and after.
    Where it got worse, ``taken`` is false, ``refits`` is empty, and the weights are those from before.
    """

    refits: list[RefitRecord] = []
    final_norm_factor: float | None = None
    perplexity: float | None = None
    held_out_perplexity_original: float | None = None
    held_out_perplexity_before: float | None = None
    held_out_perplexity_after: float | None = None
    taken: bool = True


class HealingRecord(_Record):
    """A training after pruning, by distillation; see :mod:`toolchain.heal.heal`.

    ``text_sha256`` is over the token ids as int64 bytes, ``teacher_sha256`` the fingerprint of the teacher's weights;
    ``sources``, ``bos`` and ``chat_template`` as in the calibration; ``lora_rank`` is null if all weights were trained.
    What follows ``num_held_out`` was measured on windows of the text that were held out; divergences are in nats a
    token.
    """

    teacher: str
    teacher_sha256: str
    text: str
    text_sha256: str
    sources: list[TextSourceRecord] = []
    bos: int | None = None
    chat_template: bool = False
    num_windows: int
    seq_len: int
    steps: int
    batch_size: int
    learning_rate: float
    lora_rank: int | None
    seed: int
    dtype: str
    num_held_out: int
    perplexity_original: float
    perplexity_before: float
    perplexity_after: float
    divergence_before: float
    divergence_after: float


class ProtectedRecord(_Record):
    """Layers whose attention or FFN the person wants left alone."""

    attention: list[int] = []
    ffn: list[int] = []


class LimitRecord(_Record):
    """How much damage is accepted: a metric must not become worse than ``value``; ``source`` as in the plan's metric.

    ``asked`` and ``asked_value`` are what the person said: ``max_degradation``, ``max_metric`` or ``min_metric``.
    ``windows`` are those that perplexity or kl was measured on: they follow the calibration's windows in each text, and
    nothing was scored on them or fitted to them. ``measured`` is the metric of the model that the plan leads to, with
    the plan's compensation; null until it is known. Earlier versions looked at the calibration's first windows, before
    compensation: ``windows`` is empty in their plans.
    """

    metric: str
    source: str | None
    source_sha256: str | None = None
    higher_is_better: bool
    asked: str
    asked_value: float
    original: float
    value: float
    windows: list[TextSourceRecord] = []
    measured: float | None = None


class PlanDocument(_Record):
    """``plan.json``.

    What was asked for comes first (``target_intermediate_size`` and ``target_attention_removals`` follow from it, and
    are empty and 0 until they are known); then what was found. ``metric_source_sha256`` is over the metric's questions.
    ``method`` is its name alone; ``compensation`` says whether the plan compensates. ``allocation``, ``widths`` and
    ``search`` are choices of the two-stage search, and null for methods that remove whole blocks; ``evopress_budget``
    is null for all methods but EvoPress. ``allocation`` says who chose the number of attentions: ``formula``, ``given``
    or ``target``; in plans of earlier versions also ``auto``, by measured damage. ``target`` is null, and not written,
    where a sparsity was asked for; otherwise ``target_sparsity`` follows from it.
    """

    schema_version: Literal[2]
    sentei_version: str
    method: str
    base_model: BaseModelRecord
    target_sparsity: float
    target_intermediate_size: list[int]
    target_attention_removals: int
    target: TargetRecord | None = None
    align: int
    allocation: str | None
    attention_removals: int | None
    widths: str | None
    protected: ProtectedRecord
    search: str | None
    evopress_budget: str | None = None
    metric: str
    metric_source: str | None
    metric_source_sha256: str | None = None
    metric_higher_is_better: bool
    metric_original: float
    limit: LimitRecord | None
    stopped_because: str | None
    dtype: str
    seed: int
    calibration: CalibrationRecord
    compensation: CompensationRecord | None = None
    healing: list[HealingRecord] = []
    versions: dict[str, str]
    layers: list[PlannedLayer]
    stage_1: list[Rung]
    trace: list[Removal]
    block_steps: list[BlockStep] = []

    @property
    def described_method(self) -> str:
        """The method for people, with what was added to it."""
        return f"{self.method}, compensated" if self.compensation and self.compensation.taken else self.method

    @property
    def metric_after_stage_1(self) -> float:
        """The search's metric with the FFNs narrowed and all attentions in place."""
        return self.stage_1[-1].metric if self.stage_1 else self.metric_original

    @property
    def metric_at_end(self) -> float:
        """The search's metric after its last step."""
        if self.block_steps:
            return self.block_steps[-1].metric
        return self.trace[-1].metric if self.trace else self.metric_after_stage_1


def upgraded(content: Mapping[str, Any]) -> dict[str, Any]:
    """What a ``plan.json`` of version 1 holds, as version 2 says it; everything else is returned as it is.

    In version 1, ``method`` also said whether the plan compensates. A method that removes whole blocks had its name in
    ``allocation``, "whole" in ``widths``, and "exact" or the budget of EvoPress in ``search``.
    """
    if content.get("schema_version") != 1 or not isinstance(method := content.get("method"), str):
        return dict(content)
    changes: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "method": method.removesuffix(", compensated")}
    if content.get("widths") == "whole":
        changes |= {"allocation": None, "widths": None, "search": None}
        if method == "evopress":
            changes["evopress_budget"] = content.get("search")
    return {**content, **changes}


def document_to_json(document: PlanDocument) -> str:
    """JSON with one line per layer and one line per step."""
    fields = document.model_dump(mode="json")
    lines = []
    for key, value in fields.items():
        if key in ("block_steps", "target") and not value:
            continue
        if key in ("layers", "stage_1", "trace", "block_steps") and value:
            # What is not set is left out.
            value = [{k: v for k, v in entry.items() if v is not None} for entry in value]
            entries = ",\n".join(f"    {json.dumps(entry)}" for entry in value)
            lines.append(f'  "{key}": [\n{entries}\n  ]')
        else:
            lines.append(f'  "{key}": {json.dumps(value, ensure_ascii=False)}')
    return "{\n" + ",\n".join(lines) + "\n}\n"
