"""The options and arguments that several commands share: each is named here, once.

An alias is an option that reads the same wherever it is used. A function makes one whose help differs from command to
command; its name, metavar and range do not.
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

# The largest seed that NumPy takes.
MAX_SEED = 2**32 - 1
# The panel of device, dtype and their like in commands whose options stand in panels.
COMPUTING = "Computing"
# A text, alone or in a mixture; see toolchain.text.sources.
TEXT_METAVAR = "[WEIGHT:]TEXT"
# Tokens per window, unless the model reads fewer.
SEQ_LEN = 2048
# What a user's requests are taken to be, if the command line does not say.
INPUT_LEN, OUTPUT_LEN, CONCURRENCY = 512, 128, 1


class EvopressBudget(StrEnum):
    """How much EvoPress tries."""

    paper = "paper"
    small = "small"


class ReportLanguage(StrEnum):
    """Languages of the report; see :data:`serving.report.translate.LANGUAGES`."""

    en = "en"
    ja = "ja"


# Arguments

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Model directory or hub id.")]
AnyModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A model, pruned or not: a directory or a hub id.")
]
OriginalArgument = Annotated[str, typer.Argument(metavar="MODEL", help="The original: a directory or a hub id.")]
PlanArgument = Annotated[Path, typer.Argument(metavar="PLAN", help="plan.json, or the directory that holds it.")]


# Output


def out_option(help: str = "Directory to create.") -> Any:
    """Where a command writes."""
    return typer.Option("--out", "-o", help=help)


def resume_option(what: str, *, panel: str | None = None) -> Any:
    """Continues an interrupted ``what``."""
    return typer.Option("--resume", help=f"Continue an interrupted {what}.", rich_help_panel=panel)


OutOption = Annotated[Path, out_option()]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]


# Computing


def device_option(more: str = "", *, panel: str | None = None) -> Any:
    """Where a command computes."""
    return typer.Option("--device", help=f"auto, cpu, cuda, cuda:1 ...{more}", rich_help_panel=panel)


def dtype_option(help: str, *, panel: str | None = None) -> Any:
    """A dtype by its name; see :func:`toolchain.cli.console.pick_dtype`."""
    return typer.Option("--dtype", help=help, rich_help_panel=panel)


def offload_option(help: str, *, panel: str | None = None) -> Any:
    """One layer in memory at a time."""
    return typer.Option("--offload", help=help, rich_help_panel=panel)


def seed_option(help: str, *, panel: str | None = None) -> Any:
    """A seed that NumPy takes."""
    return typer.Option(min=0, max=MAX_SEED, help=help, rich_help_panel=panel)


_DTYPES = "auto, float32, bfloat16 or float16 (auto: float32 on a CPU)."
_LARGE_MODELS = "For models larger than memory: one layer at a time."
DeviceOption = Annotated[str, device_option()]
DeviceInPanelOption = Annotated[str, device_option(panel=COMPUTING)]
SpreadDeviceOption = Annotated[
    str, device_option("; auto: several GPUs if the model does not fit on one.", panel=COMPUTING)
]
DtypeOption = Annotated[str, dtype_option(f"Dtype to compute in: {_DTYPES}")]
DtypeInPanelOption = Annotated[str, dtype_option(_DTYPES, panel=COMPUTING)]
# Speed is measured and estimated as the model will serve, on a CPU too.
OwnDtypeOption = Annotated[
    str, dtype_option("Dtype to compute in: auto (the checkpoint's own), float32, bfloat16 or float16.")
]
OffloadOption = Annotated[bool, offload_option(_LARGE_MODELS)]
OffloadInPanelOption = Annotated[bool, offload_option(_LARGE_MODELS, panel=COMPUTING)]


# Calibration


def mixture_option(help: str, *, panel: str | None = None) -> Any:
    """Texts and their weights, such as ``--calibration``."""
    return typer.Option(metavar=TEXT_METAVAR, help=help, rich_help_panel=panel)


def samples_option(more: str = "", *, panel: str | None = None) -> Any:
    """How many windows of calibration text."""
    return typer.Option(help=f"Calibration windows{more}.", rich_help_panel=panel)


def seq_len_option(per_window: str = "", more: str = "", *, default: int = SEQ_LEN, panel: str | None = None) -> Any:
    """How long a window is; see :func:`toolchain.cli.console.window_length`."""
    return typer.Option(
        help=f"Tokens per window{per_window} ({default}, or the model's context if shorter){more}.",
        rich_help_panel=panel,
    )


# Pruning methods


def tensor_parallel_option(more: str = "", *, panel: str | None = None) -> Any:
    """Over how many GPUs a server will split the model."""
    return typer.Option(help=f"GPUs the server will split each layer over{more}.", rich_help_panel=panel)


def align_option(help: str, *, panel: str) -> Any:
    """What FFN widths are multiples of."""
    return typer.Option(help=help, rich_help_panel=panel)


def evopress_budget_option(help: str, *, panel: str) -> Any:
    """How much EvoPress tries."""
    return typer.Option(help=help, rich_help_panel=panel)


# Models beside the first


def against_option(help: str) -> Any:
    """What a model is compared with, or learns from."""
    return typer.Option(metavar="MODEL", help=help)


# Load


def input_len_option(more: str = "", *, panel: str | None = None) -> Any:
    """How long prompts are."""
    return typer.Option(min=1, help=f"Tokens per prompt{more}.", rich_help_panel=panel)


def output_len_option(more: str = "", *, panel: str | None = None) -> Any:
    """How long answers are."""
    return typer.Option(min=1, help=f"Tokens to generate per prompt{more}.", rich_help_panel=panel)


def concurrency_option(more: str = "", *, panel: str | None = None, min: int | None = None) -> Any:
    """How many requests are in flight. A sweep is text, for which there is no ``min``."""
    return typer.Option(min=min, help=f"Requests at a time{more}.", rich_help_panel=panel)


# Evaluation


def text_option(help: str, *, panel: str) -> Any:
    """Texts that perplexity is taken on."""
    return typer.Option(metavar="TEXT", help=help, rich_help_panel=panel)


def windows_option(*, panel: str) -> Any:
    """How many windows of each text."""
    return typer.Option(help="Number of windows of each text. Without it: all.", rich_help_panel=panel)


def task_option(help: str, *, panel: str) -> Any:
    """Tasks of lm-eval."""
    return typer.Option(metavar="NAME[=FILE]", help=help, rich_help_panel=panel)


def questions_option(help: str, *, panel: str) -> Any:
    """A person's own questions."""
    return typer.Option(help=help, rich_help_panel=panel)


def chat_template_option(of: str, *names: str, panel: str) -> Any:
    """Questions as a chat model is asked them; ``names`` are what other programs call it."""
    return typer.Option(
        "--chat-template",
        *names,
        help=f"Ask {of} as a user's turn, in the model's chat template.",
        rich_help_panel=panel,
    )


def limit_option(*, panel: str) -> Any:
    """How many questions of each task."""
    return typer.Option(help="The first N questions of each task.", rich_help_panel=panel)
