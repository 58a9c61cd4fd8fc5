"""What got worse, by how much, and where: from two models' answers to the comparisons of ``evaluation.json``."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from toolchain.evaluate.document import (
    Change,
    MeanScore,
    Share,
    SubjectComparison,
    TaskComparison,
    WorseQuestion,
)
from toolchain.significance import (
    Difference,
    compare_mean_of_means,
    compare_means,
    compare_shares,
    holm,
    mcnemar,
    verdict,
    wilson_interval,
)

NUM_WORST = 10
# Of e, near what a float64 holds.
_LARGEST_EXPONENT = 700
Questions = Sequence[Mapping[str, Any]]


def share(scores: Sequence[float]) -> Share:
    """The mean of scores with its 95 % interval."""
    value, num_right = fmean(scores), sum(score == 1 for score in scores)
    if set(scores) <= {0.0, 1.0}:
        low, high = wilson_interval(num_right, len(scores))
        return Share(value=value, low=low, high=high)
    difference = compare_means(scores)
    return Share(value=value, low=difference.low, high=difference.high)


def mean_within(values: Sequence[float], lowest: float, highest: float) -> Share:
    """The mean of measurements that lie within bounds, with its t-interval cut to them.

    The true mean lies within the bounds too, so what is cut off takes nothing from the interval's coverage.
    """
    found = compare_means(values)
    return Share(
        value=found.value,
        low=None if found.low is None else max(lowest, found.low),
        high=None if found.high is None else min(highest, found.high),
    )


def perplexity_ratio(original: Sequence[float], pruned: Sequence[float]) -> Change:
    """Of two perplexities, from the mean losses of the same windows in nats: ``exp`` of their mean difference."""
    found = compare_means([after - before for before, after in zip(original, pruned, strict=True)])
    low, high = found.low, found.high
    if high is not None and high > _LARGEST_EXPONENT:
        low = high = None  # two windows that differ much: the interval says nothing
    return Change(
        value=math.exp(found.value),
        low=None if low is None else math.exp(low),
        high=None if high is None else math.exp(high),
        p_value=found.p_value,
        test="paired t-test of the windows' mean losses",
        verdict=verdict(found, higher_is_better=False),
    )


def compare_task(task: str, metric: str, original: Questions, pruned: Questions) -> TaskComparison:
    """Of the same questions, in the same order."""
    before, after = _scores(original, metric), _scores(pruned, metric)
    lost, gained = _lost_and_gained(before, after)
    if set(before) | set(after) <= {0.0, 1.0}:
        found, test = compare_shares(lost=lost, gained=gained, num_questions=len(before)), "exact McNemar test"
    else:
        found = compare_means([b - a for a, b in zip(before, after, strict=True)])
        test = "paired t-test of the questions' scores"
    return TaskComparison(
        task=task,
        metric=metric,
        difference=change(found, test),
        lost=lost,
        gained=gained,
        worst_subjects=_worst_subjects(metric, original, pruned),
        worst_questions=_worst_questions(metric, original, pruned),
    )


def mean_score(tasks: Sequence[tuple[Sequence[float], Sequence[float]]]) -> MeanScore:
    """Over tasks, from each one's scores of original and pruned, a question each."""
    original = fmean(fmean(before) for before, _ in tasks)
    pruned = fmean(fmean(after) for _, after in tasks)
    differences = [[b - a for a, b in zip(*pair, strict=True)] for pair in tasks]
    return MeanScore(
        num_tasks=len(tasks),
        original=original,
        pruned=pruned,
        kept=pruned / original if original else None,
        difference=change(
            compare_mean_of_means(pruned - original, differences),
            "normal test of the mean of the tasks' paired differences",
        ),
    )


def change(found: Difference, test: str, *, higher_is_better: bool = True) -> Change:
    """A difference with its verdict."""
    return Change(
        value=found.value,
        low=found.low,
        high=found.high,
        p_value=found.p_value,
        test=test,
        verdict=verdict(found, higher_is_better=higher_is_better),
    )


def _scores(questions: Questions, metric: str) -> list[float]:
    return [question["scores"][metric] for question in questions]


def _lost_and_gained(before: Sequence[float], after: Sequence[float]) -> tuple[int, int]:
    pairs = list(zip(before, after, strict=True))
    return sum(b < a for a, b in pairs), sum(b > a for a, b in pairs)


def _worst_subjects(metric: str, original: Questions, pruned: Questions) -> list[SubjectComparison]:
    by_subject: dict[str, list[tuple[float, float]]] = {}
    for before, after in zip(original, pruned, strict=True):
        if before["subject"] is not None:
            by_subject.setdefault(before["subject"], []).append((before["scores"][metric], after["scores"][metric]))
    counts = {subject: _lost_and_gained(*zip(*pairs, strict=True)) for subject, pairs in by_subject.items()}
    p_values = holm([mcnemar(lost=lost, gained=gained) for lost, gained in counts.values()])
    subjects = [
        SubjectComparison(
            subject=subject,
            num_questions=len(pairs),
            original=fmean(before for before, _ in pairs),
            pruned=fmean(after for _, after in pairs),
            lost=counts[subject][0],
            gained=counts[subject][1],
            p_value=p_value,
        )
        for (subject, pairs), p_value in zip(by_subject.items(), p_values, strict=True)
    ]
    subjects.sort(key=lambda each: each.pruned - each.original)
    return [each for each in subjects if each.pruned < each.original][:NUM_WORST]


def _worst_questions(metric: str, original: Questions, pruned: Questions) -> list[WorseQuestion]:
    worse = []
    for before, after in zip(original, pruned, strict=True):
        answer = before["answer"]
        if after["scores"][metric] < before["scores"][metric] and before["choices"] and answer is not None:
            scores = [_choice_scores(question, metric) for question in (before, after)]
            worse.append(
                WorseQuestion(
                    id=before["id"],
                    subject=before["subject"],
                    question=before["question"],
                    right_choice=before["choices"][answer],
                    pruned_choice=after["choices"][scores[1].index(max(scores[1]))],
                    original_margin=_margin(scores[0], answer),
                    pruned_margin=_margin(scores[1], answer),
                )
            )
    worse.sort(key=lambda each: each.pruned_margin - each.original_margin)
    return worse[:NUM_WORST]


def _choice_scores(question: Mapping[str, Any], metric: str) -> list[float]:
    if metric != "acc_norm":
        return list(question["log_likelihoods"])
    return [total / len(choice) for total, choice in zip(question["log_likelihoods"], question["choices"], strict=True)]


def _margin(scores: Sequence[float], answer: int) -> float:
    return scores[answer] - max(score for place, score in enumerate(scores) if place != answer)
