"""One self-contained HTML page from the files that pruning, evaluation, verification and benchmarks left behind."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from serving.page import check_page, write_page
from serving.report_inputs import read_inputs
from serving.report_view import build_view


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
    check_page(out, force=force)
    inputs = read_inputs(directories)
    view = build_view(inputs)
    write_page("report.html.j2", out, **view, missing=inputs.missing)
    return {"report": str(out), "missing": inputs.missing, "verdict": [speed for speed in view["speeds"] if speed]}
