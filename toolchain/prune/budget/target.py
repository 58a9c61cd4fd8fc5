"""What ``--target`` asks for, and what of it costs and measurements say."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import Any

from toolchain.architecture.layout import LayerLayout
from toolchain.costs.document import CostsDocument
from toolchain.costs.parts import add
from toolchain.errors import SenteiError
from toolchain.given_options import NO_SLIDING_CACHE, given_options
from toolchain.model.sliding_window import SlidingWindow, sliding_window
from toolchain.plan.target_record import TargetValue
from toolchain.prune.budget.least_damage import Budget
from toolchain.significance import compare_means

_HINT = "Write it like speedup=1.3, tpot=20ms, ttft=500ms, throughput=400tok/s or memory=24GiB@64x8192."
_MS = {"us": 1e-3, "ms": 1.0, "s": 1e3}
_GIB = 2**30
_MEMORY = {"MB": 10**6 / _GIB, "GB": 10**9 / _GIB, "MiB": 2**20 / _GIB, "GiB": 1.0}
_UNITS: Mapping[str, Mapping[str, float]] = {"tpot": _MS, "ttft": _MS, "throughput": {"tok/s": 1.0}, "memory": _MEMORY}
_NUMBER = re.compile(r"(\d+(?:\.\d+)?|\.\d+)([a-zA-Z/]*)")
_CACHED = re.compile(r"(\d{1,6})x(\d{1,8})")
_QUANTITY = {
    "speedup": "ms_per_output_token",
    "throughput": "ms_per_output_token",
    "tpot": "tpot_ms",
    "ttft": "ttft_ms",
}
# Which measured numbers, by quantity; one a repeat.
Measured = Mapping[str, Sequence[float]]


@dataclass(frozen=True, kw_only=True)
class Target:
    """One quantity and how far it has to go.

    Attributes:
        asked: As it was written.
        name: ``speedup``, ``tpot``, ``ttft``, ``throughput`` or ``memory``.
        value: A factor, milliseconds, tokens per second, or GiB.
        cached_tokens: For memory: tokens in the KV cache, of all conversations together.
        conversation: For memory: tokens of one conversation.
        window: For memory: of layers whose older tokens leave the cache; see :func:`as_served`.
    """

    asked: str
    name: str
    value: float
    cached_tokens: int = 0
    conversation: int = 0
    window: SlidingWindow | None = None

    @property
    def is_timed(self) -> bool:
        """Whether a measurement can tell more than costs can; bytes are counted."""
        return self.name != "memory"

    @property
    def quantity(self) -> str:
        """What is timed."""
        return _QUANTITY[self.name]

    @property
    def higher_is_better(self) -> bool:
        """Whether the target is a least value and not a most."""
        return self.name in ("speedup", "throughput")

    def share(self, value: float) -> float:
        """The share of what may be spent that a value spends; above 1 the target is missed."""
        return self.value / value if self.higher_is_better else value / self.value

    @property
    def unit(self) -> str:
        """Of the value."""
        return {"speedup": "x", "throughput": "tok/s", "memory": "GiB"}.get(self.name, "ms")

    def shown(self, value: float) -> str:
        """A value with its unit, for people."""
        return f"{value:.4g} {self.unit}".replace(" x", "x")


def parse_targets(texts: Sequence[str]) -> tuple[Target, ...]:
    """Reads ``speedup=1.3,tpot=20ms``, given once or several times.

    Raises:
        SenteiError: A name, number or unit that is unknown or missing, or a quantity that is asked for twice.
    """
    targets = [_parsed(each.strip()) for each in chain.from_iterable(text.split(",") for text in texts)]
    names = [each.name for each in targets]
    if repeated := [each for each in targets if names.count(each.name) > 1]:
        raise SenteiError(f"--target asks for {repeated[0].name} twice.", "Give each quantity once.")
    return tuple(targets)


def _parsed(text: str) -> Target:
    name, _, amount = text.partition("=")
    amount, at, cached = amount.partition("@")
    found = _NUMBER.fullmatch(amount)
    if name not in (*_UNITS, "speedup") or not found or not 0 < float(found[1]) < math.inf:
        raise SenteiError(f"--target {text!r} is not understood.", _HINT)
    value, unit, units = float(found[1]), found[2], _UNITS.get(name, {"": 1.0, "x": 1.0})
    if unit not in units:
        raise SenteiError(
            f"--target {text!r}: {f'{unit} is not a unit of {name}.' if unit else f'{amount} of what?'}",
            f"Units of {name} are {', '.join(each for each in units if each)}.",
        )
    if (name == "memory") != bool(at):
        raise SenteiError(f"--target {text!r}: memory, and it alone, is for a number of conversations.", _HINT)
    if name == "speedup" and value <= 1:
        raise SenteiError(f"--target {text!r}: a speed-up is above 1.", _HINT)
    if not at:
        return Target(asked=text, name=name, value=value * units[unit])
    size = _CACHED.fullmatch(cached)
    if not size or not int(size[1]) or not int(size[2]):
        raise SenteiError(f"--target {text!r}: {cached!r} is not a number of conversations and their tokens.", _HINT)
    number, tokens = int(size[1]), int(size[2])
    return Target(asked=text, name=name, value=value * units[unit], cached_tokens=number * tokens, conversation=tokens)


def as_served(targets: Sequence[Target], costs: CostsDocument, config: Mapping[str, Any]) -> tuple[Target, ...]:
    """The same targets, with the sliding window of a model whose engine holds no more than that in its KV cache.

    An ONNX export's caches hold all tokens.

    Args:
        targets: What was asked for.
        costs: Of the model's shape.
        config: The model's ``config.json``.

    Raises:
        SenteiError: Transformers cannot read the config.
    """
    if costs.served.engine != "vllm" or NO_SLIDING_CACHE in given_options(costs.served.engine_options):
        return tuple(targets)
    window = sliding_window(config)
    return tuple(replace(target, window=window) for target in targets)


def budget_of(target: Target, costs: CostsDocument, *, correction: float = 1.0) -> Budget:
    """What the model may cost for a target.

    Args:
        target: One.
        costs: Of its shape.
        correction: How many times more a shape costs than is predicted, by measurement.
    """
    if target.name == "memory":
        weights, cache = costs.costs["weight_bytes"].parts, costs.costs["kv_bytes_per_token"].parts
        spared = _spared(target, costs.model.num_hidden_layers, cache.attention)
        return Budget(costs=add(weights, cache, target.cached_tokens), most=target.value * _GIB, spared=spared)
    parts = costs.costs[target.quantity].parts
    most = {
        "speedup": lambda: parts.of(costs.whole) / target.value,
        "throughput": lambda: 1000 / target.value,
    }.get(target.name, lambda: target.value)()
    return Budget(costs=parts, most=most / correction)


def _spared(target: Target, num_layers: int, bytes_per_token: float) -> tuple[float, ...]:
    """Bytes that sliding windows keep out of the KV cache, by the number of attentions that stay.

    Which ones stay is found out after the shape is. Those without a window count first, so that the target is met
    whichever they are.
    """
    if target.window is None:
        return ()
    beyond = max(0, target.conversation - target.window.tokens)
    dropped = target.cached_tokens // target.conversation * beyond * bytes_per_token
    number = min(sum(target.window.layers), num_layers)
    return tuple(accumulate([0.0] * (num_layers - number) + [dropped] * number, initial=0.0))


def predicted(target: Target, costs: CostsDocument, layout: Sequence[LayerLayout]) -> TargetValue:
    """What costs say of a shape, in the target's unit, with their 95 % interval."""
    if target.name == "memory":
        widths, attentions = [layer.intermediate_size for layer in layout], sum(layer.attention for layer in layout)
        value, low, high = budget_of(target, costs).of(widths, attentions) / _GIB, None, None
    elif target.name == "speedup":
        found = costs.predicted_gain(target.quantity, layout)
        value, low, high = found.value, found.low, found.high
    else:
        found = costs.predicted(target.quantity, layout)
        value, low, high = found.value, found.low, found.high
        if target.name == "throughput":
            # Costs that may be nothing leave the rate open at the top.
            low, high = (1000 / high, 1000 / low) if low and high else (None, None)
            value = 1000 / value
    return TargetValue(asked=target.asked, unit=target.unit, predicted=value, predicted_low=low, predicted_high=high)


