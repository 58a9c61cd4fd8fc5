"""``verdict.json``: what was measured of each candidate, how the guard rails judge it, and what to do."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from serving.forecast.estimate_document import WindowRecord
from toolchain.documents import Document, Number, Record
from toolchain.errors import SenteiError
from toolchain.metrics.question_metrics import check_distinct, parse_question_metric

VERDICT_FILE = "verdict.json"
Kind = Literal["pruned", "quantised", "pruned and quantised", "sibling"]
Status = Literal["green", "red", "cannot be told"]
Rail = Literal["verified", "perplexity", "accuracy", "group", "least_metric", "most_metric", "gain", "memory"]
Share = Annotated[Number, Field(ge=0, le=1)]
Positive = Annotated[Number, Field(gt=0)]


def _named_metrics(limits: dict[str, float]) -> dict[str, float]:
    try:
        metrics = [parse_question_metric(name) for name in limits]
        check_distinct([each for each in metrics if each is not None])
    except SenteiError as error:
        raise ValueError(" ".join([error.message, error.hint]).strip().rstrip(".")) from error
    if unknown := [name for name, metric in zip(limits, metrics, strict=True) if metric is None]:
        raise ValueError(f"{unknown[0]} is no metric of questions: write it as in accuracy:FILE.jsonl#group=NAME")
    return limits


class Interval(Record):
    """A measured number with its 95 % interval; both ends are null where too little was measured for one."""

    value: float
    low: float | None = None
    high: float | None = None


class GuardRails(Record):
    """What a person accepts. A candidate is deployed only where every one of them is shown to hold.

    Attributes:
        most_perplexity: Times the original's, on each text.
        least_accuracy: Share of one's own questions that are answered correctly.
        groups: The same for a ``subject`` of the questions, by its name.
        metrics: By name, as ``sentei prune --metric`` takes it: the least that is accepted where higher is better, and
            the most where lower is (``refusal_rate`` with ``wanted=answers``).
        least_gain: Times the original's speed. Below 1 makes no sense: nobody prunes to be slower.
        most_memory_gb: In 10**9 bytes; see :attr:`CandidateRecord.memory_bytes`.
    """

    most_perplexity: Annotated[Number, Field(ge=1)]
    least_accuracy: Share | None = None
    groups: dict[str, Share] = Field(default_factory=dict)
    metrics: Annotated[dict[str, Share], AfterValidator(_named_metrics)] = Field(default_factory=dict)
    least_gain: Annotated[Number, Field(ge=1)] = 1
    most_memory_gb: Positive | None = None


class LightRecord(Record):
    """One guard rail and one candidate. ``subject`` is a text's or a group's name; ``measured`` is null if nothing was.

    ``limit`` is in the unit of ``measured``: times the original's, a share, or bytes; null for ``verified``.
    """

    rail: Rail
    subject: str | None
    limit: float | None
    measured: Interval | None
    status: Status


class LoadRecord(Record):
    """Requests per second of one server, and what that is.

    ``goodput`` says that it is the highest rate within the limits; otherwise it is that of the measured concurrency.
    """

    requests_per_s: Interval
    goodput: bool


class CandidateRecord(Record):
    """One candidate: what was measured of it, and what its guard rails say.

    Attributes:
        name: As people call it, such as ``25 %``.
        kind: What was done to the original, if anything.
        sparsity: Fraction of the decoder-block parameters that was to be removed; null where nothing was.
        precision: Of its weights; null for the export's own.
        verified: Whether its export gives its checkpoint's answers; null where there is no export.
        perplexity: Over the original's, by text.
        seen: Share of each text that was read while the candidate was made, where perplexity looks too good.
        accuracy: Share of one's own questions that it answers rightly.
        accuracy_change: That minus the original's, by the same questions.
        groups: As ``accuracy``, for each ``subject`` of the questions.
        metrics: What the guard rails of that name look at.
        gain: In speed, over the original beside which it was measured; above 1 is better.
        load: What one server of it takes.
        original_load: What one server of the original took in the same measurement.
        weight_bytes: Of the weights as exported.
        memory_bytes: The highest memory of the process that ran it alone; of vLLM, which reserves what it is given, its
            weights and the KV cache of the measured load; null where nobody tells.
        kv_bytes_per_token: Of the KV cache.
        window: Of layers that do not hold all tokens; null where there are none.
        kv_cache_tokens: Tokens that the server's KV cache held, from its log; null where it does not say so, and where
            a window makes that depend on how long conversations are.
        not_measured: Why something is missing; empty where nothing is.
        lights: See :mod:`serving.decision.lights`.
        better: Names of candidates that are better in every respect; who is named there leaves no reason to pick this.
    """

    name: str
    kind: Kind
    sparsity: float | None = None
    precision: str | None = None
    verified: bool | None = None
    perplexity: dict[str, Interval] = Field(default_factory=dict)
    seen: dict[str, float] = Field(default_factory=dict)
    accuracy: Interval | None = None
    accuracy_change: Interval | None = None
    groups: dict[str, Interval] = Field(default_factory=dict)
    metrics: dict[str, Interval] = Field(default_factory=dict)
    gain: Interval | None = None
    load: LoadRecord | None = None
    original_load: LoadRecord | None = None
    weight_bytes: int | None = None
    memory_bytes: int | None = None
    kv_bytes_per_token: Number | None = None
    window: WindowRecord | None = None
    kv_cache_tokens: Number | None = None
    not_measured: str = ""
    lights: list[LightRecord] = Field(default_factory=list)
    better: list[str] = Field(default_factory=list)


class OriginalRecord(Record):
    """What was measured of the original alone."""

    accuracy: Interval | None = None
    groups: dict[str, Interval] = Field(default_factory=dict)
    metrics: dict[str, Interval] = Field(default_factory=dict)
    load: LoadRecord | None = None
    weight_bytes: int | None = None
    memory_bytes: int | None = None
    kv_bytes_per_token: Number | None = None
    window: WindowRecord | None = None
    kv_cache_tokens: Number | None = None


class CapacityInputs(Record):
    """What the capacity sheet is computed from, beside what was measured; null leaves out what needs it.

    Attributes:
        price_per_hour: Of one GPU (or machine, where a CPU serves), in ``currency``.
        currency: Any name.
        peak_requests_per_s: The load that has to be served.
        conversation_tokens: Length of a conversation.
        memory_gb: Of one GPU, in 10**9 bytes, as much as the server may use.
    """

    price_per_hour: Positive | None = None
    currency: Annotated[str, Field(min_length=1, max_length=12)] = "USD"
    peak_requests_per_s: Positive | None = None
    conversation_tokens: Annotated[int, Field(ge=1)] | None = None
    memory_gb: Positive | None = None


class CapacityRow(Record):
    """One model in the capacity sheet; see :mod:`serving.decision.capacity` for the formulas.

    ``gpus`` and ``cost`` (per million output tokens at the peak load) have the ends of the rate's interval as theirs.
    They are null where the rate was not searched for within limits.
    """

    name: str
    requests_per_s: Interval | None
    gpus: Interval | None
    cost_per_million_tokens: Interval | None
    conversations: int | None


class ReasonRecord(Record):
    """One sentence of the verdict and the measurement behind it.

    ``message`` with ``values`` put in is the sentence; a report looks ``message`` up in its own language.
    """

    message: str
    values: dict[str, str]
    candidate: str | None = None
    rail: Rail | None = None
    measured: Interval | None = None

    @property
    def text(self) -> str:
        """The sentence in English."""
        return self.message % self.values


class VerdictDocument(Document):
    """All of ``verdict.json``.

    Attributes:
        decision: ``deploy`` the candidate, or ``do not prune``.
        candidate: What to deploy; with ``do not prune`` an alternative that is better than pruning, or null.
        reasons: The verdict in sentences; the first is the whole of it.
        engine: What ran the models while they were measured.
        gain_metric: The metric whose gain decides.
        workload: Tokens in and out, and requests at a time.
        capacity: The original first.
    """

    schema_version: Literal[1]
    kind: Literal["verdict"]
    model: str
    engine: Literal["onnx", "vllm"]
    gain_metric: str
    workload: dict[str, int]
    guard_rails: GuardRails
    decision: Literal["deploy", "do not prune"]
    candidate: str | None
    reasons: list[ReasonRecord] = Field(min_length=1)
    original: OriginalRecord
    candidates: list[CandidateRecord]
    capacity_inputs: CapacityInputs
    capacity: list[CapacityRow]
