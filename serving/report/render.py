"""One self-contained page from the files that pruning, evaluation, verification and benchmarks left behind."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from serving.report.inputs import read_inputs
from serving.report.page import write_page
from serving.report.translate import Language, Say
from serving.report.view import build_view
from serving.saved_json import blamed_for_fields
from toolchain.errors import SenteiError
from toolchain.outputs import writes_file

_FORMATS = {".html": "report.html.j2", ".md": "report.md.j2"}


@writes_file
def render_report(
    directories: Sequence[Path], out: Path, *, language: Language = "en", force: bool = False
) -> dict[str, Any]:
    """Renders the page.

    Args:
        directories: Each is looked at itself and one level below.
        out: The file, ``.html`` or ``.md`` (Markdown, without charts). Its directory is created.
        language: Of everything but what files hold in their own words.
        force: Replace an existing file.

    Returns:
        ``report`` (the file), ``missing`` (names of the files that were not found and so left out) and ``verdict``
        (one entry a benchmark: engine, verdict, gain, interval, expected).

    Raises:
        SenteiError: Nothing to report, unreadable files, or ``out`` exists or is of another kind.
        MissingDependencyError: jinja2 or plotly is not installed.
    """
    if out.suffix not in _FORMATS:
        raise SenteiError(f"Output {out} is neither HTML nor Markdown.", f"End its name in {' or '.join(_FORMATS)}.")
    inputs = read_inputs(directories)
    say = Say(language)
    # What no single file could be blamed for.
    with blamed_for_fields(f"A file in {' or '.join(map(str, directories))}"):
        view = build_view(inputs, say)
        write_page(_FORMATS[out.suffix], out, say=say, **view, missing=inputs.missing)
    return {
        "report": str(out),
        "missing": inputs.missing,
        "verdict": [each["speed"] for each in view["benchmarks"] if each["speed"]],
    }
