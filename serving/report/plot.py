"""What all charts share: Plotly fragments without plotly.js, which a page carries once.

Colours that must follow light and dark (text, grid, axes) are set by the page's style sheet, not here. Only constants
and numbers become chart text, since Plotly reads markup in labels.
"""

import importlib
from typing import Any

from toolchain.errors import MissingDependencyError

# Each is at least 3:1 against the page, light and dark, and against the dark text that stands on bars 4.5:1 (WCAG 2.2).
ORIGINAL, PRUNED, REMOVED, EXPECTED = "#7d879a", "#2a9d78", "#d9694f", "#b57d12"


def plotly_js() -> str:
    """The library itself, for one inline script.

    Raises:
        MissingDependencyError: plotly is not installed.
    """
    return str(plotly("plotly.offline").get_plotlyjs())


def new_figure() -> Any:
    """An empty figure."""
    return plotly("plotly.graph_objects").Figure()


def fragment(figure: Any, name: str, *, height: int) -> str:
    """The figure as HTML, in the report's style; ``name`` makes the element's id unique."""
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 10, "r": 14, "t": 14, "b": 10},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"size": 13, "family": "inherit"},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        dragmode=False,
        hoverlabel={"bgcolor": "#1d2420", "bordercolor": "#9ca79f", "font": {"color": "#ffffff"}},
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


def plotly(module: str) -> Any:
    """A module of plotly.

    Raises:
        MissingDependencyError: plotly is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError("plotly", "demo") from error
