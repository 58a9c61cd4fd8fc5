"""The report's part on quality beyond perplexity: what changed against the original, whether by chance, and where."""

from collections.abc import Sequence
from typing import Any

from serving.report_inputs import Source, fields_of
from toolchain.evaluation_document import Change, EvaluationDocument, GenerationComparison, Share, TaskComparison


def evaluation_view(sources: Sequence[Source]) -> list[dict[str, Any]]:
    """What the template prints for each evaluation that compared two models.

    Raises:
        SenteiError: A file does not follow the schema.
    """
    views = []
    for source in sources:
        with fields_of(source) as content:
            if content.get("text_comparisons") or content.get("task_comparisons"):
                views.append(_view(EvaluationDocument.model_validate(content)))
    return views


def _view(document: EvaluationDocument) -> dict[str, Any]:
    return {
        "texts": [
            {"text": each.text, **_change(each.perplexity_ratio, 1, ".3g"), "worst": each.worst_passages}
            for each in document.text_comparisons
        ],
        "tasks": [_task(document, each) for each in document.task_comparisons],
        "mean": _mean(document),
        "generation": _generation(document.generation) if document.generation else None,
        "samples": document.generation.samples if document.generation else [],
        "subjects": [(task.task, each) for task in document.task_comparisons for each in task.worst_subjects],
        "questions": [(task.task, each) for task in document.task_comparisons for each in task.worst_questions],
    }


def _task(document: EvaluationDocument, comparison: TaskComparison) -> dict[str, Any]:
    by_side = {each.model: each for each in document.tasks if each.task == comparison.task}
    pruned = by_side["pruned"]
    return {
        "task": comparison.task,
        "metric": f"{comparison.metric}, {pruned.num_fewshot} examples" if pruned.num_fewshot else comparison.metric,
        "num_questions": pruned.num_questions,
        "original": _share(by_side["original"].score),
        "pruned": _share(pruned.score),
        "lost": comparison.lost,
        "gained": comparison.gained,
        **_change(comparison.difference, 100, "+.1f"),
    }


def _mean(document: EvaluationDocument) -> dict[str, Any] | None:
    mean = document.mean_score
    if mean is None or mean.num_tasks < 2:
        return None
    return {
        "original": f"{100 * mean.original:.1f}",
        "pruned": f"{100 * mean.pruned:.1f}",
        "kept": f"{100 * mean.kept:.1f} %" if mean.kept is not None else "not known",
        **_change(mean.difference, 100, "+.1f"),
    }


def _generation(found: GenerationComparison) -> list[tuple[str, str]]:
    rows = [
        ("prompts", f"{found.num_prompts} of {found.prompt_tokens} tokens from {found.text}, continued greedily"),
        ("same next token along the original’s text", f"{_share(found.token_agreement)} %"),
        ("written alike", f"{found.common_prefix_tokens:.1f} of {found.max_new_tokens} tokens before they part"),
        ("KL divergence", f"{_share(found.kl_divergence, scale=1, form='.3g')} nats a token"),
    ]
    if found.repetition_original is not None and found.repetition_pruned is not None and found.repetition_change:
        before, after = 100 * found.repetition_original, 100 * found.repetition_pruned
        judged = _change(found.repetition_change, 100, "+.1f")
        rows.append(
            ("4-grams that repeat", f"{before:.1f} % → {after:.1f} % (p {judged['p_value']}: {judged['verdict']})")
        )
    for size in (1, 2):
        before, after = getattr(found, f"distinct_{size}_original"), getattr(found, f"distinct_{size}_pruned")
        if before is not None and after is not None:
            rows.append((f"distinct-{size}", f"{before:.3f} → {after:.3f}"))
    return rows


def _change(change: Change, scale: float, form: str) -> dict[str, str | None]:
    interval = None
    if change.low is not None and change.high is not None:
        interval = f"{_number(scale * change.low, form)} to {_number(scale * change.high, form)}"
    p_value = None
    if change.p_value is not None:
        p_value = "< 0.001" if change.p_value < 0.001 else f"{change.p_value:.3f}"
    return {
        "value": _number(scale * change.value, form),
        "interval": interval,
        "p_value": p_value,
        "verdict": change.verdict,
        "test": change.test,
    }


def _share(share: Share, *, scale: float = 100, form: str = ".1f") -> str:
    value = _number(scale * share.value, form)
    if share.low is None or share.high is None:
        return value
    return f"{value} ({_number(scale * share.low, form)} to {_number(scale * share.high, form)})"


def _number(value: float, form: str) -> str:
    return format(value, form).replace("-", "−")
