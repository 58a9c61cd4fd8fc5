"""``sentei estimate``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from toolchain.cli.arguments import first_given
from toolchain.cli.console import Output, pick_device, pick_dtype
from toolchain.cli.options import (
    CONCURRENCY,
    INPUT_LEN,
    OUTPUT_LEN,
    DeviceOption,
    JsonOption,
    OriginalArgument,
    OwnDtypeOption,
    PlanArgument,
    QuietOption,
    concurrency_option,
    input_len_option,
    output_len_option,
)
from toolchain.errors import SenteiError

if TYPE_CHECKING:
    from serving.forecast.estimate_document import EstimateDocument

_UNITS = {"mean_ttft_ms": "ms", "mean_tpot_ms": "ms", "mean_e2el_ms": "ms", "output_throughput": "tokens/s"}


def estimate(
    context: typer.Context,
    plan: PlanArgument,
    model: OriginalArgument,
    *,
    costs: Annotated[
        Path | None,
        typer.Option(
            metavar="COSTS.json",
            help="What sentei profile wrote: its times, of its load on its machine, in place of this device's peaks.",
        ),
    ] = None,
    device: DeviceOption = "auto",
    dtype: OwnDtypeOption = "auto",
    input_len: Annotated[int, input_len_option()] = INPUT_LEN,
    output_len: Annotated[int, output_len_option()] = OUTPUT_LEN,
    concurrency: Annotated[int, concurrency_option(min=1)] = CONCURRENCY,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Estimate the speed of a plan on this device, before anything is pruned."""
    output = Output(as_json=as_json, quiet=quiet)
    pick_dtype(dtype, auto=None)
    known = ("device", "dtype", "input_len", "output_len", "concurrency")
    if costs is not None and (option := first_given(context, *known)):
        raise SenteiError(f"--costs says what {option} says.", "Give one of them.")
    from serving.forecast.device_probe import probe_device
    from serving.forecast.estimate import estimate as run
    from serving.forecast.estimate import estimate_by_costs
    from toolchain.checkpoint.directory import dtype_name, open_checkpoint, resolve_model
    from toolchain.model.context_length import check_context
    from toolchain.plan.plan import load_plan

    loaded = load_plan(plan, needs_scores=False)
    directory = resolve_model(model)
    checkpoint = open_checkpoint(directory)
    if costs is not None:
        from toolchain.costs.document import read_costs

        read = read_costs(costs)
        result = estimate_by_costs(checkpoint, loaded.layout, read)
        output.result(result.content(), lambda console: _show(console, result))
        return
    computed = dtype_name(checkpoint.dtype) if dtype == "auto" else dtype
    chosen = pick_device(device)
    asked = f"--input-len {input_len} and --output-len {output_len}"
    most = input_len + output_len
    check_context(directory, checkpoint.config, most, asked=asked, hint="Give less.", note=output.note)
    output.note("Measuring this device, a few seconds ...")
    result = run(
        checkpoint,
        loaded.layout,
        probe_device(chosen, computed),
        dtype=computed,
        input_len=input_len,
        output_len=output_len,
        concurrency=concurrency,
    )
    output.result(result.content(), lambda console: _show(console, result))


def _show(console: Console, result: "EstimateDocument") -> None:
    peaks, load = result.peaks, result.workload
    asked = f"{load.input_len} tokens in, {load.output_len} out, {load.concurrency} at a time"
    if peaks is not None:
        console.print(
            f"{peaks.device}, {peaks.dtype}: {peaks.flops_per_s / 1e9:,.0f} GFLOP/s, "
            f"{peaks.bytes_per_s / 1e9:,.1f} GB/s read, measured just now",
        )
        console.print(f"{asked}: the best that this device allows (roofline), which no server reaches")
    elif result.costs is not None:
        console.print(f"{result.costs.engine}, {asked}: by the costs that were measured there")
    table = Table(box=None)
    for header in ("", "original", "planned", "", "gain"):
        table.add_column(header, justify="right" if header in ("original", "planned", "gain") else "left")
    for name, unit in _UNITS.items():
        if (metric := result.metrics.get(name)) is not None:
            interval = "" if metric.low is None else f" ({metric.low:.2f} to {metric.high:.2f})"
            gain = f"{metric.gain:.2f}x{interval}"
            table.add_row(name, f"{metric.original:.4g}", f"{metric.pruned:.4g}", unit, gain)
    console.print(table)
    for phase, entry in result.roofline.items():
        planned = entry.pruned
        console.print(
            f"  {phase}: {planned.flops_per_token / 1e9:.3g} GFLOP and {planned.bytes_per_token / 1e6:.3g} MB a "
            f"token, {planned.flops_per_byte:.3g} FLOP a byte: bound by {planned.bound}",
        )
    for limit in result.limits:
        console.print(f"  {limit.text}")
