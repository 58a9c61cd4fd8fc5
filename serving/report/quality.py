"""The report's part on quality beyond perplexity: what changed against the original, whether by chance, and where."""

from collections.abc import Sequence
from typing import Any

from serving.report.translate import Say
from serving.saved_json import Source, fields_of
from toolchain.evaluate.document import (
    Change,
    EvaluationDocument,
    GenerationComparison,
    MetricComparison,
    Share,
    TaskComparison,
    TaskResult,
)


def evaluation_view(sources: Sequence[Source], say: Say) -> list[dict[str, Any]]:
    """What the template prints for each evaluation that compared two models.

    Raises:
        SenteiError: A file does not follow the schema.
    """
    views = []
    for source in sources:
        with fields_of(source) as content:
            if any(content.get(f"{kind}_comparisons") for kind in ("text", "task", "metric")):
                views.append(_view(EvaluationDocument.model_validate(content), say))
    return views


def _view(document: EvaluationDocument, say: Say) -> dict[str, Any]:
    tasks = [
        *(_task(document, each, say) for each in document.task_comparisons),
        *(_metric(document, each, say) for each in document.metric_comparisons),
    ]
    mean = _mean(document, say)
    return {
        "texts": [
            {"text": each.text, **_change(each.perplexity_ratio, 1, ".3g", say), "worst": each.worst_passages}
            for each in document.text_comparisons
        ],
        "tasks": tasks,
        "tests": ", ".join(dict.fromkeys(say(each["test"]) for each in (*tasks, *([mean] if mean else [])))),
        "mean": mean,
        "generation": _generation(document.generation, say) if document.generation else None,
        "samples": document.generation.samples if document.generation else [],
        "subjects": [(task.task, each) for task in document.task_comparisons for each in task.worst_subjects],
        "questions": [(task.task, each) for task in document.task_comparisons for each in task.worst_questions],
    }


def _task(document: EvaluationDocument, comparison: TaskComparison, say: Say) -> dict[str, Any]:
    by_side = {each.model: each for each in document.tasks if each.task == comparison.task}
    pruned = by_side["pruned"]
    return {
        "task": comparison.task,
        "metric": ", ".join([comparison.metric, *_asked(pruned, say)]),
        "num_questions": pruned.num_questions,
        "original": _share(by_side["original"].score, say),
        "pruned": _share(pruned.score, say),
        "lost": comparison.lost,
        "gained": comparison.gained,
        **_change(comparison.difference, 100, "+.1f", say),
    }


def _metric(document: EvaluationDocument, comparison: MetricComparison, say: Say) -> dict[str, Any]:
    """A metric of one's own questions, as a row among the tasks."""
    by_side = {each.model: each for each in document.metrics if each.metric == comparison.metric}
    pruned = by_side["pruned"]
    kind, _, rest = comparison.metric.partition(":")
    narrowed = rest.removeprefix(pruned.source).removeprefix("#")
    asked = [kind, narrowed, say("in the chat template") if pruned.chat_template else ""]
    return {
        "task": pruned.source,
        "metric": ", ".join(each for each in asked if each),
        "num_questions": pruned.num_questions,
        "original": _share(by_side["original"].score, say),
        "pruned": _share(pruned.score, say),
        "lost": comparison.lost,
        "gained": comparison.gained,
        **_change(comparison.difference, 100, "+.1f", say),
    }


def _asked(task: TaskResult, say: Say) -> list[str]:
    """What a prompt holds beside the question; with it, scores are others than without."""
    examples = [say("%(count)s examples", count=task.num_fewshot)] if task.num_fewshot else []
    return [*examples, *([say("in the chat template")] if task.chat_template else [])]


def _mean(document: EvaluationDocument, say: Say) -> dict[str, Any] | None:
    mean = document.mean_score
    if mean is None or mean.num_tasks < 2:
        return None
    asked = {", ".join(_asked(task, say)) for task in document.tasks}
    return {
        # Two evaluations on one page may have asked in two ways.
        "asked": asked.pop() if len(asked) == 1 else "",
        "original": f"{100 * mean.original:.1f}",
        "pruned": f"{100 * mean.pruned:.1f}",
        "kept": f"{100 * mean.kept:.1f} %" if mean.kept is not None else say("not known"),
        **_change(mean.difference, 100, "+.1f", say),
    }


def _generation(found: GenerationComparison, say: Say) -> list[tuple[str, str]]:
    prompts = say(
        "%(count)s of %(tokens)s tokens from %(text)s, continued greedily",
        count=found.num_prompts, tokens=found.prompt_tokens, text=found.text,
    )  # fmt: skip
    alike = say(
        "%(prefix)s of %(all)s tokens before they part",
        prefix=f"{found.common_prefix_tokens:.1f}", all=found.max_new_tokens,
    )  # fmt: skip
    divergence = _share(found.kl_divergence, say, scale=1, form=".3g")
    rows = [
        (say("prompts"), prompts),
        (say("same next token along the original’s text"), f"{_share(found.token_agreement, say)} %"),
        (say("written alike"), alike),
        (say("KL divergence"), say("%(value)s nats per token", value=divergence)),
    ]
    if found.repetition_original is not None and found.repetition_pruned is not None and found.repetition_change:
        before, after = 100 * found.repetition_original, 100 * found.repetition_pruned
        judged = _change(found.repetition_change, 100, "+.1f", say)
        verdict = say(str(judged["verdict"]))
        p_value = f"p {judged['p_value']}: " if judged["p_value"] else ""
        rows.append((say("4-grams that repeat"), f"{before:.1f} % → {after:.1f} % ({p_value}{verdict})"))
    for size in (1, 2):
        before, after = getattr(found, f"distinct_{size}_original"), getattr(found, f"distinct_{size}_pruned")
        if before is not None and after is not None:
            rows.append((f"distinct-{size}", f"{before:.3f} → {after:.3f}"))
    return rows


def _change(change: Change, scale: float, form: str, say: Say) -> dict[str, str | None]:
    interval = None
    if change.low is not None and change.high is not None:
        interval = _range(scale * change.low, scale * change.high, form, say)
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


def _share(share: Share, say: Say, *, scale: float = 100, form: str = ".1f") -> str:
    value = _number(scale * share.value, form)
    if share.low is None or share.high is None:
        return value
    return f"{value} ({_range(scale * share.low, scale * share.high, form, say)})"


def _range(low: float, high: float, form: str, say: Say) -> str:
    return say("%(low)s to %(high)s", low=_number(low, form), high=_number(high, form))


def _number(value: float, form: str) -> str:
    return format(value, form).replace("-", "−")
