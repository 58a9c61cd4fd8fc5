"""``--metric``: the metrics of a person's own questions (:mod:`toolchain.metrics.question_metrics`), model by model."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from toolchain.errors import SenteiError
from toolchain.evaluate.comparison import change
from toolchain.evaluate.document import MetricComparison, MetricResult, Share, Side
from toolchain.metrics.accuracy import ChoicesMetric
from toolchain.metrics.choose import metric_of_questions
from toolchain.metrics.question_metrics import Outcome, QuestionMetric, check_distinct, parse_question_metric
from toolchain.metrics.token_metrics import finite
from toolchain.metrics.written import WrittenMetric
from toolchain.model.layer_walk import LayerWalk
from toolchain.significance import Difference, compare_means, compare_shares


@dataclass(frozen=True, kw_only=True)
class OwnMetric:
    """A metric with its questions, as one model reads them."""

    asked: QuestionMetric
    measure: ChoicesMetric | WrittenMetric
    chat_template: bool


def parse_metrics(asked: Sequence[str]) -> list[QuestionMetric]:
    """What ``--metric`` asks for.

    Raises:
        SenteiError: A metric of another kind, a bad one, or two of one name.
    """
    found = []
    for each in asked:
        if (metric := parse_question_metric(each)) is None:
            raise SenteiError(
                f"--metric {each!r} is no metric of questions.",
                "Use accuracy, f1, refusal_rate or valid_json with a file, as in accuracy:FILE.jsonl. Perplexity is "
                "measured with --text.",
            )
        found.append(metric)
    check_distinct(found)
    return found


def load_metric(
    asked: QuestionMetric, tokenizer: PreTrainedTokenizerBase, *, longest: int, bos: int | None, chat_template: bool
) -> OwnMetric:
    """Reads its questions; see :func:`toolchain.metrics.choose.metric_of_questions`.

    Raises:
        SenteiError: A bad file, a question that is too long, or no chat template.
    """
    measure = metric_of_questions(
        asked, tokenizer, seq_len=longest, longest=longest, bos=bos, chat_template=chat_template
    )
    return OwnMetric(asked=asked, measure=measure, chat_template=chat_template)


@torch.inference_mode()
def ask(metric: OwnMetric, walk: LayerWalk, on_question: Callable[[], None]) -> dict[str, Any]:
    """Asks a model all questions.

    Returns:
        ``outcomes``, one a question, ``duration_s``, and ``answers`` as far as the model writes them.

    Raises:
        SenteiError: What the model computes is NaN or Inf.
    """
    started = time.monotonic()
    if isinstance(metric.measure, WrittenMetric):
        found = metric.measure.answers(walk.model, on_question)
        result: dict[str, Any] = {
            "outcomes": [outcome for outcome, _ in found], "answers": [text for _, text in found]
        }  # fmt: skip
    else:
        result = {"outcomes": _choose(metric.measure, walk)}
        for _ in result["outcomes"]:
            on_question()
    return {**result, "duration_s": round(time.monotonic() - started, 1)}


def _choose(metric: ChoicesMetric, walk: LayerWalk) -> list[Outcome]:
    parts, first = [], 0
    for block in walk.blocks(metric.ids):
        parts.append(metric.log_likelihoods(walk, walk.forward(walk.embed(block)), first))
        first += len(block)
    totals = torch.cat(parts)
    finite(float(totals.sum()), metric.name, walk)
    return metric.outcomes(totals)


def result_of(metric: OwnMetric, side: Side, directory: str, bos: int | None, found: dict[str, Any]) -> MetricResult:
    """What :func:`ask` returned, for ``evaluation.json``."""
    asked, outcomes = metric.asked, found["outcomes"]
    low, high = asked.interval(outcomes)
    return MetricResult(
        model=side, directory=directory, metric=asked.label, source=asked.file.name,
        questions_sha256=str(metric.measure.source_sha256), higher_is_better=asked.higher_is_better,
        num_questions=len(outcomes), num_counted=sum(each is not None for each in outcomes),
        max_new_tokens=asked.tokens or None, bos=None if metric.chat_template else bos,
        chat_template=metric.chat_template, score=Share(value=asked.value(outcomes), low=low, high=high),
        duration_s=found["duration_s"],
    )  # fmt: skip


def compare(asked: QuestionMetric, before: Sequence[Outcome], after: Sequence[Outcome]) -> MetricComparison:
    """Of two models' outcomes of the same questions, in the same order."""
    if asked.kind == "f1":
        found, test = _compare_f1(asked, before, after), "paired t-test of jackknife values of the questions"
    else:
        lost, gained = _one_way(before, after, True), _one_way(before, after, False)
        found, test = compare_shares(lost=lost, gained=gained, num_questions=len(before)), "exact McNemar test"
    good = asked.higher_is_better
    return MetricComparison(
        metric=asked.label,
        difference=change(found, test, higher_is_better=good),
        lost=_one_way(before, after, good),
        gained=_one_way(before, after, not good),
    )


def _one_way(before: Sequence[Outcome], after: Sequence[Outcome], first: bool) -> int:
    """Questions that count as ``first`` for the one and not for the other; what does not count is no mistake."""
    pairs = [(each is not False, other is not False) for each, other in zip(before, after, strict=True)]
    return sum(one is first and other is not first for one, other in pairs)


def _compare_f1(asked: QuestionMetric, before: Sequence[Outcome], after: Sequence[Outcome]) -> Difference:
    """The difference of two F1, its error by the jackknife over questions (Quenouille 1956, Tukey 1958)."""
    whole, count = asked.value(after) - asked.value(before), len(before)
    values = []
    for left_out in range(count):
        sides = [[*each[:left_out], *each[left_out + 1 :]] for each in (before, after)]
        if any(all(outcome is None for outcome in side) for side in sides):
            return Difference(value=whole, low=None, high=None, p_value=None)
        values.append(count * whole - (count - 1) * (asked.value(sides[1]) - asked.value(sides[0])))
    center = fmean(values)
    return compare_means([whole + value - center for value in values])
