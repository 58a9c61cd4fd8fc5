"""The capacity sheet: what a load takes in GPUs and money, for the original and each candidate.

- ``requests_per_s``: of one server, as measured; see :class:`serving.decision.document.LoadRecord`. That of a candidate
  is the original's times the candidate's gain, so that all rows rest on one measurement of the original and a candidate
  differs from it by no more than was shown.
- ``gpus``: the peak load divided by that, rounded up, if that is the highest rate within limits. Without limits it is
  the rate at the concurrency that was measured. A server may take many times that, so there are no GPUs and no cost.
- ``cost_per_million_tokens``: gpus x price per hour / (peak requests per second x 3600 x output tokens per request)
  x 1,000,000: what a million output tokens cost while the peak load is served, with whole GPUs.
- ``conversations``: KV-cache tokens / tokens of a conversation, rounded down. KV-cache tokens are the server's own
  where its log says them, otherwise (memory - weights) / KV bytes per token: the most that can be, since the engine
  itself takes memory too. Layers with a sliding window hold no more than it of each conversation.
"""

import csv
import io
import math
from collections.abc import Callable, Sequence

from serving.decision.document import CandidateRecord, CapacityInputs, CapacityRow, Interval, OriginalRecord
from serving.decision.lights import GB
from serving.forecast.estimate_document import kv_bytes

_INTERVALS = ("requests per second and GPU", "GPUs at the peak load", "cost per million output tokens")
COLUMNS = (
    "model", *(f"{name}{end}" for name in _INTERVALS for end in ("", ", low", ", high")), "conversations that fit",
)  # fmt: skip
_ORIGINAL = "original"


def capacity_rows(
    original: OriginalRecord, candidates: Sequence[CandidateRecord], inputs: CapacityInputs, *, output_len: int
) -> list[CapacityRow]:
    """The original's row, and one for each candidate whose speed was measured.

    Args:
        original: What was measured of it.
        candidates: Likewise.
        inputs: Prices, load and memory.
        output_len: Tokens of an answer.
    """
    load = original.load
    rate = None if load is None else load.requests_per_s
    asked = inputs if load and load.goodput else inputs.model_copy(update={"peak_requests_per_s": None})
    rows = [_row(_ORIGINAL, original, rate, asked, output_len)]
    for each in candidates:
        if each.gain is not None and rate is not None:
            rows.append(_row(each.name, each, _times(rate.value, each.gain), asked, output_len))
    return rows


def gpus_saved(rows: Sequence[CapacityRow], name: str) -> tuple[Interval, int] | None:
    """How many GPUs a candidate saves at the peak load, with the gain's interval, and of how many."""
    found = {row.name: row.gpus for row in rows}
    original, gpus = found.get(_ORIGINAL), found.get(name)
    if original is None or gpus is None or gpus.low is None or gpus.high is None:
        return None
    before = round(original.value)
    return Interval(value=before - gpus.value, low=before - gpus.high, high=before - gpus.low), before


def as_csv(rows: Sequence[CapacityRow], inputs: CapacityInputs, measured_as: str) -> str:
    """The sheet for a spreadsheet: the rows, then the inputs by name.

    Args:
        rows: See :func:`capacity_rows`.
        inputs: As given.
        measured_as: How the requests per second were measured.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        numbers = [*_ends(row.requests_per_s), *_ends(row.gpus), *_ends(row.cost_per_million_tokens)]
        writer.writerow([_cell(row.name), *numbers, "" if row.conversations is None else row.conversations])
    writer.writerows([[], ["input", "value"]])
    writer.writerows([name, "" if value is None else _cell(value)] for name, value in inputs.model_dump().items())
    writer.writerow(["requests per second measured as", measured_as])
    return out.getvalue()


def _cell(value: object) -> object:
    """A text that no spreadsheet takes for a formula."""
    return f"'{value}" if isinstance(value, str) and value[:1] in "=+-@\t\r" else value


def _ends(interval: Interval | None) -> list[float | str]:
    if interval is None:
        return ["", "", ""]
    return ["" if each is None else each for each in (interval.value, interval.low, interval.high)]


def _row(
    name: str, model: OriginalRecord | CandidateRecord, rate: Interval | None, inputs: CapacityInputs, output_len: int
) -> CapacityRow:
    peak, price = inputs.peak_requests_per_s, inputs.price_per_hour
    gpus = cost = None
    if rate is not None and rate.value > 0 and peak is not None:
        # A slower server needs more of them: the ends change places.
        gpus = _map(rate, lambda each: float(math.ceil(round(peak / each, 9))), turned=True)
        if price is not None:
            cost = _map(gpus, lambda each: each * price / (peak * 3600 * output_len) * 1e6)
    return CapacityRow(
        name=name, requests_per_s=rate, gpus=gpus, cost_per_million_tokens=cost,
        conversations=_conversations(model, inputs),
    )  # fmt: skip


def _conversations(model: OriginalRecord | CandidateRecord, inputs: CapacityInputs) -> int | None:
    length, per_token = inputs.conversation_tokens, model.kv_bytes_per_token
    if length is None:
        return None
    if model.kv_cache_tokens is not None:
        return int(model.kv_cache_tokens // length)
    if inputs.memory_gb is None or not per_token or model.weight_bytes is None:
        return None
    return max(0, int((inputs.memory_gb * GB - model.weight_bytes) // kv_bytes(per_token, model.window, length)))


def _times(rate: float, gain: Interval) -> Interval:
    return _map(gain, lambda each: rate * each)


def _map(interval: Interval, formula: Callable[[float], float], *, turned: bool = False) -> Interval:
    """An interval of something else; an end that is 0 or unknown has none."""
    ends = [formula(each) if each else None for each in (interval.low, interval.high)]
    low, high = reversed(ends) if turned else ends
    return Interval(value=formula(interval.value), low=low, high=high)
