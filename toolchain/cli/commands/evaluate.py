"""``sentei evaluate``."""

import shutil
from pathlib import Path
from typing import Annotated

import typer

from toolchain.cli.console import Output, compute_dtype, pick_device, window_length
from toolchain.cli.evaluation_tables import show_evaluation
from toolchain.cli.options import (
    COMPUTING,
    SEQ_LEN,
    AnyModelArgument,
    DtypeInPanelOption,
    ForceOption,
    JsonOption,
    QuietOption,
    SpreadDeviceOption,
    against_option,
    chat_template_option,
    limit_option,
    offload_option,
    out_option,
    questions_option,
    resume_option,
    seq_len_option,
    task_option,
    text_option,
    windows_option,
)
from toolchain.errors import SenteiError
from toolchain.outputs import writes_directory

_DEFAULT_GENERATIONS = 16
_TEXT, _TASKS = "Text", "Tasks"


@writes_directory
def evaluate(
    model: AnyModelArgument,
    *,
    against: Annotated[str | None, against_option("The original: what got worse, and is it chance?")] = None,
    out: Annotated[Path | None, out_option("Directory for evaluation.json; finished parts are kept.")] = None,
    resume: Annotated[bool, resume_option("evaluation")] = False,
    text: Annotated[
        list[str] | None,
        text_option(
            "Perplexity on .txt, .jsonl or .parquet (field text, or messages: chats), a directory of them, or "
            "hub:NAME:CONFIG:SPLIT; several times.",
            panel=_TEXT,
        ),
    ] = None,
    windows: Annotated[int | None, windows_option(panel=_TEXT)] = None,
    seq_len: Annotated[int | None, seq_len_option(more="; they do not overlap", panel=_TEXT)] = None,
    generations: Annotated[
        int | None,
        typer.Option(
            min=0,
            help=f"Prompts from the first text that both models continue (--against: {_DEFAULT_GENERATIONS}).",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        task_option(
            "One of lm-eval's tasks, from FILE.jsonl or, without it, from the hub; several times.", panel=_TASKS
        ),
    ] = None,
    questions: Annotated[
        list[Path] | None,
        questions_option('Your own, one {"prompt", "choices", "answer"} per line; several times.', panel=_TASKS),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND:FILE",
            help="As in sentei prune: accuracy:FILE, f1:FILE#class=TEXT, refusal_rate:FILE#wanted=refusals or "
            "valid_json:FILE, all take group=NAME too; several times.",
            rich_help_panel=_TASKS,
        ),
    ] = None,
    limit: Annotated[int | None, limit_option(panel=_TASKS)] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Examples with answers before each question; without it, as many as the task is defined with.",
            rich_help_panel=_TASKS,
        ),
    ] = None,
    fewshot: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FILE",
            help="Examples for a task or questions from a file, in the same form; NAME is what results call it.",
            rich_help_panel=_TASKS,
        ),
    ] = None,
    chat_template: Annotated[
        bool, chat_template_option("tasks and questions", "--apply-chat-template", panel=_TASKS)
    ] = False,
    batch_size: Annotated[
        str | None,
        typer.Option(
            metavar="N|auto",
            help="Prompts per batch (16); auto: as many as fit the GPU.",
            rich_help_panel=_TASKS,
        ),
    ] = None,
    device: SpreadDeviceOption = "auto",
    dtype: DtypeInPanelOption = "auto",
    offload: Annotated[
        bool,
        offload_option("One layer in memory at a time; perplexity only.", panel=COMPUTING),
    ] = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure quality: perplexity, tasks, your questions and generation, alone or against the original."""
    output = Output(as_json=as_json, quiet=quiet)
    from toolchain.checkpoint.directory import open_checkpoint, resolve_model
    from toolchain.evaluate.own_metrics import parse_metrics
    from toolchain.evaluate.run import EvaluationSettings
    from toolchain.evaluate.run import evaluate as run
    from toolchain.evaluate.task_requests import parse_batch_size, parse_requests
    from toolchain.metrics.question_metrics import cost_in_words
    from toolchain.outputs import check_output_directory, new_directory
    from toolchain.parts_cache import Parts, unfinished_parts
    from toolchain.text.sources import parse_text

    requests = parse_requests(task or [], questions or [], num_fewshot=num_fewshot, fewshot=fewshot or [])
    asked_metrics = parse_metrics(metric or [])
    for each in asked_metrics:
        if cost := cost_in_words(each):
            output.note(cost)
    requests_at_a_time = None if batch_size is None else parse_batch_size(batch_size)
    if generations is None:
        generations = _DEFAULT_GENERATIONS if against and text and not offload else 0
    if resume and out is None:
        raise SenteiError("--resume needs --out: finished parts are kept beside it.")
    directory, original = resolve_model(model), None if against is None else resolve_model(against)
    picked_device, checkpoint = pick_device(device), open_checkpoint(directory)
    settings = EvaluationSettings(
        texts=tuple(map(parse_text, text or ())),
        num_windows=windows,
        seq_len=window_length(output, checkpoint, seq_len, SEQ_LEN),
        tasks=tuple(requests),
        metrics=tuple(asked_metrics),
        limit=limit,
        chat_template=chat_template,
        batch_size=requests_at_a_time,
        num_generations=generations,
        device=picked_device,
        dtype=compute_dtype(dtype, picked_device, checkpoint.dtype),
        offload=offload,
        spread=device == "auto" and picked_device == "cuda" and not offload,
    )
    if out is None:
        document = run(checkpoint, original, settings, Parts(None), progress=output.progress)
    else:
        models = [directory] if original is None else [directory, original]
        check_output_directory(out, force=force, inputs=[*models, *settings.input_files])
        with output.telling_what_stays(), unfinished_parts(out, force=force, resume=resume) as work:
            document = run(checkpoint, original, settings, Parts(work), progress=output.progress)
            with new_directory(out, force=force) as partial:
                document.save(partial)
                shutil.copytree(work, partial / "parts", ignore=shutil.ignore_patterns("*.partial"))
    output.result(document.model_dump(), lambda console: show_evaluation(console, document))
