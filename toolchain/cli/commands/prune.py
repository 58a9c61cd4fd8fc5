"""``sentei prune`` and ``sentei apply``."""

from decimal import Decimal, InvalidOperation
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from toolchain.cli.arguments import first_given, is_given
from toolchain.cli.commands import heal
from toolchain.cli.commands.profile import onnx_export
from toolchain.cli.console import Output, compute_dtype, pick_device, window_length
from toolchain.cli.options import (
    COMPUTING,
    SEQ_LEN,
    DtypeInPanelOption,
    EvopressBudget,
    ForceOption,
    JsonOption,
    ModelArgument,
    OffloadInPanelOption,
    OffloadOption,
    OriginalArgument,
    OutOption,
    PlanArgument,
    QuietOption,
    SpreadDeviceOption,
    align_option,
    chat_template_option,
    device_option,
    evopress_budget_option,
    mixture_option,
    resume_option,
    samples_option,
    seed_option,
    seq_len_option,
    tensor_parallel_option,
)
from toolchain.errors import SenteiError
from toolchain.outputs import check_output_directory, writes_directory
from toolchain.plan.summary_words import bought_in_words, limit_in_words, target_in_words, two_removals_in_words
from toolchain.prune.methods import DEFAULT, METHODS, MethodName, PruningMethod

if TYPE_CHECKING:
    from toolchain.checkpoint.directory import Checkpoint
    from toolchain.prune.settings import Aim

# More plans than anybody looks at; each takes a search.
MAX_SPARSITIES = 100
_TARGET, _TEXT, _SEARCH, _LIMIT = "Target", "Calibration", "Search", "Limit"


class Widths(StrEnum):
    """How FFN widths are spread over the layers."""

    uniform = "uniform"
    ranked = "ranked"


class SearchKind(StrEnum):
    """How attentions are searched for."""

    exact = "exact"
    racing = "racing"


