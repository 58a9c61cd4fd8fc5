"""``costs.json``: what each part of a model of one shape costs under one load, on one machine and engine."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal

from pydantic import Field

from toolchain.architecture.layout import LARGEST, MOST_LAYERS, LayerLayout
from toolchain.costs.parts import PartCosts
from toolchain.documents import Document, Number, Record, check_document
from toolchain.errors import SenteiError
from toolchain.json_files import parse_json, read_bytes
from toolchain.significance import compare_means

# Milliseconds, each with the load's requests in flight. Sums over the parts of a model, as bytes are.
TIMES = ("ttft_ms", "tpot_ms", "ms_per_output_token")
BYTES = ("weight_bytes", "kv_bytes_per_token")
# Far above what any part takes, in milliseconds or bytes, and far below what a whole model does.
_MOST, _LEAST = 1e15, 1e-9
Cost = Annotated[float, Field(ge=0, le=_MOST)]
_AGAIN = "Write it again with sentei profile."


class ShapedModel(Record):
    """The model whose shape was measured. ``config_sha256`` is over its config as JSON with sorted keys."""

    name: str
    model_type: str
    config_sha256: str
    num_hidden_layers: int = Field(ge=1, le=MOST_LAYERS)
    intermediate_size: int = Field(ge=1, le=LARGEST)


class Served(Record):
    """How models were run: costs hold for this alone.

    ``precision`` is an ONNX export's and null for checkpoints; a checkpoint's ``dtype`` is null where it is its own.
    ``machine`` and ``versions`` are as in ``results.json``.
    """

    engine: str
    precision: Literal["fp32", "fp16", "bf16", "int8", "int4"] | None
    dtype: Literal["float32", "bfloat16", "float16"] | None
    device: Literal["auto", "cpu", "cuda"]
    engine_options: list[str]
    machine: dict[str, Any]
    versions: dict[str, str]


class Load(Record):
    """What every measured model was asked: as :class:`serving.benchmark.workload.Workload` has it."""

    input_len: int = Field(ge=1)
    output_len: int = Field(ge=1)
    concurrency: int = Field(ge=1)
    num_prompts: int = Field(ge=1)

    @property
    def in_words(self) -> str:
        """For people."""
        return f"{self.input_len} tokens in, {self.output_len} out, {self.concurrency} at a time"


class MeasuredModel(Record):
    """A model of random weights: each layer's shape, and what it cost, one number a repeat; bytes have one."""

    name: str
    role: Literal["fitted", "held_out"]
    attention: list[bool]
    intermediate_size: list[int]
    measured: dict[str, list[Number]]

    @property
    def layout(self) -> tuple[LayerLayout, ...]:
        """Its layers."""
        pairs = zip(self.attention, self.intermediate_size, strict=True)
        return tuple(LayerLayout(attention=attention, intermediate_size=width) for attention, width in pairs)


class PartsRecord(Record):
    """What each part costs, one number a repeat; see :class:`toolchain.costs.parts.PartCosts`.

    ``ffn`` has a list a width. Each repeat is fitted alone, so that what drifts from one to the next shows as spread
    and not as cost.
    """

    outside: list[Cost] = Field(min_length=1)
    attention: list[Cost]
    widths: list[int] = Field(min_length=2)
    ffn: list[list[Cost]]

    @property
    def repeats(self) -> list[PartCosts]:
        """The costs as each repeat has them."""
        return [
            PartCosts(
                outside=self.outside[repeat],
                attention=self.attention[repeat],
                widths=tuple(self.widths),
                ffn=tuple(each[repeat] for each in self.ffn),
            )
            for repeat in range(len(self.outside))
        ]

    @property
    def mean(self) -> PartCosts:
        """The mean over repeats."""
        return PartCosts(
            outside=fmean(self.outside),
            attention=fmean(self.attention),
            widths=tuple(self.widths),
            ffn=tuple(fmean(each) for each in self.ffn),
        )


