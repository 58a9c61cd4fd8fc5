"""``sentei plan``: look at a plan, and go back to an earlier step."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from toolchain.cli.arguments import CheckedTyper
from toolchain.cli.console import Output
from toolchain.cli.options import ForceOption, JsonOption, QuietOption, out_option
from toolchain.errors import SenteiError
from toolchain.outputs import writes_directory, writes_file

if TYPE_CHECKING:
    from toolchain.plan.document import CompensationRecord
    from toolchain.plan.plan import PruningPlan

app = CheckedTyper(help="Look at a pruning plan.", no_args_is_help=True)
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
    from toolchain.plan.plan import load_plan

    plan = load_plan(directory, needs_scores=False)
    output.result(plan.summary(), lambda console: _show(console, plan))


@app.command()
@writes_file
def curve(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A pruned model, a plan.json, or a sweep.")],
    *,
    out: Annotated[Path | None, out_option("HTML file to write as well.")] = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Show damage against size: every step at which pruning can stop."""
    output = Output(as_json=as_json, quiet=quiet)
    from toolchain.plan.plan import load_plan, load_sweep

    if out is not None and out.suffix != ".html":
        raise SenteiError(f"{out}: the curve is written as HTML.", "Give a name that ends in .html.")
    plans = load_sweep(directory) or {str(directory): load_plan(directory, needs_scores=False)}
    if out is not None:
        from serving.report.curve import render_curve

        render_curve(plans, out, force=force)
    curves = [
        {
            "directory": name,
            "metric": plan.document.metric,
            "limit": plan.document.limit.model_dump() if plan.document.limit else None,
            "stopped_because": plan.document.stopped_because,
            "steps": [asdict(step) for step in plan.steps],
        }
        for name, plan in plans.items()
    ]

    def show(console: Console) -> None:
        for name, plan in plans.items():
            _show_curve(console, name, plan)
        if out is not None:
            console.print(f"{out} draws it.")

    output.result({"curves": curves} if len(curves) > 1 else curves[0], show)


