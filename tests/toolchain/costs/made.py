"""Costs that nobody measured: known exactly."""

import math
from pathlib import Path
from statistics import mean, variance

import numpy as np

from toolchain.costs.document import (
    Costs,
    CostsDocument,
    ErrorRecord,
    Load,
    PartsRecord,
    Served,
    ShapedModel,
    config_sha256,
)
from toolchain.costs.parts import PartCosts, add

NOTHING = PartCosts(outside=0.0, attention=0.0, widths=(12, 24, 48), ffn=(0.0, 0.0, 0.0))
TTFT = PartCosts(outside=2.0, attention=1.0, widths=(12, 24, 48), ffn=(1.0, 2.0, 4.0))
TPOT = PartCosts(outside=1.0, attention=0.5, widths=(12, 24, 48), ffn=(0.25, 0.5, 1.0))
WEIGHTS = PartCosts(outside=40_000.0, attention=12_000.0, widths=(12, 24, 48), ffn=(5_000.0, 10_000.0, 20_000.0))
KV = PartCosts(outside=0.0, attention=128.0, widths=(12, 24, 48), ffn=(0.0, 0.0, 0.0))


def recorded(parts, spread=(1.0, 1.0, 1.0)):
    """Costs of repeats in which all of them were so many times larger."""
    costs = mean(spread) * np.array([parts.outside, parts.attention, *parts.ffn])
    covariance = np.outer(costs, costs) * (variance(spread) / len(spread) / mean(spread) ** 2)
    return PartsRecord(
        outside=costs[0],
        attention=costs[1],
        widths=list(parts.widths),
        ffn=costs[2:].tolist(),
        error=ErrorRecord(covariance=covariance.tolist(), degrees_of_freedom=len(spread) - 1),
    )


def counted(parts):
    return recorded(parts).model_copy(update={"error": None})


def make_costs(config, *, ttft=TTFT, tpot=TPOT, output_len=9, num_layers=4, spread=(1.0, 1.0, 1.0)):
    """Costs of a model with FFNs of 48 neurons, two requests at a time."""
    per_token = add(NOTHING, add(ttft, tpot, output_len - 1), 1 / (2 * output_len))
    times = {"ttft_ms": ttft, "tpot_ms": tpot, "ms_per_output_token": per_token}
    document = CostsDocument(
        schema_version=1,
        kind="costs",
        sentei_version="0",
        model=ShapedModel(
            name="tiny",
            model_type="llama",
            config_sha256=config_sha256(config),
            num_hidden_layers=num_layers,
            intermediate_size=48,
        ),
        served=Served(
            engine="onnx", precision="fp32", dtype=None, device="cpu", engine_options=[], machine={}, versions={}
        ),
        load=Load(input_len=16, output_len=output_len, concurrency=2, num_prompts=2),
        repeats=len(spread),
        costs={
            **{name: recorded(parts, spread) for name, parts in times.items()},
            "weight_bytes": counted(WEIGHTS),
            "kv_bytes_per_token": counted(KV),
        },
        check=[],
        models=[],
    )
    return Costs(document=document, file=Path("costs.json"), sha256="0" * 64)


class FakeMeasurement:
    """Measures shapes as costs predict them, times what ``distortion`` says of each layout."""

    def __init__(self, costs, distortion=lambda layout: 1.0, noise=(1.0, 1.0, 1.0), again=None, fails=False):
        self.costs, self.distortion, self.noise, self.fails = costs.document, distortion, noise, fails
        self.again, self.asked, self.was_repeated = noise if again is None else again, [], []

    def __call__(self, layouts, directory, is_too_rough):
        if self.fails:
            raise KeyboardInterrupt
        self.asked.append(dict(layouts))
        found = self._measured(layouts, self.noise)
        self.was_repeated.append(is_too_rough(found))
        return self._measured(layouts, (*self.noise, *self.again)) if self.was_repeated[-1] else found

    def _measured(self, layouts, noise):
        return {name: self._times(name, layout, noise) for name, layout in layouts.items()}

    def _times(self, name, layout, noise):
        factor = 1.0 if name == "whole" else self.distortion(layout)
        noise = (1.0,) * len(noise) if name == "whole" else noise
        return {
            quantity: [factor * each * parts.parts.of(layout) for each in noise]
            for quantity, parts in self.costs.costs.items()
            if math.isfinite(factor) and quantity.endswith(("_ms", "token")) and quantity != "kv_bytes_per_token"
        }