class IntervalRecord(Record):
    """A value with its 95 % interval; null where one repeat gives none."""

    value: float
    low: float | None
    high: float | None


class CheckRecord(Record):
    """A model that no cost was fitted to: predicted and measured, and the error as a share of what was measured."""

    model: str
    quantity: str
    predicted: float
    measured: float
    error: float


class CostsDocument(Document):
    """All of ``costs.json``.

    ``costs`` is by quantity: those of :data:`TIMES` that the load defines, and :data:`BYTES`.
    """

    schema_version: Literal[1]
    kind: Literal["costs"]
    sentei_version: str
    model: ShapedModel
    served: Served
    load: Load
    costs: dict[str, PartsRecord]
    check: list[CheckRecord]
    models: list[MeasuredModel]

    def predicted(self, quantity: str, layout: Sequence[LayerLayout]) -> IntervalRecord:
        """What a model costs, with the interval that the repeats give."""
        return interval_of([parts.of(layout) for parts in self.costs[quantity].repeats])

    def predicted_gain(self, quantity: str, layout: Sequence[LayerLayout]) -> IntervalRecord:
        """How many times less it costs than the unpruned model; what is the same in both drifts alike."""
        whole = self.whole
        return interval_of([parts.of(whole) / parts.of(layout) for parts in self.costs[quantity].repeats])

    @property
    def whole(self) -> tuple[LayerLayout, ...]:
        """The unpruned model's layers."""
        layer = LayerLayout(attention=True, intermediate_size=self.model.intermediate_size)
        return (layer,) * self.model.num_hidden_layers


@dataclass(frozen=True, kw_only=True)
class Costs:
    """A ``costs.json`` that was read, and the SHA-256 of its bytes."""

    document: CostsDocument
    file: Path
    sha256: str


def interval_of(values: Sequence[float]) -> IntervalRecord:
    """The mean with its t-interval."""
    found = compare_means(values)
    return IntervalRecord(value=found.value, low=found.low, high=found.high)


def config_sha256(config: Mapping[str, Any]) -> str:
    """Tells shapes apart: two models of the same config cost the same."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def read_costs(path: Path) -> Costs:
    """Reads ``costs.json`` and checks that its numbers are those of one model.

    Raises:
        SenteiError: It cannot be read, or its fields do not go together.
    """
    content = read_bytes(path, hint=_AGAIN)
    document = check_document(parse_json(content, str(path), hint=_AGAIN), str(path), CostsDocument, hint=_AGAIN)
    if missing := [each for each in ("ttft_ms", "ms_per_output_token", *BYTES) if each not in document.costs]:
        raise SenteiError(f"{path} has no costs of {missing[0]}.", _AGAIN)
    for quantity, parts in document.costs.items():
        where = f"{path}: costs of {quantity}"
        _check_parts(where, parts, document.model.intermediate_size)
        if quantity in TIMES and min(each.outside + each.ffn[0] for each in parts.repeats) < _LEAST:
            raise SenteiError(f"{where}: a model without attentions would cost nothing.", _AGAIN)
    return Costs(document=document, file=path, sha256=hashlib.sha256(content).hexdigest())


def _check_parts(where: str, parts: PartsRecord, full: int) -> None:
    lists = [parts.outside, parts.attention, *parts.ffn]
    if len(parts.ffn) != len(parts.widths) or any(len(each) != len(parts.outside) for each in lists):
        raise SenteiError(f"{where} do not have a number for each width and repeat.", _AGAIN)
    if parts.widths[0] < 1 or parts.widths[-1] != full or sorted(set(parts.widths)) != parts.widths:
        raise SenteiError(f"{where}: widths must ascend from 1 or more to {full}.", _AGAIN)
    if any(wide < narrow for pair in pairwise(parts.ffn) for narrow, wide in zip(*pair, strict=True)):
        raise SenteiError(f"{where} fall as an FFN gets wider.", _AGAIN)
