"""What a plan promises on this device, before anything is pruned: from shapes and a probe alone."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from serving.forecast.device_probe import DevicePeaks
from serving.forecast.estimate_document import EstimateDocument
from serving.forecast.explain import TILE, Told, limits_of_plan, told
from serving.forecast.model_facts import ModelFacts, facts_of
from serving.forecast.roofline import roofline
from toolchain.architecture.layout import LayerLayout
from toolchain.checkpoint.directory import Checkpoint, opened
from toolchain.costs.document import Costs, CostsDocument
from toolchain.errors import SenteiError

_SIDES = ("original", "pruned")
_PHASE_METRICS = ("mean_ttft_ms", "mean_tpot_ms", "mean_e2el_ms", "output_throughput")
_COSTED = {"mean_ttft_ms": "ttft_ms", "mean_tpot_ms": "tpot_ms", "output_throughput": "ms_per_output_token"}
# Llama-3-8B's shape in vLLM on an H200, one request at a time: a token, and the bytes that it reads at the peak.
_H200_TPOT_MS, _H200_BYTES_MS = 4.76, 3.1
OVERHEAD = (
    "Left out: launches, scheduling, sampling, the server, kernels below the peak. vLLM on an H200 took 4.76 ms per "
    "token of Llama-3-8B's shape, of which reading the weights takes 3.1, and gained 1.17x where these formulas say "
    "1.30x. If as large a share stays here, the gain per token is %(gain)sx. sentei profile measures what it is, and "
    "--costs takes it."
)


def estimate(
    model: Path | Checkpoint,
    layout: Sequence[LayerLayout],
    peaks: DevicePeaks,
    *,
    dtype: str | None,
    input_len: int,
    output_len: int,
    concurrency: int,
) -> EstimateDocument:
    """Roofline times of the model as it is and as planned.

    Args:
        model: The unpruned checkpoint: its directory, or opened already; only its headers are read.
        layout: The plan's.
        peaks: Of this device.
        dtype: Computed in; by default the checkpoint's own.
        input_len: Prompt tokens.
        output_len: Output tokens.
        concurrency: Sequences at a time.

    Returns:
        Its ``metrics`` are each model's least TTFT, TPOT, E2EL and highest output throughput, and the gain.

    Raises:
        SenteiError: Not a good checkpoint, one that the plan is not for, or a length below 1.
    """
    if min(input_len, output_len, concurrency) < 1:
        raise SenteiError("Lengths and concurrency must be at least 1.")
    facts = _facts(opened(model), layout, dtype, input_len + output_len)
    load = {"input_len": input_len, "output_len": output_len, "concurrency": concurrency}
    expected = roofline(facts, peaks, **load)
    content = {
        **_common(facts, layout, load),
        "roofline": expected,
        "metrics": _metrics(expected, output_len, concurrency),
        "peaks": asdict(peaks),
    }
    content["limits"] += told({"overhead": _overhead(expected["decode"]["gain"])})
    return EstimateDocument.model_validate(content)


def estimate_by_costs(model: Path | Checkpoint, layout: Sequence[LayerLayout], costs: Costs) -> EstimateDocument:
    """Times of the model as it is and as planned, by what its parts were measured to cost, under the load of the costs.

    Raises:
        SenteiError: Not a good checkpoint, one that plan or costs are not for, or a plan beyond what was measured.
    """
    checkpoint, document = opened(model), costs.document
    document.check_model(checkpoint.directory, checkpoint.config)
    served, asked = document.served, document.load
    facts = _facts(checkpoint, layout, served.dtype, asked.input_len + asked.output_len)
    narrowest, least = min(layer.intermediate_size for layer in layout), document.costs["ttft_ms"].widths[0]
    if narrowest < least:
        raise SenteiError(
            f"The plan has an FFN of {narrowest} neurons; costs are known from {least} on.", "Leave --costs out."
        )
    load = {"input_len": asked.input_len, "output_len": asked.output_len, "concurrency": asked.concurrency}
    content = {
        **_common(facts, layout, load),
        "roofline": {},
        "metrics": {
            name: _by_costs(name, quantity, document, layout)
            for name, quantity in _COSTED.items()
            if quantity in document.costs
        },
        "peaks": None,
        "costs": {"sha256": costs.sha256, "engine": served.engine, "machine": served.machine},
    }
    return EstimateDocument.model_validate(content)


def _by_costs(
    name: str, quantity: str, document: CostsDocument, layout: Sequence[LayerLayout]
) -> dict[str, float | None]:
    gain = document.predicted_gain(quantity, layout)
    before, after = (document.predicted(quantity, each).value for each in (document.whole, layout))
    if name == "output_throughput":
        before, after = 1000 / before, 1000 / after
    return {"original": before, "pruned": after, "gain": gain.value, "low": gain.low, "high": gain.high}


def _overhead(gain: float) -> Told:
    """What the roofline leaves out, as large as it was where it was measured (docs/gpu.md)."""
    rest = 1 - _H200_BYTES_MS / _H200_TPOT_MS
    return OVERHEAD, {"gain": f"{1 / ((1 - rest) / gain + rest):.2f}"}


def _facts(
    checkpoint: Checkpoint, layout: Sequence[LayerLayout], dtype: str | None, num_tokens: int
) -> dict[str, ModelFacts]:
    """The facts of both models.

    Raises:
        SenteiError: The plan is not for this model, or the load does not fit its context.
    """
    _check_plan_is_for(checkpoint, layout)
    planned = planned_checkpoint(checkpoint, layout)
    facts = {
        "original": facts_of(checkpoint, dtype, size_on_disk_bytes=checkpoint.weight_bytes),
        "pruned": facts_of(planned, dtype, size_on_disk_bytes=planned.weight_bytes),
    }
    if num_tokens > (most := facts["original"].max_len):
        raise SenteiError(
            f"{num_tokens} tokens, input and output, do not fit {checkpoint.directory}, which takes {most}."
        )
    return facts


def _common(facts: Mapping[str, ModelFacts], layout: Sequence[LayerLayout], load: Mapping[str, int]) -> dict[str, Any]:
    """What does not depend on where the times come from."""
    context = load["input_len"] + load["output_len"] // 2
    return {
        "schema_version": 1,
        "kind": "estimate",
        "weight_bytes": {side: each.weight_bytes for side, each in facts.items()},
        "limits": limits_of_plan(facts["pruned"], layout=layout, context=context, concurrency=load["concurrency"]),
        "workload": dict(load),
    }


def _check_plan_is_for(checkpoint: Checkpoint, layout: Sequence[LayerLayout]) -> None:
    model = checkpoint.directory
    if len(layout) != len(checkpoint.layout):
        raise SenteiError(f"The plan has {len(layout)} layers, and {model} has {len(checkpoint.layout)}.")
    for number, (planned_layer, layer) in enumerate(zip(layout, checkpoint.layout, strict=True)):
        if planned_layer.intermediate_size > layer.intermediate_size or planned_layer.attention > layer.attention:
            raise SenteiError(f"The plan keeps more of layer {number} than {model} has.", "Give the plan's original.")
    if tuple(layout) == tuple(checkpoint.layout):
        raise SenteiError(f"The plan removes nothing from {model}.", "Is that the pruned model? Give the original.")


def planned_checkpoint(checkpoint: Checkpoint, layout: Sequence[LayerLayout]) -> Checkpoint:
    """The checkpoint with the shapes that a plan will give it; its weights are not what they will be."""
    family, tensors = checkpoint.family, {}
    for name, info in checkpoint.tensors.items():
        if not name.startswith(f"{family.layers}."):
            tensors[name] = info
            continue
        number, _, rest = name.removeprefix(f"{family.layers}.").partition(".")
        layer, module = layout[int(number)], rest.partition(".")[0]
        gone = not layer.attention and module in family.attention_parts
        if gone or (layer.intermediate_size == 0 and module in family.ffn_parts):
            continue
        shape = list(info.shape)
        if side := family.neuron_side(rest):
            shape[side[0]] = side[1] * layer.intermediate_size
        tensors[name] = replace(info, shape=tuple(shape))
    return replace(checkpoint, layout=tuple(layout), tensors=tensors)


def tiled_facts(checkpoint: Checkpoint, dtype: str | None) -> ModelFacts:
    """Facts of a checkpoint if each FFN were as wide as the next multiple of :data:`serving.forecast.explain.TILE`."""
    layout = [
        replace(layer, intermediate_size=math.ceil(layer.intermediate_size / TILE) * TILE)
        for layer in checkpoint.layout
    ]
    wider = planned_checkpoint(checkpoint, layout)
    return facts_of(wider, dtype, size_on_disk_bytes=wider.weight_bytes)


def _metrics(
    expected: Mapping[str, Mapping[str, Any]], output_len: int, concurrency: int
) -> dict[str, dict[str, float]]:
    """By metric, both models' best value and the gain."""
    times = {
        side: _request(
            concurrency * expected["prefill"][side]["at_least_ms"],
            expected["decode"][side]["at_least_ms"],
            output_len,
            concurrency,
        )
        for side in _SIDES
    }
    return {
        name: {
            **{side: times[side][name] for side in _SIDES},
            "gain": _gain(name, times["original"][name], times["pruned"][name]),
        }
        for name in _PHASE_METRICS
    }


def _request(ttft_ms: float, tpot_ms: float, output_len: int, concurrency: int) -> dict[str, float]:
    """A batch that is prefilled together and then decoded: its request's times, and its throughput."""
    e2el_ms = ttft_ms + (output_len - 1) * tpot_ms
    throughput = 1000 * concurrency * output_len / e2el_ms
    return dict(zip(_PHASE_METRICS, (ttft_ms, tpot_ms, e2el_ms, throughput), strict=True))


def _gain(name: str, original: float, pruned: float) -> float:
    gain = pruned / original if name == "output_throughput" else original / pruned
    assert math.isfinite(gain)
    return gain
