"""Tasks through lm-eval: its prompts, its model wrapper and its metrics, around a model that sentei loaded.

Only this module and lm_eval_model import lm-eval.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from toolchain.errors import MissingDependencyError, SenteiError
from toolchain.evaluate.local_tasks import TASK_FILES
from toolchain.model.loading import said_in_a_sentence
from toolchain.text.chat_template import ChatTemplate
from toolchain.text.chats import check_template

if TYPE_CHECKING:
    from lm_eval.api.task import Task

USER_QUESTIONS = "questions"
# Of lm-eval's metrics the one that is reported and tested, where a task has several.
_METRICS = ("acc_norm", "acc", "exact_match")


@dataclass(frozen=True, kw_only=True)
class TaskRequest:
    """A task somebody asked for.

    Attributes:
        name: Of the task; :data:`USER_QUESTIONS` for a person's own.
        file: The questions, or ``None`` to download them from the hub.
    """

    name: str
    file: Path | None

    @property
    def label(self) -> str:
        """What it is called in results."""
        return self.file.name if self.name == USER_QUESTIONS and self.file else self.name


@dataclass(frozen=True, kw_only=True)
class LoadedTask:
    """A task with its questions.

    Attributes:
        label: See :class:`TaskRequest`.
        parts: lm-eval's tasks by name: one, or those of a group such as the hub's ``mmlu``.
        manager: What loaded them.
    """

    label: str
    parts: Mapping[str, "Task"]
    manager: Any

    @property
    def sha256(self) -> str:
        """Of its questions and prompts."""
        digest = hashlib.sha256()
        for name, task in self.parts.items():
            for doc in task.eval_docs:
                digest.update(json.dumps([name, doc, task.doc_to_text(doc)], sort_keys=True, default=str).encode())
        return digest.hexdigest()

    def num_requests(self, limit: int | None) -> int:
        """How many log-likelihoods or generations will be asked for."""
        total = 0
        for task in self.parts.values():
            docs = list(task.eval_docs)[:limit]
            choices = task.config.output_type == "multiple_choice"
            total += sum(len(task.doc_to_choice(doc)) for doc in docs) if choices else len(docs)
        return total


def local_task_names() -> list[str]:
    """Tasks that can be read from a file."""
    return sorted(path.stem for path in TASK_FILES.glob("*.yaml") if path.stem != USER_QUESTIONS)


def parse_task(asked: str) -> TaskRequest:
    """Reads ``NAME=FILE``, or ``NAME`` for a task of the hub.

    Raises:
        SenteiError: A file for a task without a local definition, or an empty one.
    """
    name, separator, file = asked.partition("=")
    if separator and name not in local_task_names():
        raise SenteiError(
            f"--task {asked}: {name!r} cannot be read from a file.",
            f"Use one of {', '.join(local_task_names())}, or --questions FILE for questions of your own.",
        )
    if separator and not file.strip():
        raise SenteiError(f"--task {asked}: the file is empty.", f"Write --task {name}=FILE.jsonl.")
    return TaskRequest(name=name, file=Path(file) if separator else None)


def parse_requests(tasks: Sequence[str], questions: Sequence[Path]) -> list[TaskRequest]:
    """What ``--task`` and ``--questions`` ask for; see :func:`parse_task`."""
    return [*map(parse_task, tasks), *(TaskRequest(name=USER_QUESTIONS, file=each) for each in questions)]


def lm_eval_version() -> str:
    """The version of lm-eval.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError("lm-eval, which runs tasks,", "eval") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return version("lm_eval")


def load_task(request: TaskRequest, *, chat_template: bool = False) -> LoadedTask:
    """Loads the questions, from the file or from the hub.

    Args:
        request: What to load.
        chat_template: It will be asked through a chat template.

    Raises:
        MissingDependencyError: lm-eval is not installed.
        SenteiError: A bad file, an unknown task, or no hub; or a task that cannot be judged question by question.
    """
    lm_eval_version()
    from datasets import disable_progress_bars
    from lm_eval.tasks import TaskManager

    disable_progress_bars()
    if request.file is not None:
        metadata = {"file": str(request.file), "chat_template": chat_template}
        manager = TaskManager(include_path=str(TASK_FILES), include_defaults=False, metadata=metadata)
        # Arrow's own errors and lm-eval's have no common class.
        with said_in_a_sentence(f"{request.file} cannot be read as questions of {request.name}"):
            parts = manager.load([request.name])["tasks"]
        return LoadedTask(label=request.label, parts=parts, manager=manager)
    manager = TaskManager()
    if request.name not in manager.all_tasks:
        raise SenteiError(f"--task {request.name}: lm-eval has no such task.", "lm_eval ls tasks lists them.")
    try:
        parts = manager.load([request.name])["tasks"]
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SenteiError(
            f"--task {request.name}: its questions could not be downloaded ({reason}).",
            f"Give a file: --task {request.name}=FILE.jsonl." if request.name in local_task_names() else "",
        ) from error
    _check_questions(request.name, parts)
    return LoadedTask(label=request.label, parts=parts, manager=manager)


