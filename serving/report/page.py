"""Self-contained HTML pages: templates, and Plotly once in each page."""

import importlib
import re
from pathlib import Path
from typing import Any

from serving.report.plot import plotly_js
from serving.report.translate import ENGLISH, Say
from toolchain.errors import MissingDependencyError
from toolchain.outputs import write_text

# What begins a cell, a tag, a link or a picture.
_MARKDOWN = re.compile(r"[|<\[\]]")
_TEMPLATES = Path(__file__).parent / "templates"


def _as_markdown_text(text: object) -> str:
    """A name in Markdown: on one line, in one cell of a table, and neither HTML nor a link nor a picture."""
    return _MARKDOWN.sub(r"\\\g<0>", " ".join(str(text).split()))


def write_page(template: str, out: Path, *, say: Say = ENGLISH, **view: Any) -> None:
    """Renders a template and writes the page.

    Charts, Plotly's own fragments, are marked safe in the templates; everything else is escaped in HTML.

    Args:
        template: Its name; ``.html.j2`` is HTML, anything else plain text.
        out: The file.
        say: What translates the template's messages (``{% trans %}`` and ``_()``).
        view: What it prints.

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
        autoescape=template.endswith(".html.j2"),
        extensions=["jinja2.ext.i18n"],
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["ext.i18n.trimmed"] = True
    environment.install_gettext_callables(say, say)
    environment.filters["cell"] = _as_markdown_text
    page = environment.get_template(template).render(
        **view, language=say.language, plotly_js=markupsafe.Markup(plotly_js())
    )
    write_text(out, page)
