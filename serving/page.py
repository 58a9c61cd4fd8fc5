"""Self-contained HTML pages: templates, and Plotly once in each page."""

import importlib
from pathlib import Path
from typing import Any

from serving.report_charts import plotly_js
from toolchain.errors import MissingDependencyError, SenteiError
from toolchain.output import write_text

_TEMPLATES = Path(__file__).parent / "templates"


def check_page(out: Path, *, force: bool) -> None:
    """Refuses a page that exists, unless forced.

    Raises:
        SenteiError: ``out`` is a directory, or exists and ``force`` is off.
    """
    if out.is_dir():
        raise SenteiError(f"Output {out} is a directory.", "Give a file name, such as report.html.")
    if out.exists() and not force:
        raise SenteiError(f"Output {out} exists.", "Choose another, or add --force to replace it.")


def write_page(template: str, out: Path, **view: Any) -> None:
    """Renders a template and writes the page; the directory is created.

    Charts, Plotly's own fragments, are marked safe in the templates; everything else is escaped.

    Raises:
        MissingDependencyError: jinja2 or plotly is not installed.
    """
    try:
        jinja2: Any = importlib.import_module("jinja2")
        markupsafe: Any = importlib.import_module("markupsafe")
    except ImportError as error:
        raise MissingDependencyError("jinja2", "demo") from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(template).render(**view, plotly_js=markupsafe.Markup(plotly_js()))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, page)
