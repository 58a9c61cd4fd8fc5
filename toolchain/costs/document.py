"""``costs.json``: what each part of a model of one shape costs under one load, on one machine and engine."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from toolchain.architecture.layout import LARGEST, MOST_LAYERS, LayerLayout
from toolchain.costs.parts import PartCosts
from toolchain.documents import Document, Number, Record, check_document
from toolchain.errors import SenteiError
from toolchain.json_files import parse_json, read_bytes
from toolchain.significance import t_margin

# Milliseconds, each with the load's requests in flight. Sums over the parts of a model, as bytes are.
TIMES = ("ttft_ms", "tpot_ms", "ms_per_output_token")
BYTES = ("weight_bytes", "kv_bytes_per_token")
# Far above what any part takes, in milliseconds or bytes, and far below what a whole model does.
_MOST, _LEAST = 1e15, 1e-9
Cost = Annotated[float, Field(ge=0, le=_MOST)]
Covariance = Annotated[float, Field(ge=-(_MOST**2), le=_MOST**2)]
_MOST_WIDTHS = 64
# Of a gain's interval; beyond it there is no number.
_LARGEST_EXPONENT = 300.0
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
    attention: list[bool]
    intermediate_size: list[int]
    measured: dict[str, list[Number]]

    @property
    def layout(self) -> tuple[LayerLayout, ...]:
        """Its layers."""
        pairs = zip(self.attention, self.intermediate_size, strict=True)
        return tuple(LayerLayout(attention=attention, intermediate_size=width) for attention, width in pairs)


class ErrorRecord(Record):
    """How far costs can be trusted: the covariance of outside, attention and each width's FFN, in their unit squared.

    It is estimated from what the measurements differ from the fit, with so many degrees of freedom; see
    :func:`toolchain.costs.parts.fit_parts`.
    """

    covariance: list[list[Covariance]] = Field(max_length=_MOST_WIDTHS + 2)
    degrees_of_freedom: int = Field(ge=1)


class PartsRecord(Record):
    """What each part costs; see :class:`toolchain.costs.parts.PartCosts`. ``error`` is null for what is counted."""

    outside: Cost
    attention: Cost
    widths: list[int] = Field(min_length=2, max_length=_MOST_WIDTHS)
    ffn: list[Cost]
    error: ErrorRecord | None

    @property
    def parts(self) -> PartCosts:
        """For computing."""
        return PartCosts(outside=self.outside, attention=self.attention, widths=tuple(self.widths), ffn=tuple(self.ffn))

    def margin(self, counts: Sequence[float]) -> float | None:
        """Half the width of the 95 % interval of a sum of costs; ``None`` for what is counted.

        Args:
            counts: How often each cost is in the sum, ordered as the covariance is.
        """
        if self.error is None:
            return None
        weights = np.asarray(counts, np.float64)
        variance = float(weights @ np.asarray(self.error.covariance, np.float64) @ weights)
        return t_margin(math.sqrt(max(variance, 0.0)), self.error.degrees_of_freedom)


class IntervalRecord(Record):
    """A value with its 95 % interval; null where there is none."""

    value: float
    low: float | None
    high: float | None


class CheckRecord(Record):
    """A model as costs predict it that were fitted to the others alone; the error is a share of what was measured."""

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
    repeats: int = Field(ge=1)
    costs: dict[str, PartsRecord]
    check: list[CheckRecord]
    models: list[MeasuredModel]

    def predicted(self, quantity: str, layout: Sequence[LayerLayout]) -> IntervalRecord:
        """What a model costs."""
        record = self.costs[quantity]
        parts = record.parts
        value, margin = parts.of(layout), record.margin(parts.counts(layout).tolist())
        if margin is None:
            return IntervalRecord(value=value, low=None, high=None)
        return IntervalRecord(value=value, low=max(0.0, value - margin), high=value + margin)

    def predicted_gain(self, quantity: str, layout: Sequence[LayerLayout]) -> IntervalRecord:
        """How many times less it costs than the unpruned model; an error that both share makes no difference."""
        record = self.costs[quantity]
        parts, whole = record.parts, self.whole
        before, after = parts.of(whole), parts.of(layout)
        # Of the logarithm, to first order.
        margin = record.margin((parts.counts(whole) / before - parts.counts(layout) / after).tolist())
        if margin is None:
            return IntervalRecord(value=before / after, low=None, high=None)
        factor = math.exp(min(margin, _LARGEST_EXPONENT))
        return IntervalRecord(value=before / after, low=before / after / factor, high=before / after * factor)

    def check_model(self, directory: Path, config: Mapping[str, Any]) -> None:
        """Refuses costs of another model than the one in a directory.

        Raises:
            SenteiError: They are.
        """
        if self.model.config_sha256 != config_sha256(config):
            raise SenteiError(
                f"These costs are of {self.model.name}, whose config is not that of {directory}.",
                "Write costs for this model with sentei profile.",
            )

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
        if quantity in TIMES and parts.outside + parts.ffn[0] < _LEAST:
            raise SenteiError(f"{where}: a model without attentions would cost nothing.", _AGAIN)
    return Costs(document=document, file=path, sha256=hashlib.sha256(content).hexdigest())


def _check_parts(where: str, parts: PartsRecord, full: int) -> None:
    if len(parts.ffn) != len(parts.widths):
        raise SenteiError(f"{where} do not have a number for each width.", _AGAIN)
    if parts.error and {len(parts.error.covariance), *map(len, parts.error.covariance)} != {2 + len(parts.widths)}:
        raise SenteiError(f"{where}: their covariance has not as many rows and columns as there are costs.", _AGAIN)
    if parts.widths[0] < 1 or parts.widths[-1] != full or sorted(set(parts.widths)) != parts.widths:
        raise SenteiError(f"{where}: widths must ascend from 1 or more to {full}.", _AGAIN)
    if any(wide < narrow for narrow, wide in pairwise(parts.ffn)):
        raise SenteiError(f"{where} fall as an FFN gets wider.", _AGAIN)
