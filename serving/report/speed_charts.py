"""Charts of what a benchmark measured."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from serving.report.plot import EXPECTED, ORIGINAL, PRUNED, REMOVED, fragment, new_figure
from serving.report.translate import Say

_COLORS = {"original": ORIGINAL, "pruned": PRUNED}


def gain_chart(name: str, metrics: Sequence[tuple[str, Mapping[str, float], float | None]], say: Say) -> str:
    """Gains with their intervals on a logarithmic axis, beside what the parameters promise.

    Args:
        name: Makes the element's id unique.
        metrics: ``(label, {"value", "low", "high"}, expected gain or None)``; above 1 is better.
        say: The page's language.
    """
    labels = [label for label, _, _ in metrics]
    values = [gain["value"] for _, gain, _ in metrics]
    figure, hover = new_figure(), say("%(value)sx", value="%{x:.3f}") + "<extra></extra>"
    figure.add_scatter(
        x=values, y=labels, mode="markers", name=say("measured, 95 % interval"), marker={"size": 11, "color": PRUNED},
        error_x={
            "type": "data", "symmetric": False, "thickness": 2.5, "width": 7, "color": PRUNED,
            "array": [gain["high"] - gain["value"] for _, gain, _ in metrics],
            "arrayminus": [gain["value"] - gain["low"] for _, gain, _ in metrics],
        },
        hovertemplate=hover,
    )  # fmt: skip
    promised = [(label, expected) for label, _, expected in metrics if expected]
    figure.add_scatter(
        x=[expected for _, expected in promised], y=[label for label, _ in promised], mode="markers",
        name=say("expected from the parameters"), hovertemplate=hover,
        marker={"symbol": "diamond-open", "size": 13, "color": EXPECTED, "line": {"width": 2}},
    )  # fmt: skip
    figure.add_vline(x=1, line_width=1.5, line_dash="dot", line_color=REMOVED)
    everything = [1.0, *values, *(expected for _, expected in promised)]
    everything += [gain[end] for _, gain, _ in metrics for end in ("low", "high")]
    ticks = _ratio_ticks(min(everything), max(everything))
    span = math.log10(max(everything) / min(everything)) or 0.01
    figure.update_xaxes(
        type="log", tickvals=ticks, ticktext=[say("%(value)sx", value=f"{tick:.3g}") for tick in ticks],
        title=say("above 1x is better"),
        range=[math.log10(min(everything)) - 0.06 * span, math.log10(max(everything)) + 0.06 * span],
    )  # fmt: skip
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return fragment(figure, f"gain-{name}", height=150 + 44 * len(metrics))


def _ratio_ticks(low: float, high: float) -> list[float]:
    """Round ratios, about six of them, that span ``low`` to ``high`` and include 1."""
    for step in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5):
        first, last = math.floor(low / step), math.ceil(high / step)
        if last - first <= 7 and high < 4 * low:
            return [round(step * number, 2) for number in range(max(first, 1), last + 1)]
    base = 2 if high / low < 2**6 else 10
    powers = range(math.floor(math.log(low, base)), math.ceil(math.log(high, base)) + 1)
    return [float(base) ** power for power in powers]


def load_chart(name: str, points: Mapping[str, Sequence[Mapping[str, Any]]], metric: str, say: Say) -> dict[str, str]:
    """Latency against throughput, a line a model, a point a load.

    Args:
        name: Makes the element's id unique.
        points: By side, in the order of the loads: ``throughput`` (tokens/s), ``ms`` and ``load`` (its label), each
            a median over repeats, ``number`` (the load's, in one unit) and ``spread`` (the repeats' lowest and highest
            ms).
        metric: What the milliseconds are.
        say: The page's language.

    Returns:
        ``chart``, Plotly's fragment, and ``text``, which says the same for those who do not see it.
    """
    figure = new_figure()
    said = {
        side: [f"{point['load']}: {point['throughput']:.4g} {say('tokens/s')}, {point['ms']:.4g} ms" for point in each]
        for side, each in points.items()
    }
    for side, each in points.items():
        figure.add_scatter(
            x=[point["throughput"] for point in each],
            y=[point["ms"] for point in each],
            mode="lines+markers+text",
            text=[f"{point['number']:g}" for point in each],
            textposition="middle right",
            name=say(side),
            line={"color": _COLORS[side], "width": 2},
            marker={"size": 8},
            cliponaxis=False,
            error_y={
                "type": "data", "symmetric": False, "thickness": 1.2, "width": 4,
                "array": [point["spread"][1] - point["ms"] for point in each],
                "arrayminus": [point["ms"] - point["spread"][0] for point in each],
            },
            hovertext=said[side],
            hoverinfo="text",
        )  # fmt: skip
    figure.update_xaxes(title=say("output throughput, tokens/s"), rangemode="tozero")
    figure.update_yaxes(title=f"{metric}, ms", rangemode="tozero")
    text = _in_words(say("%(metric)s at each load.", metric=metric), said, say)
    return {"chart": fragment(figure, name, height=300), "text": text}


def percentile_chart(
    name: str, percentiles: Mapping[str, Mapping[str, float]], metric: str, say: Say
) -> dict[str, str]:
    """A distribution as its percentiles, a line a model.

    Args:
        name: Makes the element's id unique.
        percentiles: By side: percentile to ms, in ascending order.
        metric: What the milliseconds are.
        say: The page's language.

    Returns:
        As :func:`load_chart`.
    """
    figure = new_figure()
    for side, values in percentiles.items():
        figure.add_scatter(
            x=[f"p{percent}" for percent in values], y=list(values.values()), mode="lines+markers", name=say(side),
            line={"color": _COLORS[side], "width": 2}, marker={"size": 7},
            hovertemplate="%{x}: %{y:.4g} ms<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(type="category", showgrid=False)
    figure.update_yaxes(title=f"{metric}, ms", rangemode="tozero")
    said = {
        side: [f"p{percent}: {ms:.4g} ms" for percent, ms in values.items()] for side, values in percentiles.items()
    }
    text = _in_words(say("Percentiles of %(metric)s.", metric=metric), said, say)
    return {"chart": fragment(figure, name, height=260), "text": text}


def attainment_chart(
    name: str, tried: Mapping[str, Sequence[Mapping[str, float]]], attainment: float, say: Say
) -> dict[str, str]:
    """The share of requests that met every limit at each request rate tried, in all repeats.

    Args:
        name: Makes the element's id unique.
        tried: By side: ``request_rate`` and ``met``, from 0 to 1.
        attainment: The share that must meet them.
        say: The page's language.

    Returns:
        As :func:`load_chart`.
    """
    figure = new_figure()
    said = {}
    for side, each in tried.items():
        ordered = sorted(each, key=lambda point: point["request_rate"])
        said[side] = [
            say("%(rate)s requests/s", rate=f"{point['request_rate']:.3g}") + f": {100 * point['met']:.0f} %"
            for point in ordered
        ]
        figure.add_scatter(
            x=[point["request_rate"] for point in ordered], y=[100 * point["met"] for point in ordered],
            mode="markers", name=say(side), marker={"size": 9, "color": _COLORS[side], "opacity": 0.75},
            hovertext=said[side], hoverinfo="text",
        )  # fmt: skip
    figure.add_hline(y=100 * attainment, line_width=1.5, line_dash="dot", line_color=REMOVED)
    figure.update_xaxes(title=say("requests/s"), type="log")
    figure.update_yaxes(title=say("requests within the limits, %"), range=[-3, 104])
    text = _in_words(say("Requests within the limits at each rate tried."), said, say)
    return {"chart": fragment(figure, name, height=300), "text": text}


def _in_words(subject: str, said: Mapping[str, Sequence[str]], say: Say) -> str:
    """Every point, for those who do not see the chart."""
    return " ".join([subject, *(f"{say(side)}: {'; '.join(points)}." for side, points in said.items())])
