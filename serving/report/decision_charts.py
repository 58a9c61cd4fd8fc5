"""The Pareto figure: quality against speed, and against memory."""

from collections.abc import Sequence
from typing import Any, Literal

from serving.decision.document import Interval
from serving.decision.pareto import Point, better_ones
from serving.report.plot import EXPECTED, ORIGINAL, PRUNED, REMOVED, fragment, new_figure
from serving.report.translate import Say

_ORIGINAL = "original"
Axis = Literal["speed", "memory"]
TITLES = {"speed": "speed, times the original's", "memory": "memory, GB"}


def pareto_chart(points: Sequence[Point], axis: Axis, say: Say) -> dict[str, str]:
    """A point per model; a cross where another one leaves no reason to pick it.

    Args:
        points: See :func:`serving.decision.pareto.points_of`.
        axis: What the horizontal axis shows.
        say: The page's language.

    Returns:
        ``chart``, Plotly's fragment, and ``text``, which says the same for those who do not see it.
    """
    better = better_ones(points)
    figure = new_figure()
    candidates = [each for each in points if each.name != _ORIGINAL]
    groups = (
        (say(_ORIGINAL), [each for each in points if each.name == _ORIGINAL], ORIGINAL, "diamond"),
        (say("worth a look"), [each for each in candidates if not better[each.name]], PRUNED, "circle"),
        (
            say("another one is better in every respect"),
            [each for each in candidates if better[each.name]],
            REMOVED,
            "x",
        ),
    )
    for label, group, color, symbol in groups:
        if not group:
            continue
        values = [_across(each, axis) for each in group]
        figure.add_scatter(
            x=[each.value for each in values],
            y=[each.loss.value for each in group],
            mode="markers+text",
            name=label,
            text=[_plain(say(each.name)) for each in group],
            textposition="top center",
            cliponaxis=False,
            marker={"size": 12, "symbol": symbol, "color": color},
            error_x=_errors(values, color),
            error_y=_errors([each.loss for each in group], color),
            hovertext=[_plain(_sentence(each, say)) for each in group],
            hoverinfo="text",
        )
    figure.update_xaxes(title=say(TITLES[axis]))
    figure.update_yaxes(title={"text": say("perplexity, times the original's (lower is better)"), "standoff": 16})
    if axis == "speed":
        figure.add_vline(x=1, line_width=1.5, line_dash="dot", line_color=EXPECTED)
    text = say("Perplexity against %(axis)s.", axis=say(TITLES[axis]))
    return {
        "chart": fragment(figure, f"pareto-{axis}", height=380),
        "text": " ".join([text, *(_sentence(each, say) for each in points)]),
    }


def _across(point: Point, axis: Axis) -> Interval:
    if axis == "speed":
        return point.speed
    used = point.memory_bytes / 1e9
    return Interval(value=used, low=used, high=used)


def _sentence(point: Point, say: Say) -> str:
    return say(
        "%(name)s: perplexity %(loss)s times, speed %(speed)s times the original's, %(memory)s GB.",
        name=say(point.name), loss=f"{point.loss.value:.3g}", speed=f"{point.speed.value:.3g}",
        memory=f"{point.memory_bytes / 1e9:.3g}",
    )  # fmt: skip


def _errors(values: Sequence[Interval], color: str) -> dict[str, Any]:
    return {
        "type": "data", "symmetric": False, "thickness": 1.3, "width": 4, "color": color,
        "array": [(each.value if each.high is None else each.high) - each.value for each in values],
        "arrayminus": [each.value - (each.value if each.low is None else each.low) for each in values],
    }  # fmt: skip


def _plain(text: str) -> str:
    """Plotly reads markup in labels, and a sibling's name is a person's."""
    return text.replace("&", "&amp;").replace("<", "&lt;")
