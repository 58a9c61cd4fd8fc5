"""The report's charts: Plotly fragments without plotly.js, which the page carries once.

Colours that must follow light and dark (text, grid, axes) are set by the page's style sheet, not here. Only constants
and numbers become chart text, since Plotly reads markup in labels.
"""

import importlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from toolchain.errors import MissingDependencyError
from toolchain.layout import LayerLayout
from toolchain.plan import PruningPlan

ORIGINAL, PRUNED, REMOVED, EXPECTED = "#8b95a7", "#2a9d78", "#d9694f", "#c58a1b"
_FADED = "rgba(139,149,167,0.22)"


def plotly_js() -> str:
    """The library itself, for one inline script.

    Raises:
        MissingDependencyError: plotly is not installed.
    """
    return str(_plotly("plotly.offline").get_plotlyjs())


def layers_chart(layout: Sequence[LayerLayout], intermediate_size: int) -> str:
    """FFN width kept in each layer, and above it whether the layer still attends."""
    go = _plotly("plotly.graph_objects")
    layers = list(range(len(layout)))
    kept = [100 * layer.intermediate_size / intermediate_size for layer in layout]
    hover = [f"layer {i}: {layer.intermediate_size} of {intermediate_size} neurons" for i, layer in enumerate(layout)]
    figure = go.Figure()
    figure.add_bar(x=layers, y=kept, marker_color=PRUNED, name="FFN kept", hovertext=hover, hoverinfo="text")
    figure.add_bar(
        x=layers, y=[100 - percent for percent in kept], marker_color=_FADED, name="FFN removed", hoverinfo="skip"
    )
    for attends, name, symbol, color in (
        (True, "attention kept", "square", PRUNED),
        (False, "attention removed", "x-thin", REMOVED),
    ):
        where = [i for i, layer in enumerate(layout) if layer.attention == attends]
        marker = {"symbol": symbol, "size": 9, "color": color, "line": {"width": 0 if attends else 2.5, "color": color}}
        figure.add_scatter(
            x=where, y=[112] * len(where), mode="markers", name=name, marker=marker,
            hovertext=[f"layer {i}: {name}" for i in where], hoverinfo="text",
        )  # fmt: skip
    figure.update_layout(barmode="stack", bargap=0.18)
    figure.update_yaxes(
        range=[0, 122], tickvals=[0, 25, 50, 75, 100, 112], title="FFN neurons kept",
        ticktext=["0 %", "25 %", "50 %", "75 %", "100 %", "attention"],
    )  # fmt: skip
    figure.update_xaxes(title="decoder layer", range=[-0.7, len(layout) - 0.3], showgrid=False)
    return _fragment(figure, "layers", height=330)


def perplexity_chart(values: Sequence[tuple[str, float, float | None]]) -> str:
    """Bars of ``(label, perplexity, standard error)``; the first is the original."""
    go = _plotly("plotly.graph_objects")
    figure = go.Figure(
        go.Bar(
            y=[label for label, _, _ in values],
            x=[value for _, value, _ in values],
            error_x={"type": "data", "array": [error or 0 for _, _, error in values], "color": EXPECTED},
            marker_color=[ORIGINAL] + [PRUNED] * (len(values) - 1),
            text=[f"{value:.4g}" for _, value, _ in values],
            textposition="inside",
            insidetextanchor="start",
            textfont_color="white",
            orientation="h",
            hoverinfo="skip",
        )
    )
    figure.update_layout(showlegend=False, bargap=0.25)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    figure.update_xaxes(title="perplexity, lower is better", rangemode="tozero")
    return _fragment(figure, "perplexity", height=90 + 52 * len(values))


def trace_chart(steps: Sequence[tuple[str, float]], metric: str) -> str:
    """The metric after each step of the search: ``(label, value)``, first without any removal."""
    go = _plotly("plotly.graph_objects")
    figure = go.Figure(
        go.Scatter(
            x=list(range(len(steps))), y=[value for _, value in steps], mode="lines+markers",
            line={"color": PRUNED, "width": 2}, marker={"size": 8},
            hovertext=[f"{label}: {value:.5g}" for label, value in steps], hoverinfo="text",
        )
    )  # fmt: skip
    figure.update_xaxes(tickvals=list(range(len(steps))), ticktext=[label for label, _ in steps], title="step")
    figure.update_yaxes(title=f"{metric}, calibration window")
    return _fragment(figure, "trace", height=300)


