"""A person's own questions, as JSONL files hold them: with choices, or to be answered in the model's own words."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from toolchain.errors import SenteiError
from toolchain.json_files import read_json_lines
from toolchain.metrics.refusals import REFUSAL_PHRASES

_MOST_PHRASES, _LONGEST_PHRASE = 200, 200


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question and its possible answers.

    Attributes:
        prompt: What the model reads.
        choices: Continuations it compares.
        answer: Which of them is right.
        subject: What it is about, if the file says so.
    """

    prompt: str
    choices: tuple[str, ...]
    answer: int
    subject: str | None = None


@dataclass(frozen=True, kw_only=True)
class OpenQuestion:
    """A question that the model answers in its own words.

    Attributes:
        prompt: What the model reads.
        subject: What it is about, if the file says so.
        refusal_phrases: An answer that holds one of them is a refusal.
    """

    prompt: str
    subject: str | None = None
    refusal_phrases: tuple[str, ...] = REFUSAL_PHRASES


AnyQuestion = TypeVar("AnyQuestion", Question, OpenQuestion)


def load_questions(path: Path) -> list[Question]:
    """Reads a JSONL file with the fields ``prompt``, ``choices`` and ``answer`` (the index of the right choice).

    A line may also have a ``subject``.

    Raises:
        SenteiError: Missing or empty file, or a line that is not such a question.
    """
    return _load(path, _question)


def load_open_questions(path: Path) -> list[OpenQuestion]:
    """Reads a JSONL file with the field ``prompt``; a line may also have a ``subject`` and ``refusal_phrases``.

    Other fields are left alone, so the same file can hold choices for another metric.

    Raises:
        SenteiError: Missing or empty file, or a line that is not such a question.
    """
    return _load(path, _open_question)


def of_group(questions: Sequence[AnyQuestion], group: str, path: Path) -> list[AnyQuestion]:
    """The questions with that ``subject``.

    Raises:
        SenteiError: There is none in ``path``.
    """
    found = [each for each in questions if each.subject == group]
    if not found:
        known = ", ".join(sorted({each.subject for each in questions if each.subject})) or "none"
        raise SenteiError(
            f"{path}: no question has the subject {group!r}.",
            f'A group is the questions with that "subject"; there are: {known}.',
        )
    return found


def read_questions(path: Path) -> list[tuple[str, Any]]:
    """The lines of a file of questions that are not blank, each behind the words that name its place.

    Raises:
        SenteiError: There is no such file, nothing in it, or a line is not JSON.
    """
    if not path.is_file():
        raise SenteiError(f"File of questions {path} does not exist.")
    found = list(read_json_lines(path))
    if not found:
        raise SenteiError(f"{path} holds no question.")
    return found


def picked(choices: Sequence[str], log_likelihoods: Sequence[float]) -> int:
    """Which choice a model takes: the one with the highest log-likelihood per character; ties go to the first.

    The same as ``acc_norm`` of lm-eval.
    """
    scores = [total / len(choice) for total, choice in zip(log_likelihoods, choices, strict=True)]
    return scores.index(max(scores))


def _load(path: Path, read: Callable[[str, Any], AnyQuestion]) -> list[AnyQuestion]:
    return [read(where, raw) for where, raw in read_questions(path)]


def _question(where: str, raw: Any) -> Question:
    try:
        prompt, choices, answer = raw["prompt"], raw["choices"], raw["answer"]
    except (KeyError, TypeError) as error:
        raise SenteiError(f"{where} is not a JSON object with prompt, choices and answer.") from error
    prompt, subject = _prompt(where, prompt), _subject(where, raw)
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise SenteiError(f"{where}: choices must be a list of two texts or more.")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise SenteiError(f"{where}: answer must be an index of choices, 0 to {len(choices) - 1}.")
    return Question(prompt=prompt, choices=tuple(choices), answer=answer, subject=subject)


def _open_question(where: str, raw: Any) -> OpenQuestion:
    if not isinstance(raw, dict) or "prompt" not in raw:
        raise SenteiError(f"{where} is not a JSON object with a prompt.")
    prompt, subject = _prompt(where, raw["prompt"]), _subject(where, raw)
    if (phrases := raw.get("refusal_phrases")) is None:
        return OpenQuestion(prompt=prompt, subject=subject)
    good = isinstance(phrases, list) and 0 < len(phrases) <= _MOST_PHRASES
    if not good or not all(isinstance(each, str) and 0 < len(each.strip()) <= _LONGEST_PHRASE for each in phrases):
        raise SenteiError(
            f"{where}: refusal_phrases must be a list of 1 to {_MOST_PHRASES} texts of at most {_LONGEST_PHRASE} "
            "characters.",
            "Leave it out to use sentei's own list.",
        )
    return OpenQuestion(prompt=prompt, subject=subject, refusal_phrases=tuple(phrases))


def _prompt(where: str, prompt: Any) -> str:
    if not isinstance(prompt, str) or not prompt.strip():
        raise SenteiError(f"{where}: prompt must be a text.")
    return prompt


def _subject(where: str, raw: dict[str, Any]) -> str | None:
    subject = raw.get("subject")
    if subject is not None and not isinstance(subject, str):
        raise SenteiError(f"{where}: subject must be a text.")
    return subject
