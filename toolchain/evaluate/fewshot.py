"""Few-shot examples: how many stand before each question of a task, where they come from, and whether they can."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from toolchain.errors import SenteiError
from toolchain.evaluate.task_requests import TaskRequest
from toolchain.model.loading import said_in_a_sentence

if TYPE_CHECKING:
    from lm_eval.api.task import Task


def set_examples(request: TaskRequest, parts: Mapping[str, "Task"]) -> None:
    """Tells lm-eval's tasks how many examples to show. A task that is defined with none keeps none, as in lm-eval.

    Raises:
        SenteiError: There are fewer examples than asked for, an example has no right answer, or the only examples are
            the questions that are asked.
    """
    if request.num_fewshot is None:
        return
    for name, task in parts.items():
        if task.config.num_fewshot == 0:
            continue
        task.set_config(key="num_fewshot", value=request.num_fewshot)
        if request.num_fewshot:
            _check_examples(request, name, task)


def example_source(request: TaskRequest, parts: Mapping[str, "Task"]) -> str | None:
    """Where a task's examples come from: a file's name, or the hub's splits; ``None`` where none are shown."""
    shown = [task for task in parts.values() if task.config.num_fewshot]
    if not shown:
        return None
    if request.fewshot_file is not None:
        return request.fewshot_file.name
    return f"Hugging Face hub: {', '.join(sorted({_example_split(task) or 'its definition' for task in shown}))}"


def _check_examples(request: TaskRequest, name: str, task: Any) -> None:
    from lm_eval.api.task import ConfigurableTask

    asked = f"--num-fewshot {request.num_fewshot}: {request.label}"
    if not isinstance(task, ConfigurableTask):
        raise SenteiError(
            f"{asked} does not say where its examples come from ({name} is written in Python).",
            "Leave --num-fewshot out for this task.",
        )
    split, evaluated = _example_split(task), task.config.test_split or task.config.validation_split
    if split is not None and split == evaluated:
        raise SenteiError(
            f"{asked} has no examples but the questions that are asked ({name}, split {split!r}).",
            "Leave --num-fewshot out for this task.",
        )
    docs = list(task.fewshot_docs())
    _check_number(request, asked, name, task, docs)
    if request.fewshot_file is not None:
        for number, doc in enumerate(docs, 1):
            what = f"{request.fewshot_file}: example {number} cannot be shown with its answer"
            with said_in_a_sentence(what):
                answer = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
                num_choices = len(task.doc_to_choice(doc))
            if not (isinstance(answer, int) and 0 <= answer < num_choices):
                raise SenteiError(f"{what}: {answer!r} is not one of its {num_choices} choices.")


def _check_number(request: TaskRequest, asked: str, name: str, task: Any, docs: Sequence[Mapping[str, Any]]) -> None:
    from lm_eval.api.samplers import ContextSampler

    from toolchain.evaluate.subject_sampler import SubjectSampler

    assert request.num_fewshot is not None
    source = request.fewshot_file or name
    if isinstance(task.sampler, SubjectSampler):
        numbers = Counter(doc["subject"] for doc in docs)
        short = sorted({doc["subject"] for doc in task.eval_docs if numbers[doc["subject"]] < request.num_fewshot})
        if short:
            raise SenteiError(
                f"{asked} needs as many examples of each subject, and {source} has {numbers[short[0]]} of {short[0]}.",
                "Ask for fewer, or give more.",
            )
        return
    # lm-eval's drawing sampler takes one more where the question itself might be among them.
    one_more = type(task.sampler) is ContextSampler and task.fewshot_cfg.split == task.config.test_split
    if len(docs) < request.num_fewshot + one_more:
        needed = f"{request.num_fewshot + one_more} examples" + (" (lm-eval draws one more)" if one_more else "")
        raise SenteiError(f"{asked} needs {needed}, and {source} has {len(docs)}.", "Ask for fewer, or give more.")


def _example_split(task: Any) -> str | None:
    """The split that lm-eval draws examples from; ``None`` where the task's definition holds them."""
    from lm_eval.api.task import ConfigurableTask

    if not isinstance(task, ConfigurableTask):
        return None
    config = task.config
    if task.fewshot_cfg.split is not None:
        return str(task.fewshot_cfg.split)
    if task.fewshot_cfg.samples is not None:
        return None
    return str(config.training_split or config.validation_split or config.test_split)