def curve_chart(plans: Sequence[PruningPlan], limit: float | None) -> str:
    """The metric against the share of decoder-block parameters removed; stage 2 in its own colour."""
    go = _plotly("plotly.graph_objects")
    figure = go.Figure()
    for number, plan in enumerate(plans):
        total, rungs = plan.steps[0].num_block_parameters, len(plan.document.stage_1)
        x = [100 * (1 - step.num_block_parameters / total) for step in plan.steps]
        y = [step.metric for step in plan.steps]
        hover = [f"step {step.number}: {step.metric:.4g}" for step in plan.steps]
        for name, color, part in (
            ("FFNs narrowed", ORIGINAL, slice(0, rungs + 1)),
            ("blocks removed" if plan.document.block_steps else "attentions removed", PRUNED, slice(rungs, None)),
        ):
            figure.add_scatter(
                x=x[part], y=y[part], mode="lines+markers", name=name, showlegend=number == 0, legendgroup=name,
                line={"color": color, "width": 2}, marker={"size": 7}, hovertext=hover[part], hoverinfo="text",
            )  # fmt: skip
    if limit is not None:
        figure.add_hline(y=limit, line_width=1.5, line_dash="dot", line_color=REMOVED)
    figure.update_xaxes(title="decoder-block parameters removed", ticksuffix=" %", rangemode="tozero")
    figure.update_yaxes(title="metric, calibration text")
    return _fragment(figure, "curve", height=380)


def gain_chart(name: str, metrics: Sequence[tuple[str, Mapping[str, float], float | None]]) -> str:
    """Gains with their intervals on a logarithmic axis, beside what the parameters promise.

    Args:
        name: Makes the element's id unique.
        metrics: ``(label, {"value", "low", "high"}, expected gain or None)``; above 1 is better.
    """
    go = _plotly("plotly.graph_objects")
    labels = [label for label, _, _ in metrics]
    values = [gain["value"] for _, gain, _ in metrics]
    figure = go.Figure()
    figure.add_scatter(
        x=values, y=labels, mode="markers", name="measured, 95 % interval", marker={"size": 11, "color": PRUNED},
        error_x={
            "type": "data", "symmetric": False, "thickness": 2.5, "width": 7, "color": PRUNED,
            "array": [gain["high"] - gain["value"] for _, gain, _ in metrics],
            "arrayminus": [gain["value"] - gain["low"] for _, gain, _ in metrics],
        },
        hovertemplate="%{x:.3f}x<extra></extra>",
    )  # fmt: skip
    promised = [(label, expected) for label, _, expected in metrics if expected]
    figure.add_scatter(
        x=[expected for _, expected in promised], y=[label for label, _ in promised], mode="markers",
        name="expected from the parameters", hovertemplate="%{x:.3f}x<extra></extra>",
        marker={"symbol": "diamond-open", "size": 13, "color": EXPECTED, "line": {"width": 2}},
    )  # fmt: skip
    figure.add_vline(x=1, line_width=1.5, line_dash="dot", line_color=REMOVED)
    everything = [1.0, *values, *(expected for _, expected in promised)]
    everything += [gain[end] for _, gain, _ in metrics for end in ("low", "high")]
    ticks = _ratio_ticks(min(everything), max(everything))
    span = math.log10(max(everything) / min(everything)) or 0.01
    figure.update_xaxes(
        type="log", tickvals=ticks, ticktext=[f"{tick:g}x" for tick in ticks],
        title="above 1x is better",
        range=[math.log10(min(everything)) - 0.06 * span, math.log10(max(everything)) + 0.06 * span],
    )  # fmt: skip
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return _fragment(figure, f"gain-{name}", height=150 + 44 * len(metrics))


def _ratio_ticks(low: float, high: float) -> list[float]:
    """Round ratios, about six of them, that span ``low`` to ``high`` and include 1."""
    for step in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5):
        first, last = math.floor(low / step), math.ceil(high / step)
        if last - first <= 7:
            return [round(step * number, 2) for number in range(max(first, 1), last + 1)]
    powers = range(math.floor(math.log2(low)), math.ceil(math.log2(high)) + 1)
    return [2.0**power for power in powers]


def _fragment(figure: Any, name: str, *, height: int) -> str:
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 10, "r": 14, "t": 14, "b": 10},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"size": 13, "family": "inherit"},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        dragmode=False,
    )
    axis = {"automargin": True, "fixedrange": True, "zeroline": False, "title_font_size": 13, "ticklabelstandoff": 4}
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    return str(
        figure.to_html(
            full_html=False,
            include_plotlyjs=False,
            include_mathjax=False,
            div_id=f"chart-{name}",
            default_width="100%",
            config={"responsive": True, "displayModeBar": False},
        )
    )


def _plotly(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError("plotly", "demo") from error