@app.command()
def diff(
    first: Annotated[Path, typer.Argument(metavar="A", help="A pruned model, or a plan.json.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another plan.")],
    *,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Show where two plans for the same model differ."""
    output = Output(as_json=as_json, quiet=quiet)
    from toolchain.plan.plan import load_plan
    from toolchain.plan.views import difference

    found = difference(load_plan(first), load_plan(second))
    output.result(found, lambda console: _show_difference(console, found))


@app.command()
def why(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A pruned model, or a plan.json.")],
    layer: Annotated[int, typer.Argument(help="Number of the layer.")],
    *,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Show what the search saw of a layer when it removed or kept it."""
    output = Output(as_json=as_json, quiet=quiet)
    from toolchain.plan.plan import load_plan
    from toolchain.plan.views import reasons

    found = reasons(load_plan(directory), layer)
    output.result(found, lambda console: _show_reasons(console, found))


@app.command()
@writes_directory
def cut(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A pruned model, or a plan.json.")],
    *,
    step: Annotated[int, typer.Option(help="The last step to keep, as sentei plan curve numbers them.")],
    out: Annotated[Path, out_option("Directory to create for the plan.")],
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Go back to an earlier step without a new search; edits by hand are not kept."""
    output = Output(as_json=as_json, quiet=quiet)
    from toolchain.outputs import check_output_directory, new_directory
    from toolchain.plan.plan import load_plan

    plan = load_plan(directory).cut(step)
    check_output_directory(out, force=force, inputs=[directory])
    with new_directory(out, force=force) as partial:
        plan.save(partial)
    last = plan.steps[-1]
    output.result(
        {"directory": str(out), **asdict(last)},
        lambda console: console.print(
            f"{out}: step {last.number}, {last.label}, {plan.document.metric} {last.metric:.4g}\n"
            f"sentei apply {out} MODEL -o DIR writes the model.",
        ),
    )


def _show_curve(console: Console, name: str, plan: "PruningPlan") -> None:
    document, steps = plan.document, plan.steps
    total, original = steps[0].num_block_parameters, document.metric_original
    worst = max(abs(step.metric - original) for step in steps) or 1.0
    table = Table(
        title=f"{document.base_model.name} to {document.target_sparsity:.1%}: {name}", title_justify="left", box=None
    )
    for header in ("step", "sparsity", document.metric, "times", "damage", ""):
        table.add_column(header, justify="left" if header in ("damage", "") else "right")
    for step in steps:
        table.add_row(
            str(step.number),
            f"{1 - step.num_block_parameters / total:.1%}",
            f"{step.metric:.4g}",
            f"{step.metric / original:.2f}x" if original > 0 else "",
            "█" * round(_BAR_WIDTH / 2 * abs(step.metric - original) / worst),
            step.label,
        )
    console.print(table, soft_wrap=False)
    console.print("Sparsity is of the decoder blocks. sentei plan cut goes back to a step.")
    if document.limit:
        measured = document.limit.measured
        found = "" if measured is None else f", {measured:.4g} where the plan ends"
        console.print(f"limit: {document.limit.metric} {document.limit.value:.4g}{found}")
    if document.stopped_because:
        console.print(f"stopped: {document.stopped_because}")


def _show_difference(console: Console, found: dict[str, Any]) -> None:
    for name, (before, after) in found["settings"].items():
        console.print(f"{name}: {before} → {after}")
    sizes, metrics = found["num_block_parameters"], found["metric"]
    console.print(f"decoder-block parameters: {sizes[0]:,} → {sizes[1]:,}")
    console.print(f"metric after the last step: {metrics[0]:.4g} → {metrics[1]:.4g}")
    if not found["layers"]:
        console.print("No layer differs.")
        return
    table = Table(box=None)
    for header in ("layer", "attention", "intermediate_size", "neurons kept by both"):
        table.add_column(header, justify="left" if header == "attention" else "right")
    for layer in found["layers"]:
        pairs = [" → ".join(map(str, dict.fromkeys(layer[name]))) for name in ("attention", "intermediate_size")]
        table.add_row(str(layer["layer"]), *pairs, str(layer["neurons_kept_by_both"]))
    console.print(table, soft_wrap=False)


def _show_reasons(console: Console, found: dict[str, Any]) -> None:
    attention, ffn = found["attention"], found["ffn"]
    protected = {True: " (protected)", False: ""}
    console.print(f"layer {found['layer']}, attention: {attention['decision']}{protected[attention['protected']]}")
    if attention["steps"]:
        table = Table(box=None)
        for header in ("step", f"{found['metric']} without it", "rank", "removed instead", "best"):
            table.add_column(header, justify="right")
        for step in attention["steps"]:
            place = f"{step['rank']} of {step['num_candidates']}"
            if step["rank"] is None:
                place = f"out after {step['num_tokens']} tokens"
            instead = "itself" if step["removed"] == found["layer"] else str(step["removed"])
            table.add_row(str(step["step"]), f"{step['metric']:.4g}", place, instead, f"{step['best']:.4g}")
        console.print(table, soft_wrap=False)
        for step in attention["steps"]:
            if tie := step["tie"]:
                console.print(
                    f"  Step {step['step']} was a tie. Perplexity without this attention is {tie['perplexity']:.5g}; "
                    f"the lowest, {tie['best']:.5g}, decided."
                )
    elif found["blocks"] is not None:
        for candidate, score in found["blocks"].items():
            console.print(f"  {candidate}: {score:.4g} in the method's first look")
    elif not attention["protected"]:
        console.print("  The search removed no attention, or never came to this layer.")
    console.print(
        f"layer {found['layer']}, FFN: {ffn['intermediate_size']} of {ffn['full']} neurons kept"
        f"{protected[ffn['protected']]}, with {ffn['importance_kept']:.1%} of the layer's squared importance"
    )
    if ffn["least_kept"] is not None and ffn["most_removed"] is not None:
        console.print(
            f"  The least important kept has {ffn['least_kept']:.4g}, the most important removed "
            f"{ffn['most_removed']:.4g}."
        )
    if found["bought"] is not None:
        _show_bought(console, found["bought"])


def _show_bought(console: Console, found: dict[str, Any]) -> None:
    """What the layer's parts cost, and what was saved for which damage."""
    console.print(f"Of {found['timed']} ({found['served']}), by the target's costs:")
    for part, what in (("attention", "attentions"), ("ffn", "neurons")):
        each = found[part]
        line = f"  {part}: {each['ms_before']:.4g} ms"
        if each["kv_before"]:
            line += f" and {each['kv_before']:,.0f} bytes of KV cache per token"
        if each["count_after"] == each["count_before"]:
            console.print(f"{line}, kept whole", soft_wrap=False)
            continue
        line += f" → {each['ms_after']:.4g} ms without {each['count_before'] - each['count_after']} {what}"
        if each["ms_per_nat"] is not None:
            line += f", for {each['damage']:.3g} nats per token: {each['ms_per_nat']:.3g} ms per nat"
            line += f" and {each['kv_per_nat']:,.0f} bytes of KV cache" if each["kv_before"] else ""
        else:
            line += ", for no damage"
        console.print(line, soft_wrap=False)


def _show(console: Console, plan: "PruningPlan") -> None:
    from toolchain.plan.views import sources_of

    document = plan.document
    full = document.base_model.intermediate_size
    steps = {step.removed: (number, step.metric) for number, step in enumerate(document.trace, 1)}
    table = Table(title=f"{document.base_model.name}, {document.described_method}", title_justify="left", box=None)
    for header in ("layer", "attention", "intermediate_size"):
        table.add_column(header, justify="right" if header == "layer" else "left")
    for layer in document.layers:
        share = layer.intermediate_size / full
        bar = "█" * round(share * _BAR_WIDTH)
        if layer.attention == "keep":
            attention = "keep (protected)" if layer.layer in document.protected.attention else "keep"
        elif layer.layer in steps:
            attention = f"remove (step {steps[layer.layer][0]}, {document.metric} {steps[layer.layer][1]:.4g})"
        else:
            by_hand = not document.block_steps or layer.layer not in document.block_steps[-1].attention
            attention = "remove" + (" (by hand)" if by_hand else "")
        if layer.layer in document.protected.ffn:
            bar += " protected"
        shown = console.render_str(attention, style="red" if layer.attention == "remove" else "")
        table.add_row(str(layer.layer), shown, f"{layer.intermediate_size:>6} {share:>4.0%} {bar}")
    console.print(table, soft_wrap=False)
    console.print(
        f"{document.metric} on {document.metric_source or 'the calibration text'}: "
        f"{document.metric_original:.4g} originally, "
        + (
            f"{document.metric_at_end:.4g} without what is removed"
            if document.block_steps
            else f"{document.metric_after_stage_1:.4g} after the FFNs"
        )
        + (f", {document.trace[-1].metric:.4g} after the attentions" if document.trace else "")
    )
    calibration = document.calibration
    console.print(
        f"calibration: {'; '.join(sources_of(calibration))}; "
        f"{calibration.num_samples} windows of {calibration.seq_len} tokens"
        + (f", the first of them BOS ({calibration.bos})" if calibration.bos is not None else "")
        + (", chats through the chat template" if calibration.chat_template else ""),
    )
    if document.compensation is not None:
        console.print(f"compensation: {_done_by(document.compensation)}")
    for healing in document.healing:
        console.print(
            f"healed: {healing.steps} steps towards {healing.teacher}, perplexity {healing.perplexity_before:.4g} → "
            f"{healing.perplexity_after:.4g} on held-out text; sentei apply of this plan does not repeat it."
        )


def _done_by(compensation: "CompensationRecord") -> str:
    """What compensation did to the weights that are kept."""
    if not compensation.taken:
        return (
            "not taken, since it made the perplexity of calibration windows that it was not fitted to worse "
            f"({compensation.held_out_perplexity_before:.4g} → {compensation.held_out_perplexity_after:.4g})."
        )
    if not compensation.refits:
        return "not done yet; kept weights of these will differ from the original's."
    factor = compensation.final_norm_factor
    scaled = f" and the norm before the head multiplied by {factor:.3f}" if factor is not None else ""
    refitted = f"{len(compensation.refits)} output projections were re-fitted{scaled}"
    return f"{refitted}; kept weights of these differ from the original's."
