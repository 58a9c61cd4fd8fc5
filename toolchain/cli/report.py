"""``sentei report``."""

from pathlib import Path
from typing import Annotated

import typer

from toolchain.cli.console import ForceOption, JsonOption, Output, QuietOption


def report(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Where results were written.")],
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="The HTML file to write.")],
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write one self-contained HTML page from everything found in the directories."""
    output = Output(as_json=as_json, quiet=quiet)
    from serving.report import render_report

    summary = render_report(directories, out, force=force)
    output.result({**summary, "report": str(out)}, lambda console: console.print(f"Report: {out}", markup=False))
