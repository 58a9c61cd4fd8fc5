"""Why a measured gain differs from the expected one: each cause with its share of the difference, and what stays open.

Gains multiply, so shares are of logarithms: ln(expected / measured) is divided. One cause after another is put into the
expectation; by how much that changes it is the cause's part. What the causes leave is unexplained, and is said to be.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from serving.forecast.explain import NOT_COMPILED, Observations, Told, kv_full, untileable
from toolchain.architecture.layout import LayerLayout

BOUND = (
    "The parameters' promise takes decode to be bound by memory and prefill by compute. By this device's peaks the "
    "original's decode is bound by %(decode)s and its prefill by %(prefill)s, for which they promise %(gain)sx."
)
OVERHEAD = (
    "Of the original's %(tpot)s ms a token, the roofline accounts for %(least)s ms. The rest is launches, scheduling, "
    "the server, or kernels that do not reach the peak. If it takes the pruned model as long, the gain is %(gain)sx."
)
PREFILL_OVERHEAD = (
    "Of the original's %(ttft)s ms to the first token, the roofline accounts for %(least)s ms. If the rest takes the "
    "pruned model as long, the gain is %(gain)sx."
)
WIDTHS = (
    "FFN widths of %(count)s layers are no multiples of %(tile)s, which matrix units want (layer: width → nearest that "
    "would tile): %(listed)s. If they take as long as the next multiples, the gain is %(gain)sx."
)
MESSAGES = (BOUND, OVERHEAD, PREFILL_OVERHEAD, WIDTHS)
# A cause with less of the difference says nothing to anybody.
_LEAST_SHARE = 0.01
# By metric, which parts of a request it is about.
_PARTS = {
    "mean_ttft_ms": ("prefill",), "mean_tpot_ms": ("decode",), "mean_e2el_ms": ("prefill", "decode"),
    "output_throughput": ("prefill", "decode"), "total_token_throughput": ("prefill", "decode"),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Compared:
    """What was measured and what was to be expected.

    Attributes:
        metric: Its name.
        gain: ``value``, ``low`` and ``high``, as measured.
        expected: By metric, the gain that parameters alone promise.
        medians: The original's, by metric.
        roofline: By phase, as :func:`serving.forecast.roofline.roofline` has it; empty where no peaks are known.
        tiled: The same with the pruned model's widths rounded up to multiples of what matrix units want; empty if not
            known.
        layout: The pruned model's layers; empty if not known.
        context: Mean tokens of a sequence while it is decoded.
        concurrency: Sequences decoded together.
        seen: While both models were measured.
    """

    metric: str
    gain: Mapping[str, float]
    expected: Mapping[str, float]
    medians: Mapping[str, float | None]
    roofline: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tiled: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    layout: Sequence[LayerLayout] = ()
    context: int
    concurrency: int
    seen: Observations


def explain_gap(compared: Compared) -> dict[str, Any] | None:
    """Divides the difference between measured and expected gain among its causes.

    Returns:
        ``None`` where nothing is expected of this metric, or what is expected lies inside the measured interval. Else
        ``metric``, ``expected``, ``measured`` (with its ``low`` and ``high``), ``direction`` (``below`` or ``above``),
        ``causes`` and ``unexplained``, a share from 0 to 1. A cause has ``share`` (``None`` where one measurement
        cannot tell, and then its part is inside of the unexplained or of another cause), ``message``, ``values`` and
        ``text``.
    """
    expected, gain = compared.expected.get(compared.metric), compared.gain
    if expected is None or gain["low"] <= expected <= gain["high"]:
        return None
    whole = math.log(expected / gain["value"])
    shares: dict[str, tuple[float, Told]] = {}
    now = expected
    for cause, then, told in _predicted(compared):
        share = math.log(now / then) / whole
        if share > 0:
            shares[cause], now = (share, told), then
    total = sum(share for share, _ in shares.values())
    scaled = {cause: (share / max(1.0, total), told) for cause, (share, told) in shares.items()}
    known = {cause: each for cause, each in scaled.items() if each[0] >= _LEAST_SHARE}
    direction = "below" if whole > 0 else "above"
    return {
        "metric": compared.metric,
        "expected": expected,
        "measured": gain["value"], "low": gain["low"], "high": gain["high"],
        "direction": direction,
        "causes": [
            {"cause": cause, "share": share, "message": told[0], "values": told[1], "text": told[0] % told[1]}
            for cause, (share, told) in {**known, **_of_unknown_share(compared, direction)}.items()
        ],
        "unexplained": 1 - sum(share for share, _ in known.values()),
    }  # fmt: skip


def _predicted(compared: Compared) -> list[tuple[str, float, Told]]:
    """The gain to be expected with one cause after another: its name, the gain, and what is said of it."""
    if not compared.roofline:
        return []
    phases, medians = compared.roofline, compared.medians
    gains = {phase: phases[phase]["gain"] for phase in phases}
    found: list[tuple[str, float, Told]] = []

    def add(cause: str, message: str, values: Mapping[str, Any]) -> None:
        if (whole := _whole_gain(compared, gains)) is not None:
            found.append((cause, whole, (message, {**values, "gain": f"{whole:.2f}"})))

    add("bound", BOUND, {phase: phases[phase]["original"]["bound"] for phase in ("decode", "prefill")})
    if tpot := medians.get("mean_tpot_ms"):
        least = phases["decode"]["original"]["at_least_ms"]
        gains["decode"] = _with_rest(least, tpot, gains["decode"])
        add("overhead", OVERHEAD, {"tpot": f"{tpot:.3g}", "least": f"{least:.3g}"})
    # Where prompts wait for each other, what is not the roofline of one is mostly the others'.
    if (ttft := medians.get("mean_ttft_ms")) and compared.concurrency == 1:
        least = phases["prefill"]["original"]["at_least_ms"]
        gains["prefill"] = _with_rest(least, ttft, gains["prefill"])
        add("prefill_overhead", PREFILL_OVERHEAD, {"ttft": f"{ttft:.3g}", "least": f"{least:.3g}"})
    if compared.tiled and (widths := untileable(compared.layout)):
        for phase in gains:
            longer = compared.tiled[phase]["pruned"]["at_least_ms"] / phases[phase]["pruned"]["at_least_ms"]
            least_share = _least_share(compared, phase, gains[phase])
            gains[phase] /= 1 + least_share * (longer - 1)
        add("untileable_widths", WIDTHS, widths[1])
    return found


def _with_rest(least_ms: float, measured_ms: float, gain: float) -> float:
    """The gain of a phase in which only what the roofline accounts for gets shorter."""
    rest = max(0.0, 1 - least_ms / measured_ms)
    return 1 / ((1 - rest) / gain + rest)


def _least_share(compared: Compared, phase: str, gain: float) -> float:
    """Share of the pruned model's predicted time of a phase that the roofline accounts for."""
    measured = compared.medians.get({"decode": "mean_tpot_ms", "prefill": "mean_ttft_ms"}[phase])
    if not measured:
        return 1.0
    return min(1.0, compared.roofline[phase]["pruned"]["at_least_ms"] / (measured / gain))


