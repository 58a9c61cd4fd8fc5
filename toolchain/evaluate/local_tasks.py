"""What the task definitions in ``task_files/`` call: JSONL files in place of hub data sets.

The prompts are lm-eval's own, so that results compare with published ones. A data set has two splits: ``questions``,
which are asked, and ``examples``, which may stand before a question and are empty where no file was given for them.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.errors import SenteiError, reason_of
from toolchain.metrics.accuracy import split_prompt
from toolchain.metrics.questions import load_questions, picked, read_questions

if TYPE_CHECKING:
    from datasets import DatasetDict

TASK_FILES = Path(__file__).with_name("task_files")


def load_dataset(*, file: str, fewshot_file: str | None = None, fields: Sequence[str], **_: Any) -> "DatasetDict":
    """Reads a file of questions as lm-eval wants it.

    Args:
        file: JSONL, one question a line, in the form that the hub has it in.
        fewshot_file: Examples, in the same form.
        fields: What every question must have.

    Raises:
        SenteiError: Missing or empty file, a line without these fields, or an example that is also a question.
    """
    return _both(file, fewshot_file, lambda path: _read(path, fields), fields)


def load_hellaswag(*, file: str, fewshot_file: str | None = None, fields: Sequence[str], **_: Any) -> "DatasetDict":
    """Reads HellaSwag: as the hub has it (``activity_label``, ``ctx_a``, ``ctx_b``) or with all of it in ``context``.

    A ``context`` is ``activity: sentences. beginning``; the beginning, which lm-eval capitalises, is what follows the
    last full stop.

    Raises:
        SenteiError: See :func:`load_dataset`.
    """

    def read(path: Path) -> list[dict[str, Any]]:
        questions = _read(path, fields)
        for number, question in enumerate(questions, 1):
            if "ctx_a" in question:
                continue
            if not isinstance(question.get("context"), str):
                raise SenteiError(f"{path} question {number} has neither ctx_a nor context.")
            activity, _, rest = question["context"].partition(": ")
            sentences, stop, beginning = rest.rpartition(". ")
            question |= {"activity_label": activity, "ctx_a": f"{sentences}." if stop else beginning}
            question |= {"ctx_b": beginning if stop else ""}
        return questions

    return _both(file, fewshot_file, read, ["ctx_a", "ctx_b", *fields])


def load_user_questions(
    *, file: str, fewshot_file: str | None = None, chat_template: bool = False, **_: Any
) -> "DatasetDict":
    """Reads a person's own questions (:mod:`toolchain.metrics.questions`), with each choice as it follows the prompt.

    In a chat, a choice is the answer, and nothing joins it to the prompt.

    A line may also have a ``subject``, by which results are broken down.

    Raises:
        SenteiError: See :func:`toolchain.metrics.questions.load_questions`; or an example that is also a question.
    """

    def read(path: Path) -> list[dict[str, Any]]:
        rows = []
        for question in load_questions(path):
            parts = [split_prompt(question.prompt, choice) for choice in question.choices]
            rows.append(
                {
                    "context": parts[0][0],
                    "continuations": list(question.choices) if chat_template else [after for _, after in parts],
                    "choices": list(question.choices),
                    "answer": question.answer,
                    "subject": question.subject,
                }
            )
        return rows

    return _both(file, fewshot_file, read, ["context", "choices"])


def score_user_question(question: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """lm-eval's ``acc`` and ``acc_norm``, whose length is that of the choice without what joins it to the prompt."""
    totals = [log_likelihood for log_likelihood, _ in results]
    answers = {"acc": totals.index(max(totals)), "acc_norm": picked(question["choices"], totals)}
    return {name: float(answer == question["answer"]) for name, answer in answers.items()}


def _both(
    file: str,
    fewshot_file: str | None,
    read: Callable[[Path], list[dict[str, Any]]],
    fields: Sequence[str],
) -> "DatasetDict":
    """Questions and examples, of which none is the other's: the answer would stand in the prompt.

    ``fields`` tell a question from another.
    """
    questions, examples = read(Path(file)), read(Path(fewshot_file)) if fewshot_file else []
    asked = {_key(each, fields): number for number, each in enumerate(questions, 1)}
    shared = [
        (number, asked[_key(each, fields)]) for number, each in enumerate(examples, 1) if _key(each, fields) in asked
    ]
    if shared:
        raise SenteiError(
            f"{len(shared)} of the {len(examples)} examples in {fewshot_file} are also asked: example "
            f"{shared[0][0]} is question {shared[0][1]} of {file}.",
            "Give examples that are not asked.",
        )
    return _as_dataset(questions, examples)


def _key(question: Mapping[str, Any], fields: Sequence[str]) -> str:
    return json.dumps([question.get(field) for field in fields], sort_keys=True)


def _as_dataset(questions: list[dict[str, Any]], examples: list[dict[str, Any]]) -> "DatasetDict":
    from datasets import Dataset, DatasetDict

    try:
        return DatasetDict({"questions": Dataset.from_list(questions), "examples": Dataset.from_list(examples)})
    # Arrow's words for a column of several kinds, or a number of more than 64 bits.
    except (ValueError, TypeError, OverflowError, KeyError) as error:
        raise SenteiError(f"Questions differ in what their fields hold ({reason_of(error)}).") from error


def _is_text(value: Any) -> bool:
    """Whether a task can make something of a field: text, a number, texts, or ARC's texts with their labels."""
    if isinstance(value, dict):
        return all(isinstance(each, list) and _is_text(each) for each in value.values())
    if isinstance(value, list):
        return all(isinstance(each, str) for each in value)
    return isinstance(value, str) or type(value) is int


def _read(path: Path, fields: Sequence[str]) -> list[dict[str, Any]]:
    questions = []
    for where, question in read_questions(path):
        missing = [field for field in fields if not isinstance(question, dict) or field not in question]
        if missing:
            raise SenteiError(f"{where} has no field {missing[0]!r}.", f"Needed: {', '.join(fields)}.")
        if odd := [field for field in fields if not _is_text(question[field])]:
            raise SenteiError(f"{where}: field {odd[0]!r} holds neither text, a number, nor a list of texts.")
        questions.append(question)
    return questions
