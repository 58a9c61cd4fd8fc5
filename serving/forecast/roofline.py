"""The roofline (Williams et al., 2009) of prefill and decode: how long each must take at least on this device.

time = max(FLOPs / peak FLOP/s, bytes / peak bytes/s). Real kernels reach less than both peaks; the ratio of two
models' times is what pruning promises.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from serving.forecast.device_probe import DevicePeaks
from serving.forecast.model_facts import ModelFacts

FORMULA = (
    "time = max(FLOPs / flops_per_s, bytes / bytes_per_s). Prefill, one prompt: FLOPs as under mean_ttft_ms; bytes = "
    "weights + KV cache written. Decode, one step of all sequences in flight: FLOPs = concurrency x (2 x (block matrix "
    "+ head parameters) + 4 x context x query width of the attending layers); bytes as under mean_tpot_ms; context = "
    "input_len + output_len / 2, in layers with a sliding window at most the window. Where tensor parallelism divides "
    "the model, both peaks are multiplied by the number of GPUs. Gain = the original's time / the pruned model's."
)
PHASES = ("prefill", "decode")


@dataclass(frozen=True, kw_only=True)
class PhaseCost:
    """What one prefill of one prompt, or one decode step of the whole batch, computes and moves.

    Attributes:
        flops: Floating-point operations.
        num_bytes: Read and written.
        num_tokens: Prompt tokens read, or tokens given.
    """

    flops: int
    num_bytes: int
    num_tokens: int

    @property
    def intensity(self) -> float:
        """FLOPs a byte."""
        return self.flops / self.num_bytes

    def seconds(self, peaks: DevicePeaks) -> float:
        """At least this long."""
        return max(self.flops / peaks.flops_per_s, self.num_bytes / peaks.bytes_per_s)

    def bound(self, peaks: DevicePeaks) -> str:
        """``compute`` or ``memory``."""
        return "compute" if self.flops / peaks.flops_per_s > self.num_bytes / peaks.bytes_per_s else "memory"


def phase_costs(facts: ModelFacts, *, input_len: int, output_len: int, concurrency: int) -> dict[str, PhaseCost]:
    """Both phases of one model; see :data:`FORMULA`."""
    context = input_len + output_len // 2
    linear = 2 * (facts.block_matrix_parameters + facts.head_parameters)
    return {
        "prefill": PhaseCost(
            flops=facts.prefill_flops(input_len),
            num_bytes=facts.decode_weight_bytes + facts.kv_bytes_per_token * input_len,
            num_tokens=input_len,
        ),
        "decode": PhaseCost(
            flops=concurrency * (linear + int(4 * facts.attended(context) * facts.attention_width)),
            num_bytes=facts.decode_bytes(input_len=input_len, output_len=output_len, concurrency=concurrency),
            num_tokens=concurrency,
        ),
    }


def roofline(
    facts: Mapping[str, ModelFacts],
    peaks: DevicePeaks,
    *,
    input_len: int,
    output_len: int,
    concurrency: int,
    num_gpus: int = 1,
) -> dict[str, dict[str, Any]]:
    """By phase: both models' costs and least times, and the gain.

    Args:
        facts: Of ``original`` and ``pruned``.
        peaks: Of this device.
        input_len: Prompt tokens.
        output_len: Output tokens.
        concurrency: Sequences decoded together.
        num_gpus: That the model is divided over; what they tell each other is not counted.
    """
    peaks = replace(peaks, flops_per_s=num_gpus * peaks.flops_per_s, bytes_per_s=num_gpus * peaks.bytes_per_s)
    shape = {"input_len": input_len, "output_len": output_len, "concurrency": concurrency}
    costs = {side: phase_costs(each, **shape) for side, each in facts.items()}
    return {
        phase: {
            **{side: _described(costs[side][phase], peaks) for side in costs},
            "gain": costs["original"][phase].seconds(peaks) / costs["pruned"][phase].seconds(peaks),
            "formula": FORMULA,
        }
        for phase in PHASES
    }


def _described(cost: PhaseCost, peaks: DevicePeaks) -> dict[str, Any]:
    return {
        "flops_per_token": cost.flops / cost.num_tokens,
        "bytes_per_token": cost.num_bytes / cost.num_tokens,
        "flops_per_byte": cost.intensity,
        "bound": cost.bound(peaks),
        "at_least_ms": 1000 * cost.seconds(peaks),
    }
