"""What every command shares: output for people and machines, progress, device and dtype names."""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from toolchain.cli.terminal import printable, takes_unicode
from toolchain.devices import parse_device
from toolchain.errors import SenteiError
from toolchain.progress import Listener
from toolchain.ranks.launch import Launch, is_first, launch

if TYPE_CHECKING:
    import torch

    from toolchain.checkpoint.directory import Checkpoint
    from toolchain.checkpoint.quantized import QuantizedCheckpoint

_PLAIN: dict[str, Any] = {"highlight": False, "soft_wrap": True, "markup": False, "emoji": False}
# Between two lines about work that goes on, where no terminal shows a bar that moves.
_SAY_S = 60.0
_DTYPES = ("float32", "bfloat16", "float16")


class PlainConsole(Console):
    """Shows texts as they are: names of files and of models may hold what rich or a terminal takes for commands."""

    def render_str(self, text: str, **settings: Any) -> Text:  # type: ignore[override]
        """See rich; control characters are escaped."""
        return super().render_str(printable(text), **settings)


class Output:
    """Results go to stdout; everything else, progress included, to stderr."""

    def __init__(self, *, as_json: bool, quiet: bool) -> None:
        self.as_json = as_json
        # Where several processes share a command, the first one tells.
        self.quiet = quiet = quiet or not is_first()
        self.stdout = PlainConsole(quiet=not is_first(), **_PLAIN)
        self.stderr = PlainConsole(stderr=True, quiet=quiet, **_PLAIN)
        _silence_libraries()

    def result(self, result: dict[str, Any], show: Callable[[Console], None]) -> None:
        """Prints a command's result, once: as JSON, or by ``show`` for people."""
        if self.as_json and is_first():
            typer.echo(json.dumps(result, ensure_ascii=not takes_unicode()))
        else:
            show(self.stdout)

    def note(self, text: str) -> None:
        """Tells what is going on."""
        self.stderr.print(text)

    @contextmanager
    def telling_what_stays(self) -> Iterator[None]:
        """Says where unfinished work lies and how to go on, if the command ends badly and any stays."""
        try:
            yield
        except BaseException as error:
            # Interrupted, out of disk, or failed late. Work inside other work says it first: the last note counts.
            if (notes := getattr(error, "__notes__", ())) and "--resume" not in str(error):
                self.note(notes[-1])
            raise

    def progress(self, description: str, total: int) -> AbstractContextManager[Callable[[], None]]:
        """A :class:`toolchain.progress.Progress` that draws a bar on stderr; in a log, a line per minute as well."""
        return self._bar(description, total)

    @property
    def listener(self) -> Listener:
        """Who hears of work that finds something on the way."""
        return Listener(progress=self.progress, note=self.note)

    @contextmanager
    def _bar(self, description: str, total: int) -> Iterator[Callable[[], None]]:
        columns = (
            TextColumn("{task.description:<24}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.stderr, disable=self.quiet) as bar:
            task = bar.add_task(description, total=total)
            started = said = time.monotonic()
            done = 0

            def advance() -> None:
                nonlocal said, done
                bar.advance(task)
                done, now = done + 1, time.monotonic()
                if not self.stderr.is_terminal and done < total and now - said >= _SAY_S:
                    said = now
                    left_s = (now - started) / done * (total - done)
                    self.note(f"{description}: {done} of {total}, about {timedelta(seconds=round(left_s))} left")

            yield advance


def pick_device(device: str) -> str:
    """Resolves ``auto``; checks that a named device is there.

    Raises:
        SenteiError: Unknown, or not on this machine.
    """
    import torch

    picked = parse_device(device)
    if (launched := launch()) is not None and (picked.startswith("cuda") or torch.cuda.is_available()):
        picked = _device_of_rank(launched, picked)
    if picked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if picked.startswith("cuda"):
        if not torch.cuda.is_available():
            raise SenteiError(
                f"--device {device}: torch {torch.__version__} sees no CUDA device here.", "Use --device cpu."
            )
        if int(picked.partition(":")[2] or 0) >= (count := torch.cuda.device_count()):
            raise SenteiError(f"--device {device}: there is no such GPU.", f"This machine has {count}.")
    return picked


def _device_of_rank(launched: Launch, picked: str) -> str:
    """Each process of a machine has a GPU of its own."""
    import torch

    if picked == "cpu":
        return picked
    if picked.startswith("cuda:"):
        raise SenteiError(
            f"--device {picked} is one GPU, and there are {launched.size} processes.",
            "Use --device cuda: each process takes the GPU with the number of its LOCAL_RANK.",
        )
    if torch.cuda.is_available():
        if launched.local_rank >= (count := torch.cuda.device_count()):
            raise SenteiError(
                f"LOCAL_RANK is {launched.local_rank}, and this machine has {count} GPUs, numbered from 0.",
                "Start no more processes per machine than it has GPUs, or use --device cpu.",
            )
        torch.cuda.set_device(launched.local_rank)
    return parse_device(f"cuda:{launched.local_rank}")


def pick_dtype(dtype: str, *, auto: "torch.dtype | None") -> "torch.dtype | None":
    """Resolves a dtype's name.

    Raises:
        SenteiError: Not one of the dtypes models are computed in.
    """
    import torch

    if dtype == "auto":
        return auto
    if dtype not in _DTYPES:
        raise SenteiError(f"--dtype {dtype!r} is not known.", f"Use auto, {', '.join(_DTYPES)}.")
    return getattr(torch, dtype)


def compute_dtype(dtype: str, device: str, stored: "torch.dtype") -> "torch.dtype":
    """The dtype to compute in: ``auto`` is float32 on a CPU and the checkpoint's own elsewhere."""
    import torch

    picked = pick_dtype(dtype, auto=torch.float32 if device == "cpu" else stored)
    assert picked is not None
    return picked


def window_length(
    output: Output, checkpoint: "Checkpoint | QuantizedCheckpoint", given: int | None, default: int
) -> int:
    """Tokens of a window: what ``--seq-len`` says, or the default, shortened to the model's context and said so.

    Raises:
        SenteiError: More than the model reads.
    """
    from toolchain.model.context_length import check_window, context_length

    if given is not None:
        check_window(checkpoint.directory, checkpoint.config, given, note=output.note)
        return given
    longest = context_length(checkpoint.config).stated
    if longest < default:
        output.note(f"Windows have {longest} tokens: {checkpoint.directory} reads no more.")
    return min(default, longest)


def _silence_libraries() -> None:
    """Keeps Transformers' and the hub client's own bars and notices away from ours."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")
