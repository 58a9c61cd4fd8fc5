"""Every method at every size on one model: what is left of it, how long pruning took, and how fast the rest runs."""

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from toolchain.checkpoint.directory import Checkpoint
from toolchain.documents import check_document, read_document
from toolchain.errors import SenteiError
from toolchain.evaluate.document import Change, EvaluationDocument, overlap_warning
from toolchain.evaluate.method_comparison_document import (
    COMPARISON_FILE,
    AskedRecord,
    ComparisonDocument,
    MethodRow,
    OriginalRecord,
    SpeedRecord,
)
from toolchain.evaluate.run import EvaluationSettings, evaluate
from toolchain.outputs import write_text
from toolchain.parts_cache import Parts, digest_of
from toolchain.plan.plan import load_plan
from toolchain.plan.summary_document import PRUNING_SUMMARY_FILE, PruningSummary
from toolchain.progress import Progress, no_progress
from toolchain.prune.methods import METHODS
from toolchain.prune.pipeline import allocation_of, prune
from toolchain.prune.settings import PruneSettings
from toolchain.significance import check_statistics
from toolchain.text.sources import Text, text_files

TABLE_FILE = "comparison.md"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is compared, and how.

    Attributes:
        model: The unpruned model.
        name: What plans call it.
        methods: Names out of :data:`toolchain.prune.methods.METHODS`.
        sparsities: For each of them.
        pruning: What they share; its own method and sparsity are not used.
        evaluation: Of each pruned model, and of the original once.
        measure_speed: Measures a pruned model against the original; its result stands in the table as it is, with
            ``gain`` as in ``results.json``.
    """

    model: Checkpoint
    name: str
    methods: Sequence[str]
    sparsities: Sequence[float]
    pruning: PruneSettings
    evaluation: EvaluationSettings
    measure_speed: Callable[[Path], dict[str, Any]] | None = None


def compare_methods(asked: Comparison, work: Path, *, progress: Progress = no_progress) -> ComparisonDocument:
    """Prunes by each method to each sparsity and evaluates what is left, one cell after another.

    A cell that is finished is kept in ``work``, an interrupted one goes on where it was. Of each pruned model the plan
    and the evaluation stay, in ``work/plans``; the weights go. ``work`` may hold what other settings made: all in it is
    known by what it was made from.

    Args:
        asked: What is compared.
        work: Where cells are kept.
        progress: Told of all that goes on.

    Returns:
        The content of ``comparison.json``.

    Raises:
        SenteiError: Bad input; sparsities that a method cannot reach are found before anything is pruned.
    """
    cells = _cells(asked)
    for _, settings in cells:
        allocation_of(asked.model, settings)
    check_statistics("eval")
    parts = Parts(work)
    # Before anything is pruned: all that is wrong with texts and tasks is found here.
    original = evaluate(asked.model, None, asked.evaluation, parts, progress=progress)
    return ComparisonDocument(
        schema_version=1,
        kind="method_comparison",
        model=asked.name,
        settings=AskedRecord(**_identity(asked, asked.pruning)),
        original=OriginalRecord(num_parameters=asked.model.num_parameters, **_quality(original, "original")),
        rows=[_row(asked, work, parts, name, settings, progress) for name, settings in cells],
    )


def save_comparison(asked: Comparison, document: ComparisonDocument, work: Path, directory: Path) -> None:
    """Writes the comparison, its table and the plans into an existing directory."""
    write_text(directory / COMPARISON_FILE, document.to_json(indent=1, ensure_ascii=False))
    write_text(directory / TABLE_FILE, markdown(document))
    for name, settings in _cells(asked):
        kept = _kept_plan(asked, work, name, settings)
        shutil.copytree(kept, directory / "plans" / kept.name, dirs_exist_ok=True)


def _cells(asked: Comparison) -> list[tuple[str, PruneSettings]]:
    return [
        (name, replace(asked.pruning, sparsity=sparsity, **METHODS[name].settings))
        for sparsity in asked.sparsities
        for name in asked.methods
    ]


def _label(name: str, settings: PruneSettings) -> str:
    return f"{name}-{settings.sparsity:g}"


def _kept_plan(asked: Comparison, work: Path, name: str, settings: PruneSettings) -> Path:
    return work / "plans" / digest_of(_identity(asked, settings)) / _label(name, settings)


def _row(
    asked: Comparison, work: Path, parts: Parts, name: str, settings: PruneSettings, progress: Progress
) -> MethodRow:
    label = _label(name, settings)

    def titled(description: str, total: int) -> Any:
        return progress(f"{label}: {description}", total)

    def compute() -> dict[str, Any]:
        directory = work / "models" / digest_of(_pruning_identity(asked, settings)) / label
        kept = _kept_plan(asked, work, name, settings)
        if not directory.exists():
            directory.parent.mkdir(parents=True, exist_ok=True)
            prune(asked.model, directory, settings, model_name=asked.name, resume=True, progress=titled)
        summary = read_document(directory / PRUNING_SUMMARY_FILE, PruningSummary)
        evaluated = evaluate(directory, asked.model, asked.evaluation, parts, progress=titled)
        speed = asked.measure_speed(directory) if asked.measure_speed else None
        kept.mkdir(parents=True, exist_ok=True)
        load_plan(directory).save(kept)
        evaluated.save(kept)
        shutil.rmtree(directory)
        return _measured(name, settings, summary, evaluated, speed).model_dump()

    row = parts.get(label, _identity(asked, settings), compute)
    return check_document(row, f"{work}: {label}", MethodRow)


def _measured(
    name: str,
    settings: PruneSettings,
    summary: PruningSummary,
    evaluated: EvaluationDocument,
    speed: dict[str, Any] | None,
) -> MethodRow:
    return MethodRow(
        method=name,
        target_sparsity=settings.sparsity,
        sparsity=summary.sparsity,
        num_parameters=summary.pruned.num_parameters,
        num_block_parameters=summary.pruned.num_block_parameters,
        pruning_s=summary.duration_s,
        **_quality(evaluated, "pruned"),
        perplexity_ratio={each.text: each.perplexity_ratio for each in evaluated.text_comparisons},
        task_difference={each.task: each.difference for each in evaluated.task_comparisons},
        text_overlaps=evaluated.text_overlaps,
        mean_score=evaluated.mean_score,
        speed=None if speed is None else SpeedRecord(**speed),
    )


def _quality(evaluated: EvaluationDocument, side: str) -> dict[str, dict[str, float]]:
    return {
        "perplexity": {each.text: each.perplexity for each in evaluated.evaluations if each.model == side},
        "tasks": {each.task: each.score.value for each in evaluated.tasks if each.model == side},
    }


def _identity(asked: Comparison, settings: PruneSettings) -> dict[str, Any]:
    """All that a cell depends on. Files count by name, size and time."""
    files = _text_files(asked.evaluation.texts)
    files += [file for request in asked.evaluation.tasks for file in request.files]
    return {
        **_pruning_identity(asked, settings),
        "evaluation": _as_json(asdict(asked.evaluation)),
        "speed": asked.measure_speed is not None,
        "evaluation_files": _described(files),
    }


def _pruning_identity(asked: Comparison, settings: PruneSettings) -> dict[str, Any]:
    """All that a cell's pruned model depends on."""
    files = sorted(asked.model.directory.glob("*.safetensors"))
    files += _text_files(source.text for source in settings.calibration)
    return {"pruning": _as_json(asdict(settings)), "files": _described(files)}


