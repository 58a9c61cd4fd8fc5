"""``sentei plan``: look at a plan, and go back to an earlier step."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from toolchain.cli.console import ForceOption, JsonOption, Output, QuietOption

if TYPE_CHECKING:
    from toolchain.plan import PruningPlan

app = typer.Typer(help="Look at a pruning plan.", no_args_is_help=True)
_BAR_WIDTH = 24


@app.callback()
def _group() -> None:
    """Look at a pruning plan."""


@app.command()
def show(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A pruned model, or a plan.json.")],
    *,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Show what a plan keeps of each layer."""
    output = Output(as_json=as_json, quiet=quiet)
    from toolchain.plan import load_plan

    plan = load_plan(directory)
    output.result(plan.summary(), lambda console: _show(console, plan))


@app.command()
def curve(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A pruned model, or a plan.json.")],
    *,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Show damage against size: every step at which pruning can stop."""
    output = Output(as_json=as_json, quiet=quiet)
    from toolchain.plan import load_plan

    plan = load_plan(directory)
    document = plan.document
    result = {
        "metric": document.metric,
        "limit": document.limit.value if document.limit else None,
        "stopped_because": document.stopped_because,
        "steps": [asdict(step) for step in plan.steps],
    }
    output.result(result, lambda console: _show_curve(console, plan))


@app.command()
def cut(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A pruned model, or a plan.json.")],
    *,
    step: Annotated[int, typer.Option(help="The last step to keep, as sentei plan curve numbers them.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory to create for the plan.")],
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Go back to an earlier step of the search, without searching; edits by hand are not kept."""
    output = Output(as_json=as_json, quiet=quiet)
    from toolchain.output import check_output_directory, new_directory
    from toolchain.plan import load_plan

    plan = load_plan(directory).cut(step)
    check_output_directory(out, force=force, inputs=[directory])
    with new_directory(out, force=force) as partial:
        plan.save(partial)
    last = plan.steps[-1]
    output.result(
        {"directory": str(out), **asdict(last)},
        lambda console: console.print(
            f"{out}: step {last.number}, {last.label}, {plan.document.metric} {last.metric:.2f}\n"
            f"sentei apply {out} MODEL -o DIR writes the model.",
            markup=False,
        ),
    )


def _show_curve(console: Console, plan: "PruningPlan") -> None:
    document, steps = plan.document, plan.steps
    total, original = steps[0].num_block_parameters, document.metric_original
    table = Table(title=f"{document.base_model.name}, {document.method}", title_justify="left", box=None)
    for header in ("step", "sparsity", document.metric, "times", ""):
        table.add_column(header, justify="right" if header else "left")
    for step in steps:
        table.add_row(
            str(step.number),
            f"{1 - step.num_block_parameters / total:.1%}",
            f"{step.metric:.4g}",
            f"{step.metric / original:.2f}x" if original > 0 else "",
            step.label,
        )
    console.print(table, soft_wrap=False)
    console.print("Sparsity is of the decoder blocks. sentei plan cut goes back to a step.")
    if document.limit:
        console.print(f"limit: {document.metric} {document.limit.value:.2f}")
    if document.stopped_because:
        console.print(f"stopped: {document.stopped_because}")


def _show(console: Console, plan: "PruningPlan") -> None:
    document = plan.document
    full = document.base_model.intermediate_size
    steps = {step.removed: (number, step.metric) for number, step in enumerate(document.trace, 1)}
    table = Table(title=f"{document.base_model.name}, {document.method}", title_justify="left", box=None)
    for header in ("layer", "attention", "intermediate_size"):
        table.add_column(header, justify="right" if header == "layer" else "left")
    for layer in document.layers:
        share = layer.intermediate_size / full
        bar = "█" * round(share * _BAR_WIDTH)
        if layer.attention == "keep":
            attention = "keep (protected)" if layer.layer in document.protected.attention else "keep"
        elif layer.layer in steps:
            attention = (
                f"[red]remove[/red] (step {steps[layer.layer][0]}, {document.metric} {steps[layer.layer][1]:.2f})"
            )
        else:
            attention = "[red]remove[/red] (by hand)"
        table.add_row(str(layer.layer), attention, f"{layer.intermediate_size:>6} {share:>4.0%} {bar}")
    console.print(table, soft_wrap=False)
    console.print(
        f"{document.metric} on the calibration text: {document.metric_original:.2f} originally, "
        f"{document.metric_after_stage_1:.2f} after the FFNs"
        + (f", {document.trace[-1].metric:.2f} after the attentions" if document.trace else "")
    )
