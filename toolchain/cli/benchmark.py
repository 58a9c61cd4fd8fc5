"""``sentei benchmark`` and ``sentei report``."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from toolchain.cli.console import DeviceOption, DtypeOption, ForceOption, JsonOption, Output, QuietOption, pick_dtype


class BenchmarkEngine(StrEnum):
    """What runs the models while they are measured."""

    transformers = "transformers"
    onnx = "onnx"
    vllm = "vllm"


def benchmark(
    original: Annotated[Path, typer.Argument(metavar="ORIGINAL", help="The original: a model, or its ONNX export.")],
    pruned: Annotated[Path, typer.Argument(metavar="PRUNED", help="The pruned one, of the same kind.")],
    *,
    engine: Annotated[BenchmarkEngine, typer.Option(help="What runs them.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory for results.json.")],
    input_len: Annotated[int, typer.Option(help="Prompt tokens.")] = 512,
    output_len: Annotated[int, typer.Option(help="Generated tokens.")] = 128,
    concurrency: Annotated[int, typer.Option(help="Requests at a time.")] = 1,
    repeats: Annotated[int, typer.Option(help="Alternating runs of each; at least 3.")] = 5,
    primary: Annotated[
        str, typer.Option(help="The metric that decides, such as mean_ttft_ms; the others are exploratory.")
    ] = "output_throughput",
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    engine_option: Annotated[
        list[str] | None, typer.Option(help="Passed to vllm serve, as in --engine-option=--enforce-eager.")
    ] = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure original against pruned, alternating, on this machine."""
    output = Output(as_json=as_json, quiet=quiet)
    pick_dtype(dtype, auto=None)
    from serving.benchmark import benchmark as run

    results = run(
        original,
        pruned,
        engine=engine.value,
        out=out,
        input_len=input_len,
        output_len=output_len,
        concurrency=concurrency,
        repeats=repeats,
        primary=primary,
        device=device,
        dtype=None if dtype == "auto" else dtype,
        engine_options=engine_option or (),
        force=force,
        on_progress=output.note,
    )
    output.result({"directory": str(out), **results}, lambda console: show_results(console, out, results))


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


def show_results(console: Console, out: Path, results: dict[str, Any]) -> None:
    """Prints each metric's medians and gain with its interval."""
    for measurement in results["measurements"]:
        console.print(f"{out}, {results['engine']}: original → pruned, gain (95 % interval)", markup=False)
        for name, metric in measurement["metrics"].items():
            gain = metric["gain"]
            if gain is None:
                continue
            console.print(
                f"  {name:<24} {metric['original']['median']:>9.1f} → {metric['pruned']['median']:>9.1f} "
                f"{metric['unit']:<10} {gain['value']:.2f}x ({gain['low']:.2f} to {gain['high']:.2f}), "
                f"{metric['verdict']}{' (exploratory)' if metric['role'] == 'exploratory' else ''}",
                markup=False,
            )
