"""An evaluation for people, in 80 columns."""

from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from toolchain.evaluate.document import Change, EvaluationDocument, GenerationComparison, Share

_NUM_SHOWN = 5
_WIDTH = 80


def show_evaluation(console: Console, document: "EvaluationDocument") -> None:
    """Prints the document: results, what changed, and where it hurts."""
    for block in (
        _texts(document),
        _overlaps(document),
        _tasks(document),
        _metrics(document),
        _generation(document.generation),
        _where(document),
    ):
        if block:
            console.print("\n".join(line.rstrip() for line in block))


def _texts(document: "EvaluationDocument") -> list[str]:
    if not document.evaluations:
        return []
    if not document.text_comparisons:
        return [
            f"{each.directory}: perplexity {each.perplexity:.2f}{_error(each.standard_error)} on {each.text} "
            f"({each.num_windows} windows of {each.seq_len} tokens)"
            for each in document.evaluations
        ]
    lines = [_row("Perplexity", "original", "pruned", "times, 95 % interval", "p")]
    by_side = {(each.model, each.text): each for each in document.evaluations}
    for comparison in document.text_comparisons:
        original, pruned = (by_side[side, comparison.text].perplexity for side in ("original", "pruned"))
        lines.append(
            _row(
                comparison.text,
                f"{original:.2f}",
                f"{pruned:.2f}",
                _interval(comparison.perplexity_ratio, 1, ".3g"),
                _judged(comparison.perplexity_ratio),
            )
        )
    return lines


def _overlaps(document: "EvaluationDocument") -> list[str]:
    from toolchain.evaluate.document import overlap_warning

    lines: list[str] = []
    for overlap in document.text_overlaps:
        if overlap.share:
            lines += ["", overlap_warning(overlap)]
            for passage in overlap.passages[:_NUM_SHOWN]:
                head = f"{passage.number:>5}  {100 * passage.share:>5.1f} %  "
                lines.append(f"  {head}{_short(_one_line(passage.excerpt), _WIDTH - len(head) - 2)}")
    return lines


def _tasks(document: "EvaluationDocument") -> list[str]:
    if not document.tasks:
        return []
    by_side = {(each.model, each.task): each for each in document.tasks}
    if not document.task_comparisons:
        return [
            *(
                f"{each.task}: {each.metric} {_share(each.score)} of {each.num_questions} questions"
                for each in document.tasks
            ),
            *_asked(document),
            *_cut(document),
        ]
    lines = ["", _row("Score, %", "original", "pruned", "points, 95 % interval", "p")]
    for each in document.task_comparisons:
        before, after = (100 * by_side[side, each.task].score.value for side in ("original", "pruned"))
        count = by_side["pruned", each.task].num_questions
        lines.append(
            _row(
                f"{_short(each.task, 14)} ({count})",
                f"{before:.1f}",
                f"{after:.1f}",
                _interval(each.difference, 100, "+.1f"),
                _judged(each.difference),
            )
        )
    if document.mean_score is not None and document.mean_score.num_tasks > 1:
        mean = document.mean_score
        lines.append(
            _row(
                "mean",
                f"{100 * mean.original:.1f}",
                f"{100 * mean.pruned:.1f}",
                _interval(mean.difference, 100, "+.1f"),
                _judged(mean.difference),
            )
        )
        if mean.kept is not None:
            lines.append(f"{100 * mean.kept:.1f} % of the original's mean is kept.")
    return [*lines, *_asked(document), *_cut(document)]


def _metrics(document: "EvaluationDocument") -> list[str]:
    """Metrics of one's own questions; their names are too long for a row."""
    lines: list[str] = []
    compared = {each.metric: each for each in document.metric_comparisons}
    for each in document.metrics:
        if each.metric in compared and each.model == "original":
            continue
        better = "higher is better" if each.higher_is_better else "lower is better"
        lines += ["", f"{each.metric}: {each.num_questions} questions, %, {better}"]
        if (comparison := compared.get(each.metric)) is None:
            lines.append(f"  {each.directory}: {_share(each.score)}")
            continue
        before = next(one for one in document.metrics if (one.metric, one.model) == (each.metric, "original"))
        lines.append(
            f"  original {_share(before.score)} → pruned {_share(each.score)}: "
            f"{_interval(comparison.difference, 100, '+.1f')}  {_judged(comparison.difference)}"
        )
    return lines


def _asked(document: "EvaluationDocument") -> list[str]:
    """What to say of tasks whose prompts hold more than the question: their scores are others than without it."""
    lines = {
        f"{each.task}: {each.num_fewshot} {'example' if each.num_fewshot == 1 else 'examples'} before each question"
        + (f", from {each.fewshot_source}." if each.fewshot_source else ".")
        for each in document.tasks
        if each.num_fewshot
    }
    in_chat = ["Asked in the model's chat template."] if any(each.chat_template for each in document.tasks) else []
    return [*sorted(lines), *in_chat]


