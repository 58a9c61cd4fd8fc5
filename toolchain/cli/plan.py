"""``sentei plan``: look at a plan."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from toolchain.cli.console import JsonOption, Output, QuietOption

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
            attention = "keep"
        elif layer.layer in steps:
            attention = (
                f"[red]remove[/red] (step {steps[layer.layer][0]}, {document.metric} {steps[layer.layer][1]:.2f})"
            )
        else:
            attention = "[red]remove[/red] (by hand)"
        table.add_row(str(layer.layer), attention, f"{layer.intermediate_size:>6} {share:>4.0%} {bar}")
    console.print(table, soft_wrap=False)
    console.print(
        f"{document.metric} on the first calibration window: {document.metric_original:.2f} originally, "
        f"{document.metric_after_stage_1:.2f} after the FFNs"
        + (f", {document.trace[-1].metric:.2f} after the attentions" if document.trace else "")
    )
