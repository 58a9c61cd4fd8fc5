"""``sentei prune`` and ``sentei apply``."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from toolchain.cli.console import (
    DeviceOption,
    DtypeOption,
    ForceOption,
    JsonOption,
    OffloadOption,
    Output,
    QuietOption,
    compute_dtype,
    pick_device,
)

OutOption = Annotated[Path, typer.Option("--out", "-o", help="Directory to create.")]


class Method(StrEnum):
    """Pruning methods."""

    two_ssp = "2ssp"


def prune(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model directory or hub id.")],
    *,
    out: OutOption,
    sparsity: Annotated[float, typer.Option(help="Fraction of decoder-block parameters to remove, in (0, 1).")],
    calibration: Annotated[
        Path | None,
        typer.Option(help="Your own kind of text: .txt, .jsonl or .parquet (field text). Without it: Python's manual."),
    ] = None,
    method: Annotated[Method, typer.Option(help="2ssp: the published method (arXiv 2501.17771).")] = Method.two_ssp,
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 32,
    seq_len: Annotated[int, typer.Option(help="Tokens a window.")] = 2048,
    align: Annotated[int, typer.Option(help="FFN widths are multiples of this; 1 for the published widths.")] = 64,
    attention_removals: Annotated[
        int | None, typer.Option(help="Attentions to remove, instead of the published formula.")
    ] = None,
    protect: Annotated[
        list[str] | None,
        typer.Option(help="What has to stay, as in attention:0,1 or ffn:29; may be given several times."),
    ] = None,
    max_degradation: Annotated[
        float | None, typer.Option(help="Stop before perplexity is this many times the original's, such as 1.10.")
    ] = None,
    max_metric: Annotated[float | None, typer.Option(help="Stop before perplexity is above this.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted search.")] = False,
    offload: OffloadOption = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    seed: Annotated[int, typer.Option(help="Recorded in the plan.")] = 0,
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Prune a model in two stages: FFN neurons, then whole attentions."""
    output = Output(as_json=as_json, quiet=quiet)
    from toolchain import pipeline
    from toolchain.allocation import parse_protected
    from toolchain.checkpoint import open_checkpoint, resolve_model
    from toolchain.limits import LimitSettings

    picked_device = pick_device(device)
    directory = resolve_model(model)
    settings = pipeline.PruneSettings(
        sparsity=sparsity,
        calibration=calibration,
        num_samples=samples,
        seq_len=seq_len,
        align=align,
        attention_removals=attention_removals,
        device=picked_device,
        dtype=compute_dtype(dtype, picked_device, open_checkpoint(directory).dtype),
        seed=seed,
        protected=parse_protected(protect or []),
        limit=LimitSettings(max_degradation=max_degradation, max_metric=max_metric),
        offload=offload,
    )
    if calibration is None:
        output.note("No --calibration: taking the Python language reference. Text like your users' keeps more quality.")
    name = directory.resolve().name if Path(model).is_dir() else model
    summary = pipeline.prune(
        directory, out, settings, model_name=name, force=force, resume=resume, progress=output.progress
    )
    output.result({"directory": str(out), **summary}, lambda console: show_summary(console, out, summary))


def apply(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="plan.json, or the directory that holds it.")],
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The original model: directory or hub id.")],
    *,
    out: OutOption,
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Apply a plan, edited or not, without searching."""
    output = Output(as_json=as_json, quiet=quiet)
    from toolchain import pipeline
    from toolchain.checkpoint import resolve_model
    from toolchain.plan import load_plan

    loaded = load_plan(plan)
    summary = pipeline.apply_plan(loaded, resolve_model(model), out, force=force, progress=output.progress)
    output.result({"directory": str(out), **summary}, lambda console: show_summary(console, out, summary))


def show_summary(console: Console, out: Path, summary: dict[str, Any]) -> None:
    """Prints what was removed and what it cost."""
    original, pruned, damage = summary["original"], summary["pruned"], summary["calibration_metric"]
    widths = summary["intermediate_size"]
    removed = ", ".join(str(layer) for layer in summary["removed_attention"]) or "none"
    console.print(
        f"{out}: {summary['sparsity']:.1%} of the decoder-block parameters removed, "
        f"{original['num_parameters']:,} → {pruned['num_parameters']:,} in all"
    )
    console.print(f"  FFN widths   {min(widths)} to {max(widths)}")
    console.print(f"  attention    removed in layers {removed}")
    if damage["pruned"] is None:
        console.print("  damage       not measured: sentei evaluate does")
    else:
        console.print(
            f"  {damage['name']:<11}  {damage['original']:.2f} → {damage['after_stage_1']:.2f} (FFN) → "
            f"{damage['pruned']:.2f} (attention), on the calibration text"
        )
    if summary["stopped_because"]:
        console.print(f"  stopped      {summary['stopped_because']}")
