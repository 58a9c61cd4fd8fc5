"""``sentei report``."""

from pathlib import Path
from typing import Annotated

import typer

from toolchain.cli.console import Output
from toolchain.cli.options import ForceOption, JsonOption, QuietOption, ReportLanguage, out_option
from toolchain.outputs import writes_file


@writes_file
def report(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Where results were written.")],
    *,
    out: Annotated[Path, out_option("The file to write: .html, or .md for Markdown.")],
    lang: Annotated[ReportLanguage, typer.Option(help="The report's language.")] = ReportLanguage.en,
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write one self-contained page from everything found in the directories."""
    output = Output(as_json=as_json, quiet=quiet)
    from serving.report.render import render_report

    summary = render_report(directories, out, language=lang.value, force=force)
    output.result({**summary, "report": str(out)}, lambda console: console.print(f"Report: {out}"))