def _check_questions(name: str, parts: Mapping[str, "Task"]) -> None:
    """Refuses what would give no number a question, or numbers that mean different things, before it is computed."""
    for part, task in parts.items():
        if task.OUTPUT_TYPE == "loglikelihood_rolling":
            raise SenteiError(
                f"--task {name}: {part} is perplexity on a text, not questions.",
                "Measure perplexity with --text, as in --text hub:NAME:CONFIG:SPLIT.",
            )
    metrics = {part: set(task.aggregation()) for part, task in parts.items()}
    if not set.intersection(*metrics.values()):
        first = next(iter(metrics))
        other = next((part for part in metrics if not metrics[part] & metrics[first]), first)
        raise SenteiError(
            f"--task {name}: its tasks have no metric in common, such as {first} ({', '.join(sorted(metrics[first]))}) "
            f"and {other} ({', '.join(sorted(metrics[other]))}).",
            "Give them one by one, each with --task.",
        )


def run_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: LoadedTask,
    *,
    limit: int | None,
    bos: int | None = None,
    chat_template: bool = False,
    on_request: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Asks a model all questions.

    Args:
        model: Pruned or not.
        tokenizer: Its own.
        task: From :func:`load_task`.
        limit: The first so many questions; of each of a group's tasks.
        bos: What each question begins with, see :func:`toolchain.model.loading.bos_of`.
        chat_template: Ask through the model's chat template, which then says what a question begins with.
        on_request: Called once a log-likelihood or generation, for progress.

    Returns:
        ``metric``, ``num_fewshot``, ``num_cut`` (requests longer than the model's context, which lost their beginning)
        and ``questions``: one mapping each, with ``id``, ``hash``, ``subject``, ``question``, ``choices``, ``answer``,
        ``log_likelihoods`` and ``scores`` by metric.

    Raises:
        SenteiError: The task has no metric that is a number a question, a choice alone is longer than the model's
            context, or there is no chat template.
    """
    from lm_eval import simple_evaluate

    from toolchain.evaluate.lm_eval_model import ServedHFLM

    with _template_of(tokenizer) if chat_template else nullcontext() as template:
        lm = ServedHFLM(model, tokenizer, bos, template, on_request)
        results = simple_evaluate(
            model=lm,
            tasks=list(task.parts.values()),
            limit=limit,
            bootstrap_iters=0,
            task_manager=task.manager,
            apply_chat_template=chat_template,
        )
    assert results is not None
    questions = _questions(task, results["samples"], chat_template=chat_template)
    shared = shared_metrics(questions)
    known = [name for name in (*_METRICS, *shared) if name in shared]
    if not known:
        raise SenteiError(f"Task {task.label} has no metric that gives every question a number.")
    fewshot = {part.config.num_fewshot or 0 for part in task.parts.values()}
    return {"metric": known[0], "num_fewshot": max(fewshot), "num_cut": lm.num_cut, "questions": questions}


def _template_of(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    check_template(tokenizer, "--chat-template takes")
    return ChatTemplate(tokenizer)


def _questions(
    task: LoadedTask, samples_by_part: Mapping[str, Sequence[Mapping[str, Any]]], *, chat_template: bool
) -> list[dict[str, Any]]:
    """Every question of a task, in the order of its parts and of their documents."""
    questions = []
    for name, samples in samples_by_part.items():
        part = task.parts[name]
        subject = (part.config.task_alias or name) if len(task.parts) > 1 else None
        # A task that reads its answers in several ways has a sample for each; the first is the one it is known by.
        counted = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
        found = [_question(part, sample, subject) for sample in sorted(counted, key=lambda each: each["doc_id"])]
        if chat_template:
            # What the template puts around a question would hide it.
            for question, sample in zip(found, sorted(counted, key=lambda each: each["doc_id"]), strict=True):
                if isinstance(text := part.doc_to_text(sample["doc"]), str):
                    question["question"] = text
        questions += found
    return questions


def shared_metrics(questions: Sequence[Mapping[str, Any]]) -> list[str]:
    """The metrics that every question has a number for."""
    return [name for name in questions[0]["scores"] if all(name in question["scores"] for question in questions)]


def _question(task: "Task", sample: Mapping[str, Any], subject: str | None) -> dict[str, Any]:
    contexts, continuations = zip(*(arguments[:2] for arguments in sample["arguments"]), strict=True)
    # Tasks such as WinoGrande score one continuation after several contexts: those are what the model chooses from.
    several = len(set(contexts)) > 1
    is_choice = task.config.output_type == "multiple_choice"
    answer = task.doc_to_text(sample["doc"]) if several else sample["target"]
    return {
        "id": sample["doc_id"],
        "hash": sample["doc_hash"],
        "subject": subject or sample["doc"].get("subject"),
        "question": f"… {continuations[0].strip()}" if several else contexts[0],
        "choices": [each.strip() for each in (contexts if several else continuations)] if is_choice else [],
        "answer": answer if isinstance(answer, int) else None,
        "log_likelihoods": [float(response[0]) for response in sample["filtered_resps"]] if is_choice else [],
        "scores": {name: float(sample[name]) for name in sample["metrics"] if isinstance(sample[name], int | float)},
    }
