"""``sentei benchmark`` and ``sentei report``."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from toolchain.cli.console import DeviceOption, DtypeOption, ForceOption, JsonOption, Output, QuietOption


class BenchmarkEngine(StrEnum):
    """What runs the models while they are measured."""

    transformers = "transformers"
    onnx = "onnx"
    vllm = "vllm"


def benchmark(
    original: Annotated[Path, typer.Argument(help="The original: a model, or its ONNX export.")],
    pruned: Annotated[Path, typer.Argument(help="The pruned one, of the same kind.")],
    *,
    engine: Annotated[BenchmarkEngine, typer.Option(help="What runs them.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory for results.json.")],
    input_len: Annotated[int, typer.Option(help="Prompt tokens.")] = 512,
    output_len: Annotated[int, typer.Option(help="Generated tokens.")] = 128,
    concurrency: Annotated[int, typer.Option(help="Requests at a time.")] = 1,
    repeats: Annotated[int, typer.Option(help="Alternating runs of each; at least 3.")] = 5,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    engine_option: Annotated[list[str] | None, typer.Option(help="Passed to vllm serve; may be repeated.")] = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure original against pruned, alternating, on this machine."""
    raise NotImplementedError


def report(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Where results were written.")],
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="The HTML file to write.")],
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write one self-contained HTML page from everything found in the directories."""
    raise NotImplementedError