def with_measured(value: TargetValue, target: Target, shape: Measured, whole: Measured | None) -> TargetValue:
    """The same with what was measured of this shape; ``whole`` is the unpruned model's, measured in turn with it."""
    if not target.is_timed:
        return value
    times = shape[target.quantity]
    found = compare_means(_in_unit(target, times, times if whole is None else whole[target.quantity]))
    return value.model_copy(update={"measured": found.value, "measured_low": found.low, "measured_high": found.high})


def _in_unit(target: Target, times: Sequence[float], whole: Sequence[float]) -> list[float]:
    if target.name == "speedup":
        return [original / each for original, each in zip(whole, times, strict=True)]
    return [1000 / each for each in times] if target.name == "throughput" else list(times)


def check_targets(targets: Sequence[Target], costs: CostsDocument, context: int) -> None:
    """Refuses what this load does not define, what the model's context does not hold, and what needs no pruning.

    Args:
        targets: What was asked for.
        costs: Of the model's shape.
        context: Tokens that the model reads at most.

    Raises:
        SenteiError: See above.
    """
    for target in targets:
        if target.is_timed and target.quantity not in costs.costs:
            raise SenteiError(
                f"--target {target.asked}: with one output token there is no time between two.",
                "Profile a load with longer answers.",
            )
        if target.conversation > context:
            raise SenteiError(
                f"--target {target.asked}: the model reads at most {context} tokens at once.", "Ask for shorter ones."
            )
    reached = [predicted(each, costs, costs.whole).predicted for each in targets]
    if all(target.share(value) <= 1 for target, value in zip(targets, reached, strict=True)):
        said = ", ".join(f"{each.asked} ({each.shown(value)})" for each, value in zip(targets, reached, strict=True))
        raise SenteiError(f"The unpruned model is predicted to meet {said}.", "Nothing needs to be pruned for that.")


def unreachable(targets: Sequence[Target], costs: CostsDocument, smallest: Sequence[LayerLayout]) -> SenteiError | None:
    """Why no shape meets the targets, with the best that can be had; ``None`` if the smallest shape does."""
    for target in targets:
        best = predicted(target, costs, smallest).predicted
        if target.share(best) > 1:
            widths, attentions = smallest[0].intermediate_size, sum(layer.attention for layer in smallest)
            return SenteiError(
                f"--target {target.asked} cannot be reached: the most that costs promise is {target.shown(best)}, with "
                f"FFNs of {widths} neurons and {attentions} attentions.",
                "Ask for less.",
            )
    return None