def _text_files(texts: Iterable[Text]) -> list[Path]:
    return [file for text in texts if isinstance(text, Path) for file in text_files(text)]


def _described(files: Sequence[Path]) -> list[list[Any]]:
    if missing := [file for file in files if not file.is_file()]:
        raise SenteiError(f"{missing[0]} does not exist.")
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _as_json(settings: dict[str, Any]) -> Any:
    return json.loads(
        json.dumps(settings, default=lambda each: sorted(each) if isinstance(each, frozenset) else str(each))
    )


def table(document: ComparisonDocument) -> tuple[list[str], list[list[str]]]:
    """The comparison for people: headers, and a row for the original and for each method at each sparsity."""
    original = document.original
    texts, tasks = original.perplexity, original.tasks
    headers = ["method", "sparsity", "parameters", *texts, "times worse", *tasks, "pruning, s", "speed"]
    first = [f"{value:.2f}" for value in texts.values()], [f"{value:.1%}" for value in tasks.values()]
    rows = [["original", "", f"{original.num_parameters:,}", *first[0], "", *first[1], "", ""]]
    for row in document.rows:
        ratios = [row.perplexity_ratio[text].value for text in texts]
        rows.append(
            [
                row.method,
                f"{row.sparsity:.1%}",
                f"{row.num_parameters:,}",
                *(f"{row.perplexity[text]:.2f}" for text in texts),
                f"{geometric_mean(ratios):.2f}" if ratios else "",
                *(f"{row.tasks[task]:.1%}{_beyond_chance(row.task_difference[task])}" for task in tasks),
                f"{row.pruning_s:.0f}",
                _gain(row.speed) if row.speed else "",
            ]
        )
    used = [column for column, cells in enumerate(zip(*rows, strict=True)) if any(cells)]
    return [headers[column] for column in used], [[row[column] for column in used] for row in rows]


def markdown(document: ComparisonDocument) -> str:
    """The table as Markdown, and what its columns are."""
    headers, rows = table(document)
    lines = [headers, ["---"] * len(headers), *rows]
    return (
        f"# {document.model}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{notes(document)}\n"
    )


def notes(document: ComparisonDocument) -> str:
    """What the table's columns are, and a warning for each text that pruning had read."""
    overlaps = document.rows[0].text_overlaps
    return "\n\n".join([_NOTES, *(overlap_warning(each) for each in overlaps if each.share)])


_NOTES = (
    "Sparsity is the share of the decoder blocks' parameters that was removed. Texts: perplexity; times worse: against "
    "the original, geometric mean of the texts. Tasks: share of right answers; * differs from the original's by more "
    "than chance (5 %). Pruning: seconds, of the last run where one was interrupted. Speed: output tokens/s against "
    "the original's in Transformers, in turn, with the 95 % interval."
)


def _beyond_chance(difference: Change) -> str:
    return "" if difference.verdict == "no difference shown" else "*"


def _gain(speed: SpeedRecord) -> str:
    if (gain := speed.gain) is None:
        return "not measured"
    return f"{gain.value:.2f}x ({gain.low:.2f} to {gain.high:.2f})"
