"""What evaluations have kept of every window and every question, and what follows for a candidate."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from serving.decision.document import Interval
from toolchain.documents import Document, Record, read_document
from toolchain.errors import SenteiError
from toolchain.evaluate.comparison import share
from toolchain.evaluate.document import EVALUATION_FILE, Change, EvaluationDocument, Share, Side, TextResult
from toolchain.evaluate.metric_record import IntervalRecord
from toolchain.json_files import read_json_object
from toolchain.parts_cache import MOST_BYTES, read_losses
from toolchain.significance import Difference, compare_means, compare_shares

QUALITY_FILE = "engine_quality.json"


class AskedQuestion(Record):
    """One question: its ``subject``, if it has one, and the score of the answer, 1 if it was right."""

    subject: str | None
    score: float


class EngineQuality(Document):
    """``engine_quality.json``: a rounded export's answers, from the engine that serves it.

    ``perplexity`` is over the original's, by text; ``questions`` by the name of their file, in its order; ``metrics``
    by what :attr:`toolchain.metrics.question_metrics.QuestionMetric.label` calls them.
    """

    schema_version: Literal[1] = 1
    kind: Literal["engine_quality"] = "engine_quality"
    perplexity: dict[str, Interval]
    questions: dict[str, list[AskedQuestion]]
    metrics: dict[str, Interval] = Field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Quality:
    """The quality of one model.

    Attributes:
        perplexity: Over the original's, by text.
        seen: Share of each text that was read while the model was made.
        questions: All that were asked, in the order of the files.
        metrics: Of one's own questions, by label.
    """

    perplexity: Mapping[str, Interval]
    questions: Sequence[AskedQuestion]
    metrics: Mapping[str, Interval] = field(default_factory=dict)
    seen: Mapping[str, float] = field(default_factory=dict)


def quality_of(directory: Path, question_files: Sequence[str]) -> Quality:
    """Reads what an evaluation wrote, by ``sentei evaluate`` or by :mod:`serving.poc.engine_quality`.

    Args:
        directory: Of the evaluation.
        question_files: Names of the files of questions.

    Raises:
        SenteiError: Something is missing or damaged.
    """
    if (directory / QUALITY_FILE).is_file():
        found = read_document(directory / QUALITY_FILE, EngineQuality)
        return Quality(
            perplexity=found.perplexity,
            questions=[each for name in question_files for each in found.questions[name]],
            metrics=found.metrics,
        )
    document = read_document(directory / EVALUATION_FILE, EvaluationDocument)
    sides = {each.model for each in document.evaluations}
    # A smaller sibling is no pruned model, but stands in its place.
    side: Side = "pruned" if "pruned" in sides else "original"
    return Quality(
        perplexity={each.text: interval_of(each.perplexity_ratio) for each in document.text_comparisons},
        questions=[each for name in question_files for each in kept_questions(directory, side, name)],
        metrics={each.metric: interval_of(each.score) for each in document.metrics if each.model == side},
        # A text that both calibration and healing have read: the larger share counts.
        seen={each.text: each.share for each in sorted(document.text_overlaps, key=lambda each: each.share)},
    )


def interval_of(found: Change | Difference | IntervalRecord | Share) -> Interval:
    """A measured value with its interval, without its test."""
    return Interval(value=found.value, low=found.low, high=found.high)


def accuracy_of(questions: Sequence[AskedQuestion]) -> Interval | None:
    """The share of right answers with Wilson's interval; ``None`` if nothing was asked."""
    if not questions:
        return None
    return interval_of(share([each.score for each in questions]))


def groups_of(questions: Sequence[AskedQuestion]) -> dict[str, Interval]:
    """The same for each subject."""
    by_subject: dict[str, list[AskedQuestion]] = {}
    for each in questions:
        if each.subject is not None:
            by_subject.setdefault(each.subject, []).append(each)
    return {name: found for name, asked in by_subject.items() if (found := accuracy_of(asked))}


def accuracy_change(original: Sequence[AskedQuestion], candidate: Sequence[AskedQuestion]) -> Interval | None:
    """The candidate's share minus the original's, from the same questions."""
    if not original or len(original) != len(candidate):
        return None
    pairs = [(before.score, after.score) for before, after in zip(original, candidate, strict=True)]
    if {score for pair in pairs for score in pair} <= {0.0, 1.0}:
        lost, gained = sum(b > a for b, a in pairs), sum(a > b for b, a in pairs)
        found = compare_shares(lost=lost, gained=gained, num_questions=len(pairs))
    else:
        found = compare_means([after - before for before, after in pairs])
    return interval_of(found)


def kept_questions(evaluation: Path, side: Side, file: str) -> list[AskedQuestion]:
    """The answers to one file of questions.

    Raises:
        SenteiError: The evaluation does not hold them.
    """
    _, result = _kept(evaluation, side, lambda identity: identity.get("task") == file, file)
    metric = result["metric"]
    return [AskedQuestion(subject=each["subject"], score=each["scores"][metric]) for each in result["questions"]]


def kept_losses(evaluation: Path, text: TextResult, *, num_tokens: int | None = None) -> list[float]:
    """The mean loss of each window of a text that a model was evaluated on, in nats per token.

    Args:
        evaluation: Its directory.
        text: What the evaluation says of the model and the text.
        num_tokens: How many of each window's tokens count, from the first that has a loss; ``None`` for all.

    Raises:
        SenteiError: The evaluation does not hold them.
    """
    path, _ = _kept(evaluation, text.model, lambda identity: identity.get("text_sha256") == text.text_sha256, text.text)
    losses = read_losses(path, (text.num_windows, text.seq_len - 1))
    means: list[float] = losses[:, :num_tokens].mean(axis=1, dtype=np.float64).tolist()
    return means


def _kept(evaluation: Path, side: Side, belongs: Any, what: str) -> tuple[Path, dict[str, Any]]:
    """The part whose identity belongs to what is asked for: its file and its result."""
    for path in sorted((evaluation / "parts").glob(f"{side}-*.json")):
        part = read_json_object(path, max_bytes=MOST_BYTES)
        if belongs(part.get("identity", {})):
            try:
                return path, dict(part["result"])
            except (KeyError, TypeError, ValueError) as error:
                raise SenteiError(f"{path} does not have the fields it should (result).") from error
    raise SenteiError(f"{evaluation} does not hold the answers of the {side} model to {what}.", "Evaluate anew.")
