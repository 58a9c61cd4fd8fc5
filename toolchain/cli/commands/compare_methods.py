"""``sentei compare-methods``."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from toolchain.cli.commands.prune import MAX_SPARSITIES, check_sparsities
from toolchain.cli.console import Output, compute_dtype, pick_device, window_length
from toolchain.cli.options import (
    COMPUTING,
    SEQ_LEN,
    DeviceInPanelOption,
    DtypeInPanelOption,
    EvopressBudget,
    ForceOption,
    JsonOption,
    ModelArgument,
    QuietOption,
    align_option,
    chat_template_option,
    evopress_budget_option,
    limit_option,
    mixture_option,
    out_option,
    questions_option,
    resume_option,
    samples_option,
    seed_option,
    seq_len_option,
    task_option,
    text_option,
    windows_option,
)
from toolchain.errors import SenteiError
from toolchain.outputs import writes_directory
from toolchain.prune.methods import METHODS

if TYPE_CHECKING:
    from toolchain.evaluate.method_comparison_document import ComparisonDocument

_PRUNING, _EVALUATION = "Pruning", "Evaluation"
_INPUT_LEN, _OUTPUT_LEN, _REPEATS = 128, 32, 3


@writes_directory
def compare_methods(
    model: ModelArgument,
    *,
    out: Annotated[Path, out_option("Directory for comparison.json, comparison.md and the plans.")],
    sparsity: Annotated[
        str, typer.Option(help="One sparsity, or several.", rich_help_panel=_PRUNING)
    ] = "0.25,0.375,0.5",
    methods: Annotated[
        str | None, typer.Option(help="Names of methods, comma-separated. Without it: all.", rich_help_panel=_PRUNING)
    ] = None,
    evopress_budget: Annotated[
        EvopressBudget, evopress_budget_option("How much EvoPress tries.", panel=_PRUNING)
    ] = EvopressBudget.paper,
    align: Annotated[int, align_option("FFN widths of 2SSP are multiples of this.", panel=_PRUNING)] = 64,
    calibration: Annotated[
        list[str] | None,
        mixture_option("Text, as for sentei prune; not that of --text.", panel=_PRUNING),
    ] = None,
    samples: Annotated[int, samples_option(panel=_PRUNING)] = 32,
    seed: Annotated[int, seed_option("Seed of EvoPress.", panel=_PRUNING)] = 0,
    text: Annotated[
        list[str] | None,
        text_option("Text to measure perplexity on; several times.", panel=_EVALUATION),
    ] = None,
    windows: Annotated[int | None, windows_option(panel=_EVALUATION)] = None,
    task: Annotated[
        list[str] | None,
        task_option("Task, as for sentei evaluate; several times.", panel=_EVALUATION),
    ] = None,
    questions: Annotated[
        list[Path] | None, questions_option("Your own questions; several times.", panel=_EVALUATION)
    ] = None,
    limit: Annotated[int | None, limit_option(panel=_EVALUATION)] = None,
    chat_template: Annotated[bool, chat_template_option("tasks and questions", panel=_EVALUATION)] = False,
    speed: Annotated[
        bool, typer.Option("--speed", help="Measure speed too, in Transformers.", rich_help_panel=_EVALUATION)
    ] = False,
    seq_len: Annotated[
        int | None,
        seq_len_option(", of every text", panel=COMPUTING),
    ] = None,
    device: DeviceInPanelOption = "auto",
    dtype: DtypeInPanelOption = "auto",
    resume: Annotated[bool, resume_option("comparison")] = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Prune by every method to several sparsities, evaluate the results, and put them in one table."""
    output = Output(as_json=as_json, quiet=quiet)
    from toolchain.checkpoint.directory import dtype_name, model_name, open_checkpoint, resolve_model
    from toolchain.evaluate.method_comparison import Comparison, compare_methods, save_comparison
    from toolchain.evaluate.run import EvaluationSettings
    from toolchain.evaluate.task_requests import parse_requests
    from toolchain.outputs import beside, check_output_directory, new_directory
    from toolchain.parts_cache import unfinished_parts
    from toolchain.prune.settings import PruneSettings
    from toolchain.text.sources import parse_sources, parse_text

    chosen = list(dict.fromkeys(methods.split(","))) if methods else list(METHODS)
    if unknown := [name for name in chosen if name not in METHODS]:
        raise SenteiError(f"--methods: {unknown[0]!r} is not known.", f"Known are {', '.join(METHODS)}.")
    sparsities = _sparsities(sparsity)
    picked_device, directory = pick_device(device), resolve_model(model)
    checkpoint = open_checkpoint(directory)
    computed_in = compute_dtype(dtype, picked_device, checkpoint.dtype)
    length = window_length(output, checkpoint, seq_len, SEQ_LEN)
    requests = parse_requests(task or [], questions or [])

    def measure_speed(pruned: Path) -> dict[str, Any]:
        from serving.benchmark.run import benchmark
        from serving.benchmark.settings import BenchmarkSettings
        from serving.benchmark.workload import make_workloads

        engine = "transformers"
        settings = BenchmarkSettings(
            engine=engine,
            workloads=make_workloads(engine=engine, input_len=_INPUT_LEN, output_len=_OUTPUT_LEN),
            repeats=_REPEATS,
            device=picked_device,
            dtype=dtype_name(computed_in),
        )
        # Beside the model, among what is unfinished: what a process that dies leaves is replaced by the next.
        place = beside(pruned, "speed")
        results = benchmark(directory, pruned, settings, out=place, force=True, on_progress=output.note)
        shutil.rmtree(place)
        [measurement] = results["measurements"]
        return {"workload": measurement["workload"], **measurement["metrics"][results["primary_metric"]]}

    asked = Comparison(
        model=checkpoint,
        name=model_name(directory),
        methods=chosen,
        sparsities=sparsities,
        pruning=PruneSettings(
            sparsity=sparsities[0],
            calibration=parse_sources(calibration or []),
            num_samples=samples,
            seq_len=length,
            align=align,
            attention_removals=None,
            device=picked_device,
            dtype=computed_in,
            seed=seed,
            evopress_budget=evopress_budget.value,
        ),
        evaluation=EvaluationSettings(
            texts=tuple(map(parse_text, text or ())),
            num_windows=windows,
            seq_len=length,
            tasks=tuple(requests),
            limit=limit,
            chat_template=chat_template,
            device=picked_device,
            dtype=computed_in,
        ),
        measure_speed=measure_speed if speed else None,
    )
    read = [*asked.pruning.input_files, *asked.evaluation.input_files]
    check_output_directory(out, force=force, inputs=[directory, *read])
    with output.telling_what_stays(), unfinished_parts(out, force=force, resume=resume) as work:
        document = compare_methods(asked, work, progress=output.progress)
        with new_directory(out, force=force) as partial:
            save_comparison(asked, document, work, partial)
    output.result({"directory": str(out), **document.content()}, lambda console: _show(console, out, document))


def _sparsities(given: str) -> list[float]:
    try:
        sparsities = sorted({float(each) for each in given.split(",")})
    except ValueError as error:
        raise SenteiError(f"--sparsity {given!r} is not understood.", "Write 0.25, or 0.25,0.375,0.5.") from error
    if outside := [each for each in sparsities if not 0 < each < 1]:
        raise SenteiError(f"--sparsity {outside[0]:g} is outside (0, 1).", "Write 0.25, or 0.25,0.375,0.5.")
    if len(sparsities) > MAX_SPARSITIES:
        raise SenteiError(f"--sparsity asks for more than {MAX_SPARSITIES} sizes.", "Give fewer.")
    return check_sparsities("--sparsity", sparsities)


def _show(console: Console, out: Path, document: "ComparisonDocument") -> None:
    from toolchain.evaluate.method_comparison import notes, table

    headers, rows = table(document)
    shown = Table(title=document.model, title_justify="left", box=None)
    for column, header in enumerate(headers):
        shown.add_column(header, justify="right" if column else "left")
    for row in rows:
        shown.add_row(*row)
    console.print(shown, soft_wrap=False)
    console.print(notes(document))
    console.print(f"{out}: comparison.json, comparison.md and every plan; sentei apply writes a model.")