def _cut(document: "EvaluationDocument") -> list[str]:
    """What to say of tasks whose prompts the model cannot read whole."""
    found = {(each.task, each.num_cut): None for each in document.tasks if each.num_cut}
    return [
        f"{task}: {num_cut} prompts are longer than the model's context and lost their beginning."
        for task, num_cut in found
    ]


def _generation(found: "GenerationComparison | None") -> list[str]:
    if found is None:
        return []
    lines = [
        "",
        f"Generation, greedy, {found.num_prompts} prompts from {found.text}",
        f"  same next token   {100 * found.token_agreement.value:.1f} % along the original's text",
        f"  alike for         {found.common_prefix_tokens:.1f} of {found.max_new_tokens} tokens",
        f"  KL divergence     {found.kl_divergence.value:.3f} nats per token",
    ]
    if found.repetition_original is not None and found.repetition_pruned is not None:
        judged = f"  {_judged(found.repetition_change)}" if found.repetition_change else ""
        lines.append(
            f"  repetition        {100 * found.repetition_original:.1f} % → {100 * found.repetition_pruned:.1f} % "
            f"of 4-grams repeat{judged}"
        )
    if found.distinct_2_original is not None and found.distinct_2_pruned is not None:
        lines.append(f"  distinct-2        {found.distinct_2_original:.3f} → {found.distinct_2_pruned:.3f}")
    for sample in found.samples[:2]:
        lines += [
            "",
            *(
                f"  {name:<9} {_short(_one_line(text), _WIDTH - 12)}"
                for name, text in (
                    ("prompt", sample.prompt),
                    ("original", sample.original),
                    ("pruned", sample.pruned),
                )
            ),
        ]
    return lines


def _where(document: "EvaluationDocument") -> list[str]:
    lines: list[str] = []
    for task in document.task_comparisons:
        if task.worst_subjects:
            lines += ["", f"Worst subjects of {task.task}"]
            lines += [
                f"  {_short(each.subject, 34):<34}{100 * each.original:>6.1f} → {100 * each.pruned:>5.1f} %  "
                f"{each.lost} lost, {each.gained} gained of {each.num_questions}"
                for each in task.worst_subjects[:_NUM_SHOWN]
            ]
    questions = [(task.task, each) for task in document.task_comparisons for each in task.worst_questions[:2]]
    if questions:
        lines += ["", "Questions lost, with the right choice's lead in log-likelihood"]
        for name, each in questions:
            head = f"{each.original_margin:>+6.2f} → {each.pruned_margin:+.2f}  {name} {each.id}: "
            question = _short(_one_line(each.question), _WIDTH - len(head) - 2, end=True)
            lines.append(f"  {head}{question}")
    for text in document.text_comparisons:
        if text.worst_passages:
            lines += ["", f"Worst {text.worst_passages[0].unit}s of {text.text}, nats per token"]
            for passage in text.worst_passages[:_NUM_SHOWN]:
                head = f"{passage.number:>5}  {passage.original_loss:.2f} → {passage.pruned_loss:.2f}  "
                lines.append(f"  {head}{_short(_one_line(passage.excerpt), _WIDTH - len(head) - 2)}")
    return lines


def _row(name: str, original: str, pruned: str, interval: str, judged: str) -> str:
    return f"{_short(name, 20):<20}{original:>9}{pruned:>9}  {interval:<24}{judged}"


def _interval(change: "Change", scale: float, form: str) -> str:
    value = format(scale * change.value, form)
    if change.low is None or change.high is None:
        return value
    return f"{value} ({scale * change.low:{form}} to {scale * change.high:{form}})"


def _judged(change: "Change") -> str:
    if change.p_value is None:
        return "not tested"
    p_value = "<0.001" if change.p_value < 0.001 else f"{change.p_value:.3f}"
    return f"{p_value} {change.verdict if change.verdict != 'no difference shown' else 'not shown'}"


def _share(share: "Share") -> str:
    interval = "" if share.low is None or share.high is None else f" ({100 * share.low:.1f} to {100 * share.high:.1f})"
    return f"{100 * share.value:.1f} %{interval}"


def _error(standard_error: float | None) -> str:
    return "" if standard_error is None else f" ± {standard_error:.2f}"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _short(text: str, width: int, *, end: bool = False) -> str:
    """Cut to a width, at its beginning if its end tells more."""
    if len(text) <= width:
        return text
    return f"…{text[-width + 1 :]}" if end else f"{text[: width - 1]}…"
