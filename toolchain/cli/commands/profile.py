"""``sentei profile``, and what measures as it did."""

from collections.abc import Callable
from enum import StrEnum
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from toolchain.cli.commands.benchmark import PresetName, first_given
from toolchain.cli.commands.export import OnnxDevice, Precision, default_precision
from toolchain.cli.console import Output, pick_dtype
from toolchain.cli.options import (
    CONCURRENCY,
    INPUT_LEN,
    OUTPUT_LEN,
    ForceOption,
    JsonOption,
    OriginalArgument,
    OwnDtypeOption,
    QuietOption,
    concurrency_option,
    input_len_option,
    out_option,
    output_len_option,
    resume_option,
)
from toolchain.errors import SenteiError
from toolchain.outputs import writes_file

if TYPE_CHECKING:
    from toolchain.costs.document import CostsDocument, PartsRecord

_LOAD = "Load"
# What one part costs is the small difference of two models: more is asked of each than in a benchmark of two.
_BATCHES = 4
_REPEATS = {"onnx": 3, "vllm": 1}
# The median error of costs, of models that they were not fitted to, from which a person is warned.
_ROUGH = 0.1
Export = Callable[[Path, Path], object]


class ProfileEngine(StrEnum):
    """What will serve the pruned model."""

    onnx = "onnx"
    vllm = "vllm"


@writes_file
def profile(
    model: OriginalArgument,
    *,
    engine: Annotated[ProfileEngine, typer.Option(help="What will serve the pruned model.")],
    out: Annotated[Path, out_option("The file to write, such as costs.json.")],
    workload: Annotated[
        PresetName | None,
        typer.Option(help="A named load, as for sentei benchmark.", rich_help_panel=_LOAD),
    ] = None,
    input_len: Annotated[int | None, input_len_option(f" ({INPUT_LEN})", panel=_LOAD)] = None,
    output_len: Annotated[int | None, output_len_option(f" ({OUTPUT_LEN})", panel=_LOAD)] = None,
    concurrency: Annotated[int | None, concurrency_option(f" ({CONCURRENCY})", panel=_LOAD, min=1)] = None,
    num_prompts: Annotated[
        int | None, typer.Option(help="Requests per repeat (4 times --concurrency).", rich_help_panel=_LOAD)
    ] = None,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="Starts of each model (1 of a vLLM server, 3 of an ONNX export).")
    ] = None,
    precision: Annotated[
        Precision | None,
        typer.Option(help="Precision of the ONNX export, as for sentei export onnx (fp32 on cpu, fp16 on cuda)."),
    ] = None,
    device: Annotated[OnnxDevice | None, typer.Option(help="Device of the ONNX export (cpu).")] = None,
    dtype: OwnDtypeOption = "auto",
    engine_option: Annotated[
        list[str] | None, typer.Option(help="Passed to vLLM, as in --engine-option=--enforce-eager.")
    ] = None,
    resume: Annotated[bool, resume_option("profile")] = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure what each part of a model costs on this machine, for sentei prune --target."""
    output = Output(as_json=as_json, quiet=quiet)
    if engine is ProfileEngine.onnx and (dtype != "auto" or engine_option):
        raise SenteiError("--dtype and --engine-option are vLLM's.", "Use --precision and --device for ONNX.")
    if engine is ProfileEngine.vllm and (precision or device):
        raise SenteiError("--precision and --device are of an ONNX export.", "Use --dtype for vLLM.")
    pick_dtype(dtype, auto=None)
    from serving.benchmark.settings import BenchmarkSettings
    from serving.benchmark.workload import PRESETS, make_workloads
    from serving.profile.measure import Bench
    from serving.profile.profile import profile as run
    from toolchain.checkpoint.directory import open_checkpoint, resolve_model

    preset = PRESETS[workload.value] if workload else None
    in_flight = concurrency or (preset.concurrency if preset else CONCURRENCY)
    settings = BenchmarkSettings(
        engine=engine.value,
        workloads=make_workloads(
            engine=engine.value,
            input_len=first_given(input_len, preset.input_len if preset else None, INPUT_LEN),
            output_len=first_given(output_len, preset.output_len if preset else None, OUTPUT_LEN),
            concurrency=[in_flight],
            num_prompts=num_prompts or _BATCHES * in_flight,
        ),
        repeats=repeats or _REPEATS[engine.value],
        device=(device or OnnxDevice.cpu).value if engine is ProfileEngine.onnx else "auto",
        dtype=None if dtype == "auto" else dtype,
        engine_options=engine_option or (),
    )
    onnx_device = device or OnnxDevice.cpu
    picked = (precision or default_precision(onnx_device)).value if engine is ProfileEngine.onnx else None
    bench = Bench(
        checkpoint=open_checkpoint(resolve_model(model)),
        settings=settings,
        precision=picked,
        export=onnx_export(picked, settings.device),
        on_progress=output.note,
    )
    with output.telling_what_stays():
        document = run(bench, out, force=force, resume=resume)
    output.result({"file": str(out), **document.content()}, lambda console: _show(console, out, document))


def onnx_export(precision: str | None, device: str) -> Export | None:
    """What turns a checkpoint into the ONNX export that is measured; ``None`` without a precision: nothing does."""
    if precision is None:
        return None
    from export.onnx_graph import export_onnx

    # Both are names of the option's choices, or of a costs.json that says what was exported.
    choices: dict[str, Any] = {"precision": precision, "device": device}
    return partial(export_onnx, **choices)


def _show(console: Console, out: Path, document: "CostsDocument") -> None:
    served, load = document.served, document.load
    console.print(f"{out}: {document.model.name} in {served.engine}, {load.in_words}")
    costs = document.costs
    table = Table(box=None)
    table.add_column("ms, 95 % interval")
    shown = [name for name in ("ttft_ms", "tpot_ms", "ms_per_output_token") if name in costs]
    for name in shown:
        table.add_column(name, justify="right")
    widths = costs[shown[0]].widths
    labels = ["outside of the layers", "one attention", *(f"one FFN of {width}" for width in widths)]
    for place, label in enumerate(labels):
        table.add_row(label, *(_interval(costs[name], place) for name in shown))
    console.print(table)
    for name in shown:
        errors = [abs(each.error) for each in document.check if each.quantity == name]
        if errors:
            console.print(
                f"  {name}: each model, predicted by costs fitted to the others, came out within {median(errors):.1%} "
                f"(median) and {max(errors):.1%} (worst)"
            )
            if median(errors) > _ROUGH:
                console.print("    Targets will be met no better than that. A quieter machine or more --repeats help.")


def _interval(record: "PartsRecord", place: int) -> str:
    """One cost with its interval, as in the table."""
    values = [record.outside, record.attention, *record.ffn]
    margin = record.margin([float(number == place) for number in range(len(values))])
    return f"{values[place]:.4g}" + (f" ± {margin:.2g}" if margin is not None else "")
