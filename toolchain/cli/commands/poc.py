"""``sentei poc``: the guided way from a model to a decision."""

from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from toolchain.cli.arguments import CheckedTyper
from toolchain.cli.console import Output
from toolchain.cli.options import (
    ForceOption,
    JsonOption,
    QuietOption,
    ReportLanguage,
    out_option,
    resume_option,
)
from toolchain.errors import SenteiError
from toolchain.outputs import check_output_file, is_empty_directory, write_text, writes_file

if TYPE_CHECKING:
    from serving.poc.prepare import Prepared

app = CheckedTyper(
    help="Should this model be pruned, and how far? A guided run from a file to a decision.", no_args_is_help=True
)


@app.command("init")
@writes_file
def init(
    *,
    out: Annotated[Path, out_option("The file to write.")] = Path("poc.yaml"),
    lang: Annotated[
        ReportLanguage, typer.Option(help="Language of the comments and of the report.")
    ] = ReportLanguage.en,
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write a commented poc.yaml: model, texts, load, guard rails and candidates."""
    output = Output(as_json=as_json, quiet=quiet)
    from serving.poc.template import template

    check_output_file(out, force=force)
    write_text(out, template(lang.value))
    said = f"{out}: fill in what says CHANGE_ME, then sentei poc run {out} -o DIR --dry-run"
    output.result({"file": str(out)}, lambda console: console.print(said))


@app.command("run")
def run(
    poc: Annotated[Path, typer.Argument(metavar="POC.yaml", help="What sentei poc init wrote, filled in.")],
    *,
    out: Annotated[Path, out_option("Directory for every step's output, the verdict and the report.")],
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Check the file, and show the steps, how long they take and which are finished."
        ),
    ] = False,
    resume: Annotated[bool, resume_option("run, or decide again after guard rails or prices were changed")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Prune, evaluate, export, verify and measure candidates while guard rails hold; then recommend."""
    output = Output(as_json=as_json, quiet=quiet)
    from serving.poc.prepare import prepare

    prepared = prepare(poc)
    if dry_run:
        from serving.poc.run import planned

        steps = planned(prepared, out)
        told = {
            "steps": [{"name": step.name, "seconds": round(seconds), "done": done} for step, seconds, done in steps]
        }
        output.result(told, lambda console: _show_steps(console, told["steps"]))
        return
    if out.exists() and not is_empty_directory(out) and not resume:
        raise SenteiError(f"{out} exists already.", "Add --resume to continue it, or give another directory.")
    _run(prepared, output, out)


def _run(prepared: "Prepared", output: Output, out: Path) -> None:
    from serving.poc.run import run_poc, shown_directories
    from serving.report.decision import verdict_text
    from serving.report.render import render_report
    from serving.report.translate import Say

    try:
        document = run_poc(prepared, out, tell=output.note)
    except (Exception, KeyboardInterrupt):
        output.note(f"{out} holds every step that is finished. The same command with --resume continues from there.")
        raise
    language = prepared.poc.language
    text, report = verdict_text(document, Say(language)), out / "report.html"
    write_text(out / "verdict.txt", text + "\n")
    render_report([out, *shown_directories(document, out)], report, language=language, force=True)
    output.result(
        {"directory": str(out), "report": str(report), **document.content()},
        lambda console: console.print(f"{text}\n\nReport: {report}"),
    )


def _show_steps(console: Console, steps: list[dict[str, Any]]) -> None:
    table = Table(box=None)
    table.add_column("step")
    table.add_column("about", justify="right")
    for each in steps:
        table.add_row(each["name"], "finished" if each["done"] else str(timedelta(seconds=each["seconds"])))
    console.print(table)
    total = timedelta(seconds=sum(each["seconds"] for each in steps if not each["done"]))
    left = "left" if any(each["done"] for each in steps) else "in all"
    console.print(f"About {total} {left}, if every sparsity holds; within a factor of two or so.")
