"""``sentei``: the root command and the one place that turns errors into a sentence and an exit code."""

import errno
import os
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

import typer

from toolchain.cli.arguments import CheckedTyper
from toolchain.cli.commands import (
    benchmark,
    calibration_text,
    compare,
    compare_methods,
    demo,
    deploy_kit,
    doctor,
    estimate,
    evaluate,
    export,
    gate,
    heal,
    import_gguf,
    plan,
    poc,
    profile,
    prune,
    quantize,
    report,
    serve,
    sign,
)
from toolchain.cli.terminal import prepare_streams, printable
from toolchain.errors import INTERRUPTED, ITSELF_FAILED, SAME_WISH_S, SenteiError, is_out_of_memory, is_panic
from toolchain.ranks.launch import several

_ENDS_A_COMMAND = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")
_LONGEST_REASON = 300
_LEAST_ROOM_BYTES = 64 * 1024 * 1024
# Libraries that would tell their makers who uses them. A value that the user has set stays.
_NO_NETWORK = ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY", "VLLM_NO_USAGE_STATS", "DO_NOT_TRACK")

app = CheckedTyper(
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
app.command("profile")(profile.profile)
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
app.command("sign")(sign.sign)
app.command("generate")(serve.generate)
app.command("serve", context_settings={"allow_extra_args": True})(serve.serve)
app.command("deploy-kit")(deploy_kit.deploy_kit)
app.command("gate")(gate.gate)
app.command("benchmark")(benchmark.benchmark)
app.command("report")(report.report)
app.command("compare")(compare.compare)
app.add_typer(poc.app, name="poc")
app.command("demo")(demo.demo)


def main() -> None:
    """Runs the command line.

    Exit code 0, 1 (a check failed), 2 (bad input), 3 (only of gate: wait), 70 (a fault of sentei's own) or 130 (Ctrl-C,
    or SIGTERM or a terminal that closes, which end a command in the same way).
    """
    prepare_streams()
    os.environ.update({name: os.environ.get(name, "1") for name in _NO_NETWORK})
    if several():
        # What torch says of a broken connection is several screens long. It asks for this when it is loaded.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    interrupted: list[float] = []

    def interrupt(_number: int, _frame: object) -> None:
        # The second would break off the clearing away.
        if interrupted and time.monotonic() - interrupted[-1] < SAME_WISH_S:
            return
        interrupted.append(time.monotonic())
        raise KeyboardInterrupt

    # What is ignored stays ignored: nohup lets a job outlive its terminal, and Ctrl-C is not for what a script runs in
    # the background.
    heard = [number for number in _ENDS_A_COMMAND if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in heard}
    try:
        app()
    except SystemExit as end:
        if end.code == INTERRUPTED:  # Typer ends silently on Ctrl-C
            _end("Interrupted.", INTERRUPTED)
        # With its 1 Typer ends a command that found a pipe or a file cut off, which is no failed check.
        if isinstance(end.__context__, OSError | typer.Abort):
            end.code = ITSELF_FAILED
        if several():
            _end("", end.code if isinstance(end.code, int) else 1)
        raise
    except BaseException as error:
        # A panic of Rust in a library is no Exception.
        if not isinstance(error, Exception | KeyboardInterrupt) and not is_panic(error):
            raise
        # A library that was interrupted in its C++ code says something else.
        if interrupted or isinstance(error, KeyboardInterrupt):
            _end("Interrupted.", INTERRUPTED)
        if os.environ.get("SENTEI_TRACEBACK"):
            traceback.print_exception(error)
        _end(*_told(error))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(sentence: str, exit_code: int) -> NoReturn:
    """Tells why the command ended, and ends it. Of several ranks one tells, and all end alike."""
    if several():
        for number in _ENDS_A_COMMAND:  # a launcher ends the other ranks when one has ended
            signal.signal(number, signal.SIG_IGN)
        from toolchain.ranks.joining import last_word

        sentence, exit_code = last_word(sentence, exit_code)
    if sentence:
        typer.echo(printable(sentence) if exit_code == INTERRUPTED else f"Error: {printable(sentence)}", err=True)
    if several():
        from toolchain.ranks.joining import end

        end(exit_code)
    sys.exit(exit_code)


def _told(error: BaseException) -> tuple[str, int]:
    """The sentence that a person is told, and the exit code."""
    number = _errno_of(error)
    if _is_library_without_memory(error.__cause__):
        number = errno.ENOMEM
    elif isinstance(error, SenteiError):
        return str(error), error.exit_code
    if is_out_of_memory(error) or number == errno.ENOMEM or _address_space_is_full():
        # What libraries do at exit fails too then, and Python would print a traceback for each.
        sys.unraisablehook = lambda _: None
        return (
            "Memory ran out. Close other programs, take a smaller model, shorter or fewer windows, or a larger "
            "machine; prune, apply and evaluate need far less with --offload.",
            2,
        )
    if number in _DISK_ERRORS or "No space left" in str(error):
        return f"No space left on the disk ({error}). Free some and run the command again.", 2
    where = getattr(error, "filename", None)
    if number in (errno.EACCES, errno.EROFS, errno.EPERM):
        return f"{where or error}: permission denied. Choose a place you may write to.", 2
    if number == errno.ENOENT and not where:  # safetensors does not say which
        return f"A file was removed while it was in use ({os.strerror(number)}). Run the command again.", 2
    if number is not None and (where or not isinstance(error, OSError)):
        return f"{where or 'A file'} cannot be read or written ({os.strerror(number)}). Give another path.", 2
    reason = " ".join(str(error).split())
    if is_panic(error):
        return f"The model's tokenizer failed on a text ({_shortened(reason)}). Download or copy the model again.", 2
    what = f"{type(error).__name__}: {reason}" if reason else type(error).__name__
    return f"sentei itself failed ({_shortened(what)}). {_trace_kept(error)}Please report this.", ITSELF_FAILED


def _is_library_without_memory(cause: BaseException | None) -> bool:
    """Whether a library that is there could not be loaded; what caught the ImportError takes it for missing."""
    return isinstance(cause, ImportError) and is_out_of_memory(cause)


def _errno_of(error: BaseException) -> int | None:
    """The system's number for what went wrong; safetensors and tokenizers, which are Rust, have it in their words."""
    if found := _RUST_ERROR.search(str(error)):
        return int(found[1])
    return error.errno if isinstance(error, OSError) else None


def _address_space_is_full() -> bool:
    """Whether ``ulimit -v`` left no room: libraries then fail with errors that do not name memory."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    status = Path("/proc/self/status")
    if limit == resource.RLIM_INFINITY or not status.is_file():
        return False
    peak_kib = next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmPeak:"))
    return int(peak_kib) * 1024 > limit - _LEAST_ROOM_BYTES


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]}…"


def _trace_kept(error: BaseException) -> str:
    """Writes the whole trace to a file that only this user may read, and says where it is."""
    trace = "".join(traceback.format_exception(error))
    try:
        handle, path = tempfile.mkstemp(prefix="sentei-trace-", suffix=".txt")
        os.close(handle)
        Path(path).write_text(trace, encoding="utf-8", errors="backslashreplace")
    except OSError:
        return "SENTEI_TRACEBACK=1 shows the full trace. "
    return f"The full trace is in {path}. "