def _whole_gain(compared: Compared, gains: Mapping[str, float]) -> float | None:
    """A metric's gain, from those of prefill and decode and how much of the original's time each takes."""
    parts = _PARTS[compared.metric]
    if len(parts) == 1:
        return gains[parts[0]]
    ttft, e2el = compared.medians.get("mean_ttft_ms"), compared.medians.get("mean_e2el_ms")
    if not ttft or not e2el:
        return None
    return e2el / (ttft / gains["prefill"] + (e2el - ttft) / gains["decode"])


def _of_unknown_share(compared: Compared, direction: str) -> dict[str, tuple[None, Told]]:
    """What is known to change a gain, and not by how much: whose server waits decides in which direction."""
    seen, found = compared.seen, {}
    tokens = compared.concurrency * compared.context
    waits = {side for side, held in seen.kv_cache_tokens.items() if held is not None and held < tokens}
    helps = {"original"} if direction == "above" else {"pruned"}
    if (
        waits
        and (waits == helps or len(waits) == 2)
        and (told := kv_full(seen.kv_cache_tokens, compared.context, compared.concurrency))
    ):
        found["kv_cache_full"] = (None, told)
    if seen.not_compiled and direction == "below":
        found["not_compiled"] = (None, (NOT_COMPILED, {"said": seen.not_compiled}))
    return found
