"""One self-contained HTML page from the files that pruning, evaluation, verification and benchmarks left behind."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from serving.report_inputs import read_inputs
from toolchain.errors import MissingDependencyError, SenteiError
from toolchain.output import write_text

_TEMPLATES = Path(__file__).parent / "templates"


def render_report(directories: Sequence[Path], out: Path, *, force: bool = False) -> dict[str, Any]:
    """Renders the page.

    Args:
        directories: Each is looked at itself and one level below.
        out: The HTML file; its directory is created.
        force: Replace an existing file.

    Returns:
        ``report`` (the file), ``missing`` (names of the files that were not found and so left out) and ``verdict``
        (one entry a benchmark: engine, verdict, gain, interval, expected).

    Raises:
        SenteiError: Nothing to report, unreadable files, or ``out`` exists.
        MissingDependencyError: jinja2 or plotly is not installed.
    """
    if out.is_dir():
        raise SenteiError(f"Output {out} is a directory.", "Give a file name, such as report.html.")
    if out.exists() and not force:
        raise SenteiError(f"Output {out} exists.", "Choose another, or add --force to replace it.")
    inputs = read_inputs(directories)
    page, view = _render(inputs)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, page)
    verdicts = [speed for speed in view["speeds"] if speed]
    return {"report": str(out), "missing": inputs.missing, "verdict": verdicts}


def _render(inputs: Any) -> tuple[str, dict[str, Any]]:
    try:
        jinja2: Any = importlib.import_module("jinja2")
        markupsafe: Any = importlib.import_module("markupsafe")
    except ImportError as error:
        raise MissingDependencyError("jinja2", "demo") from error
    from serving.report_charts import plotly_js
    from serving.report_view import build_view

    # Plotly's own fragments are marked safe in the template; everything else is escaped.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = plotly_js()
    view = build_view(inputs)
    page = environment.get_template("report.html.j2").render(
        **view, missing=inputs.missing, plotly_js=markupsafe.Markup(script)
    )
    return page, view
