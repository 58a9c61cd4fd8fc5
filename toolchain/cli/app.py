"""``sentei``: the root command and the one place that turns errors into a sentence and an exit code."""

import errno
import os
import sys
from importlib.metadata import version

import typer

from toolchain.cli import (
    benchmark,
    calibration_text,
    compare,
    compare_methods,
    demo,
    doctor,
    estimate,
    evaluate,
    export,
    heal,
    import_gguf,
    plan,
    prune,
    quantize,
    report,
    serve,
)
from toolchain.errors import SenteiError

_INTERRUPTED = 130
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

app = typer.Typer(
    name="sentei",
    help="Prune a large language model, export it, and measure what it gained on your own server.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def _root(show_version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if show_version:
        typer.echo(f"sentei {version('sentei')}")
        raise typer.Exit


app.command("doctor")(doctor.doctor)
app.command("import")(import_gguf.import_)
app.command("calibration-text")(calibration_text.calibration_text)
app.command("prune")(prune.prune)
app.command("apply")(prune.apply)
app.command("heal")(heal.heal)
app.add_typer(plan.app, name="plan")
app.command("estimate")(estimate.estimate)
app.command("evaluate")(evaluate.evaluate)
app.command("compare-methods")(compare_methods.compare_methods)
app.add_typer(export.app, name="export")
app.command("quantize")(quantize.quantize)
app.command("verify")(export.verify)
app.command("generate")(serve.generate)
app.command("serve", context_settings={"allow_extra_args": True})(serve.serve)
app.command("benchmark")(benchmark.benchmark)
app.command("report")(report.report)
app.command("compare")(compare.compare)
app.command("demo")(demo.demo)


def main() -> None:
    """Runs the command line; exit code 0, 1 (a check failed), 2 (bad input) or 130 (interrupted)."""
    try:
        app()
    except SenteiError as error:
        _fail(str(error), error.exit_code, error)
    except OSError as error:
        if error.errno in _DISK_ERRORS or "No space left" in str(error):
            _fail(f"No space left on the disk ({error}). Free some and run the command again.", 2, error)
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            _fail(f"{error.filename or error}: permission denied. Choose a place you may write to.", 2, error)
        if error.filename:
            _fail(f"{error.filename} cannot be read or written ({error.strerror}). Give another path.", 2, error)
        raise
    except SystemExit as end:
        if end.code == _INTERRUPTED:  # Typer ends silently on Ctrl-C
            typer.echo("Interrupted.", err=True)
        raise


def _fail(sentence: str, exit_code: int, error: BaseException) -> None:
    if os.environ.get("SENTEI_TRACEBACK"):
        raise error
    typer.echo(f"Error: {sentence}", err=True)
    sys.exit(exit_code)
