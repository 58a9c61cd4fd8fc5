"""What a plan promises on this device, before anything is pruned: from shapes and a probe alone."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from serving.forecast.device_probe import DevicePeaks
from serving.forecast.estimate_document import EstimateDocument
from serving.forecast.explain import TILE, limits_of_plan
from serving.forecast.model_facts import ModelFacts, facts_of
from serving.forecast.roofline import roofline
from toolchain.architecture.layout import LayerLayout
from toolchain.checkpoint.directory import Checkpoint, opened
from toolchain.errors import SenteiError

_SIDES = ("original", "pruned")
_PHASE_METRICS = ("mean_ttft_ms", "mean_tpot_ms", "mean_e2el_ms", "output_throughput")


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
    checkpoint = opened(model)
    _check_plan_is_for(checkpoint, layout)
    planned = planned_checkpoint(checkpoint, layout)
    facts = {
        "original": facts_of(checkpoint, dtype, size_on_disk_bytes=checkpoint.weight_bytes),
        "pruned": facts_of(planned, dtype, size_on_disk_bytes=planned.weight_bytes),
    }
    if input_len + output_len > (most := facts["original"].max_len):
        raise SenteiError(
            f"{input_len + output_len} tokens, input and output, do not fit {checkpoint.directory}, which takes {most}."
        )
    load = {"input_len": input_len, "output_len": output_len, "concurrency": concurrency}
    expected = roofline(facts, peaks, **load)
    content = {
        "schema_version": 1,
        "kind": "estimate",
        "roofline": expected,
        "metrics": _metrics(expected, output_len, concurrency),
        "weight_bytes": {side: each.weight_bytes for side, each in facts.items()},
        "limits": limits_of_plan(
            facts["pruned"], layout=layout, context=input_len + output_len // 2, concurrency=concurrency
        ),
        "peaks": asdict(peaks),
        "workload": load,
    }  # fmt: skip
    return EstimateDocument.model_validate(content)


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
