"""Charts of what was removed and what it cost."""

from collections.abc import Sequence

from serving.report.plot import EXPECTED, ORIGINAL, PRUNED, REMOVED, fragment, new_figure, plotly
from serving.report.translate import Say
from toolchain.architecture.layout import LayerLayout
from toolchain.plan.plan import PruningPlan

_FADED = "rgba(139,149,167,0.22)"


def layers_chart(layout: Sequence[LayerLayout], intermediate_size: int, say: Say) -> str:
    """FFN width kept in each layer, and above it whether the layer still attends."""
    go = plotly("plotly.graph_objects")
    layers = list(range(len(layout)))
    kept = [100 * layer.intermediate_size / intermediate_size for layer in layout]
    hover = [
        say(
            "layer %(layer)s: %(kept)s of %(all)s neurons", layer=i, kept=layer.intermediate_size, all=intermediate_size
        )
        for i, layer in enumerate(layout)
    ]
    figure = go.Figure()
    figure.add_bar(x=layers, y=kept, marker_color=PRUNED, name=say("FFN kept"), hovertext=hover, hoverinfo="text")
    figure.add_bar(
        x=layers, y=[100 - percent for percent in kept], marker_color=_FADED, name=say("FFN removed"), hoverinfo="skip"
    )
    for attends, name, symbol, color in (
        (True, say("attention kept"), "square", PRUNED),
        (False, say("attention removed"), "x-thin", REMOVED),
    ):
        where = [i for i, layer in enumerate(layout) if layer.attention == attends]
        marker = {"symbol": symbol, "size": 9, "color": color, "line": {"width": 0 if attends else 2.5, "color": color}}
        figure.add_scatter(
            x=where, y=[112] * len(where), mode="markers", name=name, marker=marker,
            hovertext=[f"{i}: {name}" for i in where], hoverinfo="text",
        )  # fmt: skip
    figure.update_layout(barmode="stack", bargap=0.18)
    figure.update_yaxes(
        range=[0, 122], tickvals=[0, 25, 50, 75, 100, 112], title={"text": say("FFN neurons kept"), "standoff": 16},
        ticktext=["0 %", "25 %", "50 %", "75 %", "100 %", say("attention")],
    )  # fmt: skip
    # Left alone, the axis of a few layers counts halves of them.
    figure.update_xaxes(
        title=say("decoder layer"),
        range=[-0.7, len(layout) - 0.3],
        showgrid=False,
        dtick=1 if len(layout) < 8 else None,
    )
    return fragment(figure, "layers", height=330)


def perplexity_chart(values: Sequence[tuple[str, float, float | None]], say: Say) -> str:
    """Bars of ``(label, perplexity, standard error)``; the first is the original."""
    go = plotly("plotly.graph_objects")
    figure = go.Figure(
        go.Bar(
            y=[label for label, _, _ in values],
            x=[value for _, value, _ in values],
            error_x={"type": "data", "array": [error or 0 for _, _, error in values], "color": EXPECTED},
            marker_color=[ORIGINAL] + [PRUNED] * (len(values) - 1),
            text=[f"{value:.4g}" for _, value, _ in values],
            textposition="inside",
            insidetextanchor="start",
            orientation="h",
            hoverinfo="skip",
        )
    )
    figure.update_layout(showlegend=False, bargap=0.25)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    figure.update_xaxes(title=say("perplexity, lower is better"), rangemode="tozero")
    return fragment(figure, "perplexity", height=90 + 52 * len(values))


def trace_chart(steps: Sequence[tuple[str, float]], metric: str, say: Say) -> str:
    """The metric after each step of the search: ``(label, value)``, first without any removal."""
    go = plotly("plotly.graph_objects")
    figure = go.Figure(
        go.Scatter(
            x=list(range(len(steps))), y=[value for _, value in steps], mode="lines+markers",
            line={"color": PRUNED, "width": 2}, marker={"size": 8},
            hovertext=[f"{label}: {value:.5g}" for label, value in steps], hoverinfo="text",
        )
    )  # fmt: skip
    figure.update_xaxes(tickvals=list(range(len(steps))), ticktext=[label for label, _ in steps], title=say("step"))
    figure.update_yaxes(title=metric)
    return fragment(figure, "trace", height=300)


def curve_chart(plans: Sequence[PruningPlan], limit: float | None) -> str:
    """The metric against the share of decoder-block parameters removed; stage 2 in its own colour."""
    figure = new_figure()
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
    return fragment(figure, "curve", height=380)
