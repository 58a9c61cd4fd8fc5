"""Tasks through lm-eval: its prompts, its model wrapper and its metrics, around a model that sentei loaded.

Only this module, lm_eval_model, fewshot and subject_sampler import lm-eval.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from toolchain.errors import MissingDependencyError, SenteiError
from toolchain.evaluate.fewshot import example_source, set_examples
from toolchain.evaluate.local_tasks import TASK_FILES
from toolchain.evaluate.task_requests import BatchSize, TaskRequest, local_task_names
from toolchain.model.loading import said_in_a_sentence
from toolchain.text.chat_template import ChatTemplate
from toolchain.text.chats import READ_ON, check_template

if TYPE_CHECKING:
    from lm_eval.api.task import Task

# Of lm-eval's metrics the one that is reported and tested, where a task has several.
_METRICS = ("acc_norm", "acc", "exact_match")


@dataclass(frozen=True, kw_only=True)
class LoadedTask:
    """A task with its questions.

    Attributes:
        label: See :class:`TaskRequest`.
        parts: lm-eval's tasks by name: one, or those of a group such as the hub's ``mmlu``.
        manager: What loaded them.
        num_fewshot: Examples that were asked for; ``None`` for as many as each part is defined with.
        fewshot_source: Where examples come from: a file's name, or splits of the hub; ``None`` without examples.
    """

    label: str
    parts: Mapping[str, "Task"]
    manager: Any
    num_fewshot: int | None = None
    fewshot_source: str | None = None

    @property
    def sha256(self) -> str:
        """Of its questions and prompts, and of what examples are drawn from where their number was asked for."""
        digest = hashlib.sha256()
        for name, task in self.parts.items():
            for doc in task.eval_docs:
                digest.update(json.dumps([name, doc, task.doc_to_text(doc)], sort_keys=True, default=str).encode())
            if self.num_fewshot is not None:
                examples = list(task.fewshot_docs()) if self.num_fewshot else []
                asked = ["examples", self.num_fewshot, examples]
                digest.update(json.dumps(asked, sort_keys=True, default=str).encode())
        return digest.hexdigest()

    def num_requests(self, limit: int | None) -> int:
        """How many log-likelihoods or generations will be asked for."""
        total = 0
        for task in self.parts.values():
            docs = list(task.eval_docs)[:limit]
            choices = task.config.output_type == "multiple_choice"
            total += sum(len(task.doc_to_choice(doc)) for doc in docs) if choices else len(docs)
        return total


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
        SenteiError: A bad file, an unknown task, or no hub; a task that cannot be judged question by question; or
            fewer examples than were asked for, or none but the questions themselves.
    """
    lm_eval_version()
    from datasets import disable_progress_bars
    from lm_eval.tasks import TaskManager

    disable_progress_bars()
    if request.file is not None:
        metadata = {"file": str(request.file), "chat_template": chat_template}
        if request.fewshot_file is not None:
            metadata["fewshot_file"] = str(request.fewshot_file)
        manager = TaskManager(include_path=str(TASK_FILES), include_defaults=False, metadata=metadata)
        # Arrow's own errors and lm-eval's have no common class.
        with said_in_a_sentence(f"{request.file} cannot be read as questions of {request.name}"):
            parts = manager.load([request.name])["tasks"]
        return _with_examples(request, parts, manager)
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
    return _with_examples(request, parts, manager)


def _with_examples(request: TaskRequest, parts: Mapping[str, "Task"], manager: Any) -> LoadedTask:
    set_examples(request, parts)
    return LoadedTask(
        label=request.label, parts=parts, manager=manager, num_fewshot=request.num_fewshot,
        fewshot_source=example_source(request, parts),
    )  # fmt: skip


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
    batch_size: BatchSize | None = None,
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
        batch_size: Requests that the model reads at a time; see
            :func:`toolchain.evaluate.lm_eval_model.pick_batch_size`.
        on_request: Called once a log-likelihood or generation, for progress.

    Returns:
        ``metric``, ``num_fewshot``, ``fewshot_source``, ``batch_size``, ``prompts_sha256`` (of all that was asked: it
        is equal for two models that were asked the same), ``num_cut`` (requests longer than the model's context, which
        lost their beginning) and ``questions``: one mapping each, with ``id``, ``hash``, ``subject``, ``question``,
        ``choices``, ``answer``, ``log_likelihoods`` and ``scores`` by metric.

    Raises:
        SenteiError: The task has no metric that is a number a question, a choice alone is longer than the model's
            context, or there is no chat template.
    """
    from lm_eval import simple_evaluate

    from toolchain.evaluate.lm_eval_model import ServedHFLM, pick_batch_size

    picked = pick_batch_size(batch_size, model.device)
    with _template_of(tokenizer) if chat_template else nullcontext() as template:
        lm = ServedHFLM(model, tokenizer, bos, template, on_request, picked)
        results = simple_evaluate(
            model=lm,
            tasks=list(task.parts.values()),
            limit=limit,
            bootstrap_iters=0,
            task_manager=task.manager,
            apply_chat_template=chat_template,
        )
    assert results is not None
    return {
        **_answers(task, results["samples"], chat_template=chat_template),
        "batch_size": picked,
        "num_cut": lm.num_cut,
    }


def _answers(
    task: LoadedTask, samples_by_part: Mapping[str, Sequence[Mapping[str, Any]]], *, chat_template: bool
) -> dict[str, Any]:
    """What :func:`run_task` returns of a task and its questions."""
    questions = _questions(task, samples_by_part, chat_template=chat_template)
    shared = shared_metrics(questions)
    known = [name for name in (*_METRICS, *shared) if name in shared]
    if not known:
        raise SenteiError(f"Task {task.label} has no metric that gives every question a number.")
    return {
        "metric": known[0],
        "num_fewshot": max(part.config.num_fewshot or 0 for part in task.parts.values()),
        "fewshot_source": task.fewshot_source,
        "prompts_sha256": _prompts_sha256(samples_by_part),
        "questions": questions,
    }


def _prompts_sha256(samples_by_part: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Of every prompt and choice, in the order of the parts and of their questions."""
    digest = hashlib.sha256()
    for name, samples in samples_by_part.items():
        for sample in sorted(samples, key=lambda each: each["doc_id"]):
            digest.update(json.dumps([name, sample["doc_id"], sample["arguments"]], default=str).encode())
    return digest.hexdigest()


def _template_of(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    check_template(tokenizer, "--chat-template takes")
    return ChatTemplate(tokenizer, now=READ_ON)


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
