"""How long the steps of a proof of concept take, roughly: said beforehand, and put right by the steps that are done.

The shares come from ``benchmarks/results/real_models.md`` (two models, one thread), in passes of the calibration text
through the model: gradients and importance take 4, a plan's widths 0.6 and its search up to 13 at 50 %, the re-fit 5.3.
An export took a second per 3.2 million parameters.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from serving.poc.document import PocDocument
from serving.poc.plan_of_steps import Step
from toolchain.metrics.question_metrics import ANSWERS_AT_A_TIME

_START_S = 10.0
_PASSES: Mapping[str, tuple[float, float]] = {"plans": (4.0, 4.6), "apply": (5.3, 0.0), "prune": (13.9, 0.0)}
_EXPORTED_PER_S = 3.2e6
_VERIFY_S = 60.0
# What models reach of the rates that the device shows with one large matrix.
_OF_PEAK = 0.5
# A search for the highest rate within limits, per model and repeat.
_RATE_SEARCH_S = 1200.0


@dataclass(frozen=True, kw_only=True)
class Amounts:
    """How much there is to do.

    Attributes:
        num_parameters: Of the original.
        weight_bytes: Likewise, as it is served.
        calibration_tokens: In all windows.
        evaluation_tokens: In all windows of all texts, and in all questions.
        written_tokens: In the answers that a model writes in an evaluation, at most.
        flops_per_s: Of the device.
        bytes_per_s: That the device reads.
    """

    num_parameters: int
    weight_bytes: int
    calibration_tokens: int
    evaluation_tokens: int
    written_tokens: int
    flops_per_s: float
    bytes_per_s: float


def seconds_of(step: Step, poc: PocDocument, amounts: Amounts) -> float:
    """Seconds that a step takes, within a factor of two or so."""
    flops = 2 * amounts.num_parameters / (_OF_PEAK * amounts.flops_per_s)
    if step.work in _PASSES:
        once, each = _PASSES[step.work]
        return _START_S + (once + each * step.scale) * amounts.calibration_tokens * flops
    if step.work == "evaluate":
        # Written token by token, sixteen answers at a time: each step reads the weights once.
        steps = amounts.written_tokens / ANSWERS_AT_A_TIME
        written = steps * amounts.weight_bytes / (_OF_PEAK * amounts.bytes_per_s)
        return _START_S + amounts.evaluation_tokens * flops + written
    if step.work == "export":
        return _START_S + amounts.num_parameters / _EXPORTED_PER_S
    if step.work == "verify":
        return _START_S + _VERIFY_S
    load = poc.workload
    read = load.output_len * amounts.weight_bytes / (_OF_PEAK * amounts.bytes_per_s)
    # Once to warm up, once to measure.
    asked = 2 * (load.concurrency * load.input_len * flops + read)
    searched = _RATE_SEARCH_S if load.limits else 0.0
    return _START_S + 2 * load.repeats * (_START_S + asked + searched)


def text_tokens(size: int) -> int:
    """About how many tokens a text of so many bytes or characters has."""
    return math.ceil(size / 4)


def correction(estimated: Sequence[float], taken: Sequence[float]) -> float:
    """By how much the steps that are done took longer than estimated; 1 before any is."""
    return sum(taken) / sum(estimated) if estimated else 1.0