@writes_directory
def prune(
    context: typer.Context,
    model: ModelArgument,
    *,
    out: OutOption,
    sparsity: Annotated[
        float | None,
        typer.Option(help="Fraction of decoder-block parameters to remove, in (0, 1).", rich_help_panel=_TARGET),
    ] = None,
    sweep: Annotated[
        str | None,
        typer.Option(
            metavar="FROM:TO:STEP",
            help="Instead: plans for several sparsities, as in 0.1:0.5:0.05 or 0.1,0.25, and their curve.",
            rich_help_panel=_TARGET,
        ),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Instead: how fast or small the model must be, by --costs: speedup=1.3, tpot=20ms, ttft=500ms, "
            "throughput=400tok/s, memory=24GiB@64x8192; several together.",
            rich_help_panel=_TARGET,
        ),
    ] = None,
    costs: Annotated[
        Path | None,
        typer.Option(metavar="COSTS.json", help="For --target: what sentei profile wrote.", rich_help_panel=_TARGET),
    ] = None,
    align: Annotated[
        int,
        align_option("FFN widths are multiples of this; 1 for the published widths.", panel=_TARGET),
    ] = 64,
    tensor_parallel: Annotated[
        int,
        tensor_parallel_option("; each then holds a multiple of --align", panel=_TARGET),
    ] = 1,
    method: Annotated[
        MethodName | None,
        typer.Option(
            help="Without it: 2SSP with ranked widths and compensation. 2ssp: as published (arXiv 2501.17771), exactly "
            "with --align 1. The others remove whole attentions and FFNs, as published: see docs/guides/methods.md.",
            rich_help_panel=_TARGET,
        ),
    ] = None,
    evopress_budget: Annotated[
        EvopressBudget,
        evopress_budget_option("How much --method evopress tries: as much as the paper, or far less.", panel=_TARGET),
    ] = EvopressBudget.paper,
    compensate: Annotated[
        bool | None,
        typer.Option(
            "--compensate/--no-compensate",
            help="Re-fit the remaining output projections, without training. On unless --method is given.",
            rich_help_panel=_TARGET,
        ),
    ] = None,
    heal_steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Afterwards, train the result for so many steps on the text of --calibration, as sentei heal does.",
            rich_help_panel=_TARGET,
        ),
    ] = None,
    attention_removals: Annotated[
        int | None,
        typer.Option(
            help="Attentions to remove, instead of the published formula's number (fewer with --widths ranked).",
            rich_help_panel=_TARGET,
        ),
    ] = None,
    widths: Annotated[
        Widths | None,
        typer.Option(
            help="FFN widths: equal, as published, or ranked by gradients of the loss, which removes fewer attentions "
            "and more neurons. Ranked unless --method is given.",
            rich_help_panel=_TARGET,
        ),
    ] = None,
    protect: Annotated[
        list[str] | None,
        typer.Option(
            help="Parts to keep, as in attention:0,1 or ffn:29; may be given several times.",
            rich_help_panel=_TARGET,
        ),
    ] = None,
    calibration: Annotated[
        list[str] | None,
        mixture_option(
            "Text like your users': .txt, .jsonl or .parquet (field text, or messages: chats), a directory of them, or "
            "hub:NAME:CONFIG:SPLIT; several times for a mixture, as in 0.7:en.txt. Without it: Python's manual.",
            panel=_TEXT,
        ),
    ] = None,
    samples: Annotated[int, samples_option(panel=_TEXT)] = 32,
    seq_len: Annotated[int | None, seq_len_option(panel=_TEXT)] = None,
    metric: Annotated[
        str,
        typer.Option(
            help="The metric that decides: perplexity, kl, accuracy:FILE, f1:FILE#class=TEXT, "
            "refusal_rate:FILE#wanted=refusals, valid_json:FILE (all take group=NAME too) or package.module:function.",
            rich_help_panel=_SEARCH,
        ),
    ] = "perplexity",
    chat_template: Annotated[bool, chat_template_option("the questions of --metric", panel=_SEARCH)] = False,
    search: Annotated[
        SearchKind | None,
        typer.Option(
            help="exact, or racing: several times faster, nearly the same. Exact unless --target is given.",
            rich_help_panel=_SEARCH,
        ),
    ] = None,
    resume: Annotated[bool, resume_option("search", panel=_SEARCH)] = False,
    max_degradation: Annotated[
        float | None,
        typer.Option(
            help="The written model may be at most this many times worse, such as 1.10, on text kept apart.",
            rich_help_panel=_LIMIT,
        ),
    ] = None,
    max_metric: Annotated[
        float | None, typer.Option(help="The written model's metric may be at most this.", rich_help_panel=_LIMIT)
    ] = None,
    min_metric: Annotated[
        float | None,
        typer.Option(
            help="The written model's metric, such as accuracy, must be at least this.", rich_help_panel=_LIMIT
        ),
    ] = None,
    limit_metric: Annotated[
        str | None, typer.Option(help="The limit's metric, if it is not --metric.", rich_help_panel=_LIMIT)
    ] = None,
    offload: OffloadInPanelOption = False,
    device: SpreadDeviceOption = "auto",
    dtype: DtypeInPanelOption = "auto",
    seed: Annotated[int, seed_option("Recorded in the plan.", panel=COMPUTING)] = 0,
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Prune a model in two stages, FFN neurons, then whole attentions; or by another method."""
    output = Output(as_json=as_json, quiet=quiet)
    from toolchain.checkpoint.directory import model_name, open_checkpoint, resolve_model
    from toolchain.prune import pipeline
    from toolchain.prune.budget.allocation import parse_protected
    from toolchain.prune.budget.limits import LimitSettings
    from toolchain.prune.sweep import sweep as run_sweep
    from toolchain.ranks.joining import join
    from toolchain.text.sources import parse_sources

    chosen = DEFAULT if method is None else METHODS[method.value]
    _check_options(context, chosen)
    sparsities = _sparsities(sparsity, sweep, target)
    ranks = join()
    for option, value in (("--sweep", sweep), ("--target", target), ("--heal-steps", heal_steps)):
        if ranks.several and value is not None:
            raise SenteiError(f"{option} works in one process, and several were started.", "Start it without torchrun.")
    _check_target_options(context, target, costs)
    if heal_steps is not None:
        _check_healing_options(context)
    picked_device = pick_device(device)
    directory = resolve_model(model)
    checkpoint = open_checkpoint(directory)
    aim = None if costs is None else _aim(target or [], costs, checkpoint, output)
    of_method = dict(chosen.settings)
    if widths is not None:
        of_method["widths"] = widths.value
    if compensate is not None:
        of_method["compensate"] = compensate
    settings = pipeline.PruneSettings(
        sparsity=sparsities[0],
        calibration=parse_sources(calibration or []),
        num_samples=samples,
        seq_len=window_length(output, checkpoint, seq_len, SEQ_LEN),
        align=align,
        tensor_parallel=tensor_parallel,
        attention_removals=attention_removals,
        device=picked_device,
        dtype=compute_dtype(dtype, picked_device, checkpoint.dtype),
        seed=seed,
        protected=parse_protected(protect or []),
        search=(search or _usual_search(target, metric)).value,
        metric=metric,
        chat_template=chat_template,
        limit=LimitSettings(max_degradation=max_degradation, max_metric=max_metric, min_metric=min_metric),
        limit_metric=limit_metric,
        evopress_budget=evopress_budget.value,
        offload=offload,
        spread=device == "auto" and picked_device.startswith("cuda") and not offload,
        aim=aim,
        **of_method,
    )
    if not calibration:
        output.note("No --calibration: taking the Python language reference. Text like your users' keeps more quality.")
    _tell_cost(output, metric, limit_metric)
    name = model_name(directory)
    with output.telling_what_stays():
        if sweep is not None:
            result = run_sweep(
                checkpoint, out, settings, sparsities, model_name=name, force=force, resume=resume,
                progress=output.progress,
            )  # fmt: skip
            output.result({"directory": str(out), **result}, lambda console: show_sweep(console, out, result))
            return
        if heal_steps is not None:
            from toolchain.heal.pruned_and_healed import prune_and_heal

            healing = heal.healing_settings(
                settings.calibration, steps=heal_steps, seq_len=min(heal.SEQ_LEN, settings.seq_len), seed=seed,
                device=picked_device, dtype=dtype,
            )  # fmt: skip
            summary = prune_and_heal(
                checkpoint, out, settings, healing, model_name=name, force=force, resume=resume,
                listener=output.listener,
            )  # fmt: skip
        else:
            summary = pipeline.prune(
                checkpoint, out, settings, model_name=name, force=force, resume=resume, progress=output.progress,
                ranks=ranks,
            )  # fmt: skip
        output.result({"directory": str(out), **summary}, lambda console: show_summary(console, out, summary))


def _check_options(context: typer.Context, method: PruningMethod) -> None:
    """Refuses options that the method does not know."""

    unknown = [name for name in method.unknown_options if is_given(context, name)]
    unknown += [name for name, value in method.fixed_options.items() if context.params[name] not in (None, value)]
    if unknown:
        option = unknown[0].replace("_", "-")
        raise SenteiError(f"--method {method.name} {method.refusal} --{option}.", method.way_out)
    if not method.has_budget and is_given(context, "evopress_budget"):
        raise SenteiError("--evopress-budget is for --method evopress.", "Leave one out, or add the other.")


def _tell_cost(output: Output, *metrics: str | None) -> None:
    """Says how much every model will have to write, where a metric looks at written answers."""
    from toolchain.metrics.question_metrics import cost_in_words, parse_question_metric

    for name in dict.fromkeys(each for each in metrics if each):
        asked = parse_question_metric(name)
        if asked is not None and (cost := cost_in_words(asked)):
            output.note(cost)


def _check_target_options(context: typer.Context, target: list[str] | None, costs: Path | None) -> None:
    """Refuses what says the same as a target in another way, and half of what a target needs."""
    if (target is None) != (costs is None):
        raise SenteiError(
            "--target needs --costs COSTS.json, and --costs is for --target.",
            "sentei profile MODEL --engine onnx -o costs.json measures them.",
        )
    if target is None:
        return
    if option := first_given(context, "attention_removals", "widths"):
        raise SenteiError(f"--target chooses what {option} says.", "Give one of them.")
    if option := first_given(context, "max_degradation", "max_metric", "min_metric"):
        raise SenteiError(
            f"{option} would stop before --target is met.", "Give one of them; the curve shows the damage."
        )


def _check_healing_options(context: typer.Context) -> None:
    """Refuses what cannot be healed, or would not be true of the healed model."""
    if not is_given(context, "calibration"):
        raise SenteiError("--heal-steps needs text to learn from.", "Give text like your users' with --calibration.")
    if is_given(context, "sweep"):
        raise SenteiError("--sweep writes plans, and --heal-steps trains a model.", "Leave one out.")
    if option := first_given(context, "max_degradation", "max_metric", "min_metric"):
        raise SenteiError(
            f"{option} is kept by the pruned model, and --heal-steps changes it afterwards.",
            "Leave out --heal-steps, run sentei heal on the result, and measure it with sentei evaluate.",
        )
    if is_given(context, "offload"):
        raise SenteiError(
            "--offload keeps one layer in memory, and --heal-steps trains whole models.", "Leave one out."
        )


def _usual_search(target: list[str] | None, metric: str) -> SearchKind:
    """A target may take many attentions, which an exact search would look for longer than all the rest takes."""
    from toolchain.metrics.choose import TOKEN_METRICS

    return SearchKind.racing if target is not None and metric in TOKEN_METRICS else SearchKind.exact


def _aim(targets: list[str], costs: Path, checkpoint: "Checkpoint", output: Output) -> "Aim":
    """What is asked for, and what measures shapes here as the costs were measured."""
    from serving.profile.measure import bench_as_profiled, measure_models
    from toolchain.costs.document import read_costs
    from toolchain.prune.budget.target import as_served, parse_targets
    from toolchain.prune.settings import Aim

    parsed, read = parse_targets(targets), read_costs(costs)
    served = read.document.served
    export = onnx_export(served.precision, served.device)
    bench = bench_as_profiled(read.document, checkpoint, export=export, on_progress=output.note)
    asked = as_served(parsed, read.document, checkpoint.config)
    return Aim(targets=asked, costs=read, measure=partial(measure_models, bench))


def _sparsities(sparsity: float | None, sweep: str | None, target: list[str] | None) -> list[float]:
    """One, or those of a sweep, ascending and rounded to what was written; 0 where a target says how far to go."""
    if [sparsity, sweep, target].count(None) != 2:
        raise SenteiError(
            "Give --sparsity, such as 0.25, or --sweep, such as 0.1:0.5:0.05, or --target, such as speedup=1.3."
        )
    if target is not None:
        return [0.0]
    if sparsity is not None:
        return [sparsity]
    assert sweep is not None
    if "," in sweep:
        return _listed_sparsities(sweep)
    try:
        start, stop, step = (Decimal(part) for part in sweep.split(":"))
        if not all(part.is_finite() for part in (start, stop, step)):
            raise ValueError("not a finite number")
    except (InvalidOperation, ValueError) as error:
        raise SenteiError(f"--sweep {sweep!r} is not understood.", "Write FROM:TO:STEP, as in 0.1:0.5:0.05.") from error
    if not (0 < start <= stop < 1 and 0 < step <= 1):
        raise SenteiError(f"--sweep {sweep} does not go upwards inside (0, 1).", "Write it as in 0.1:0.5:0.05.")
    # Multiplied, not divided: the quotient may be too large for a number.
    if stop - start >= step * MAX_SPARSITIES:
        raise SenteiError(f"--sweep {sweep} asks for more than {MAX_SPARSITIES} plans.", "Give a larger step.")
    return check_sparsities(
        "--sweep", [float(start + step * number) for number in range(int((stop - start) / step) + 1)]
    )


def _listed_sparsities(sweep: str) -> list[float]:
    """Those of a list such as ``0.1,0.25``, ascending."""
    try:
        listed = sorted(float(part) for part in sweep.split(","))
    except ValueError as error:
        raise SenteiError(f"--sweep {sweep!r} is not understood.", "Write a list as in 0.1,0.25.") from error
    if not all(0 < each < 1 for each in listed):
        raise SenteiError(f"--sweep {sweep}: sparsities lie inside (0, 1).", "Write a list as in 0.1,0.25.")
    if len(listed) > MAX_SPARSITIES:
        raise SenteiError(f"--sweep asks for more than {MAX_SPARSITIES} plans.", "Give fewer.")
    return check_sparsities("--sweep", listed)


def check_sparsities(option: str, sparsities: list[float]) -> list[float]:
    """Refuses sparsities that differ less than the names of their plans.

    Raises:
        SenteiError: Two would have one name.
    """
    names = [f"{sparsity:g}" for sparsity in sparsities]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise SenteiError(f"{option}: two of its plans would be called {repeated[0]}.", "Give numbers further apart.")
    return sparsities


@writes_directory
def apply(
    plan: PlanArgument,
    model: OriginalArgument,
    *,
    out: OutOption,
    calibration: Annotated[
        list[str] | None,
        mixture_option("The text a compensated plan was made with, given as it was: its weights are fitted again."),
    ] = None,
    offload: OffloadOption = False,
    device: Annotated[str, device_option("; where compensation computes.")] = "auto",
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Apply a plan, edited or not, without searching."""
    output = Output(as_json=as_json, quiet=quiet)
    from toolchain.checkpoint.directory import resolve_model
    from toolchain.plan.plan import load_plan
    from toolchain.prune.apply import apply_plan
    from toolchain.text.sources import parse_sources

    loaded = load_plan(plan)
    place = plan if plan.is_dir() else plan.parent
    if out.resolve() != place.resolve():
        # The plan's own directory gets the plan again; one above it would lose the plan, and perhaps others.
        check_output_directory(out, force=force, inputs=[place])
    summary = apply_plan(
        loaded, resolve_model(model), out, calibration=parse_sources(calibration or []),
        device=pick_device(device), offload=offload, force=force, progress=output.progress,
    )  # fmt: skip
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
    for line in target_in_words(summary.get("target")):
        console.print(f"  target       {line}")
    for line in bought_in_words(summary.get("target")):
        console.print(f"    {line}")
    if found := summary.get("two_removals"):
        console.print(f"  KV cache     {two_removals_in_words(found)}")
    if damage["pruned"] is None:
        console.print("  damage       not measured: sentei evaluate does")
    elif damage["after_stage_1"] is None:
        console.print(
            f"  {damage['name']:<11}  {damage['original']:.4g} → {damage['pruned']:.4g}, on the calibration text"
        )
    else:
        compensated = f" → {damage['pruned']:.4g} (compensated)" if summary["num_refitted"] else ""
        console.print(
            f"  {damage['name']:<11}  {damage['original']:.4g} → {damage['after_stage_1']:.4g} (FFN) → "
            f"{damage['after_stage_2']:.4g} (attention){compensated}, on {damage['source'] or 'the calibration text'}"
        )
    if (compensation := summary["compensation"]) is not None:
        before, after = (compensation[f"held_out_perplexity_{when}"] for when in ("before", "after"))
        if compensation["taken"]:
            original = compensation["held_out_perplexity_original"]
            console.print(
                f"  held out     perplexity {original:.4g} → {before:.4g} → {after:.4g} (compensated), on windows that "
                "no projection was fitted to"
            )
        else:
            console.print(
                f"  compensation not taken: on windows it was not fitted to, perplexity would go from {before:.4g} to "
                f"{after:.4g}. More or longer windows (--samples, --seq-len) help."
            )
    if limit := summary.get("limit"):
        console.print(f"  limit        {limit_in_words(limit)}")
    if ties := summary["num_ties"]:
        of_all = f"{ties} of {len(summary['removed_attention'])} attentions"
        console.print(f"  ties         {of_all} went by perplexity, as several left the same {damage['name']}")
    if summary["stopped_because"]:
        console.print(f"  stopped      {summary['stopped_because']}")
    if healing := summary.get("healing"):
        heal.show_healing(console, out, healing)


def show_sweep(console: Console, out: Path, result: dict[str, Any]) -> None:
    """Prints the ends of a sweep's plans."""
    table = Table(box=None)
    for header in ("plan", "sparsity", result["metric"], "attentions removed"):
        table.add_column(header, justify="left" if header == "plan" else "right")
    for point in result["plans"]:
        table.add_row(
            f"{out}/{point['directory']}",
            f"{point['sparsity']:.1%}",
            f"{point['metric']:.4g}",
            str(point["num_attention_removals"]),
        )
    console.print(table)
    console.print(f"sentei plan curve {out} draws them; sentei apply PLAN MODEL -o DIR writes a model.")
