"""What ``sentei estimate --json`` prints, and the parts of it that ``results.json`` holds too."""

from typing import Annotated, Any, Literal

from pydantic import Field

from toolchain.documents import Document, Number, Record

Side = Literal["original", "pruned"]
Phase = Literal["prefill", "decode"]


class WindowRecord(Record):
    """Layers with a sliding window: ``tokens`` that each holds at most, and bytes of one token in all of them."""

    tokens: Annotated[int, Field(ge=1)]
    kv_bytes_per_token: Annotated[Number, Field(ge=0)]


def kv_bytes(kv_bytes_per_token: float, window: WindowRecord | None, length: int) -> float:
    """Bytes of the KV cache of a conversation of so many tokens.

    Args:
        kv_bytes_per_token: In all layers.
        window: ``None`` where all of them hold all tokens.
        length: Tokens.
    """
    beyond = max(0, length - window.tokens) * window.kv_bytes_per_token if window else 0
    return kv_bytes_per_token * length - beyond


class CauseRecord(Record):
    """Why the gain is not larger: ``text`` is ``message`` with its ``values`` put in."""

    cause: str
    message: str
    values: dict[str, Any]
    text: str


class GapCauseRecord(CauseRecord):
    """A cause of the difference between measured and expected gain.

    ``share`` is of the difference, from 0 to 1; null where one measurement cannot tell.
    """

    share: float | None


class GapRecord(Record):
    """The difference between measured and expected gain, divided among its causes; ``unexplained`` is what is left.

    Shares are of ln(expected / measured).
    """

    metric: str
    expected: float
    measured: float
    low: float
    high: float
    direction: Literal["below", "above"]
    causes: list[GapCauseRecord]
    unexplained: float


class PhaseRecord(Record):
    """The least that one phase takes of one model on this device."""

    flops_per_token: float
    bytes_per_token: float
    flops_per_byte: float
    bound: Literal["compute", "memory"]
    at_least_ms: float


class RooflineRecord(Record):
    """One phase of both models."""

    original: PhaseRecord
    pruned: PhaseRecord
    gain: float
    formula: str


class DevicePeaksRecord(Record):
    """The highest rates reached on this device; see :class:`serving.forecast.device_probe.DevicePeaks`."""

    device: str
    dtype: str
    flops_per_s: float
    bytes_per_s: float


class EstimatedMetric(Record):
    """Each model's best value, and the ratio of them turned so that above 1 is better.

    By costs it is the value to be expected, and ``low`` and ``high`` are the gain's 95 % interval; null otherwise.
    """

    original: float
    pruned: float
    gain: float
    low: float | None = None
    high: float | None = None


class EstimatedLoad(Record):
    """The load: tokens of each prompt, tokens of each answer, and requests at a time."""

    input_len: int
    output_len: int
    concurrency: int


class CostsUsed(Record):
    """The ``costs.json`` that an estimate was made from: its hash, the engine, and the machine that was measured."""

    sha256: str
    engine: str
    machine: dict[str, Any]


class EstimateDocument(Document):
    """What a plan promises on one device. ``limits`` says what will keep the gain down.

    ``costs`` is null, and not there in earlier versions, where the device's peaks alone are known; by costs there is no
    ``roofline``, and ``peaks`` is null.
    """

    schema_version: Literal[1]
    kind: Literal["estimate"]
    roofline: dict[Phase, RooflineRecord]
    metrics: dict[str, EstimatedMetric]
    weight_bytes: dict[Side, Number]
    limits: list[CauseRecord]
    peaks: DevicePeaksRecord | None
    workload: EstimatedLoad
    costs: CostsUsed | None = None
