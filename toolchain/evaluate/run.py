"""An evaluation from beginning to end: texts, tasks and generation, of one model or of two side by side."""

import gc
import hashlib
import json
import math
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from toolchain.checkpoint.directory import Checkpoint, dtype_name, model_name, opened
from toolchain.errors import SenteiError
from toolchain.evaluate import writing as damage
from toolchain.evaluate.comparison import (
    NUM_WORST,
    change,
    compare_task,
    mean_score,
    mean_within,
    perplexity_ratio,
    share,
)
from toolchain.evaluate.document import (
    EvaluationDocument,
    GenerationComparison,
    MetricComparison,
    MetricResult,
    Sample,
    Side,
    TaskComparison,
    TaskResult,
    TextComparison,
    TextResult,
    WorsePassage,
)
from toolchain.evaluate.lm_eval_tasks import (
    LoadedTask,
    lm_eval_version,
    load_task,
    run_task,
    shared_metrics,
)
from toolchain.evaluate.own_metrics import OwnMetric, ask, compare, load_metric, result_of
from toolchain.evaluate.task_requests import BatchSize, TaskRequest
from toolchain.evaluate.text_overlap import find_overlap, text_hashes
from toolchain.metrics.perplexity import summarise_losses, token_losses
from toolchain.metrics.question_metrics import QuestionMetric
from toolchain.model.context_length import check_window, context_length
from toolchain.model.disk_layers import open_walk
from toolchain.model.layer_walk import LayerWalk
from toolchain.model.loading import bos_of, check_same_vocabulary, load_tokenizer
from toolchain.model.several_gpus import device_map_for
from toolchain.parts_cache import Parts
from toolchain.progress import Progress, no_progress
from toolchain.significance import check_statistics, compare_means
from toolchain.text.chats import chat_prompts, check_template
from toolchain.text.passages import number_passages, worst_passages
from toolchain.text.sources import Text, local_paths, text_name
from toolchain.text.windows import TokenWindows, begin_with, load_windows

_NUM_SAMPLES = 4
# What was measured on a text, and the loss of each token, float32 [num_windows, seq_len - 1].
_Reading = tuple[dict[str, Any], NDArray[np.float32]]


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """What is measured, and how.

    Attributes:
        texts: For perplexity.
        num_windows: Of each text; ``None`` for all there are.
        seq_len: Tokens a window.
        tasks: For lm-eval.
        metrics: Of one's own questions.
        limit: The first so many questions of each task; ``None`` for all.
        chat_template: Ask tasks and metrics through the model's chat template, as chats among the texts go anyway.
        batch_size: Requests of a task that the model reads at a time; ``None`` for the default.
        num_generations: Prompts from the first text that both models continue; 0 for none.
        device: Computed on.
        dtype: Computed in.
        offload: One layer in memory at a time; texts only.
        spread: A model that the first GPU cannot hold goes to all of them.
    """

    texts: tuple[Text, ...]
    num_windows: int | None
    seq_len: int
    tasks: tuple[TaskRequest, ...] = ()
    metrics: tuple[QuestionMetric, ...] = ()
    limit: int | None = None
    chat_template: bool = False
    batch_size: BatchSize | None = None
    num_generations: int = 0
    device: str
    dtype: torch.dtype
    offload: bool = False
    spread: bool = False

    @property
    def input_files(self) -> list[Path]:
        """Files and directories that texts and questions are read from."""
        asked = [*(file for task in self.tasks for file in task.files), *(each.file for each in self.metrics)]
        return [*local_paths(self.texts), *asked]


class _Model:
    """A model under evaluation; loaded when it is first needed."""

    def __init__(self, checkpoint: Checkpoint, side: Side, settings: EvaluationSettings) -> None:
        self.checkpoint, self.side, self._settings = checkpoint, side, settings
        self.name = model_name(checkpoint.directory)
        self.tokenizer = load_tokenizer(checkpoint.directory)
        self.bos = bos_of(checkpoint.family, self.tokenizer)
        self.identity = _identity(checkpoint, settings)
        self._device_map = device_map_for(checkpoint, settings.dtype) if settings.spread else None
        self._walk: LayerWalk | None = None

    @property
    def walk(self) -> LayerWalk:
        if self._walk is None:
            settings = self._settings
            self._walk = open_walk(
                self.checkpoint, dtype=settings.dtype, device=settings.device, offload=settings.offload,
                device_map=self._device_map,
            )  # fmt: skip
        return self._walk

    def unload(self) -> None:
        self._walk = None
        gc.collect()
        torch.cuda.empty_cache()  # accelerate counts what is free


def evaluate(
    model: Path | Checkpoint,
    against: Path | Checkpoint | None,
    settings: EvaluationSettings,
    parts: Parts,
    *,
    progress: Progress = no_progress,
) -> EvaluationDocument:
    """Measures a model, and the original before it where one is given. One model is in memory at a time.

    Args:
        model: The model, pruned or not: its directory, or opened already.
        against: The original, likewise.
        settings: What is measured.
        parts: Keeps what is finished.
        progress: Opened once a part.

    Raises:
        MissingDependencyError: lm-eval or scipy is needed and not there.
        SenteiError: Bad input; all of it is found before a model is loaded.
    """
    _check(settings, against)
    models = _open_models(model, against, settings)
    tasks = [load_task(request, chat_template=settings.chat_template) for request in settings.tasks]
    metrics = [[_load_metric(side, each, settings) for each in settings.metrics] for side in models]
    tokenizer = models[-1].tokenizer
    texts = _load_texts(models[-1], settings)
    _check_same_reading(models, chats=settings.chat_template or any(text.windows.holds_chats for text in texts))
    read_before = text_hashes(models[-1].checkpoint.directory)
    generation = _Generation(texts[0], models, settings, parts) if settings.num_generations else None
    readings: list[list[_Reading]] = []
    answers: list[list[dict[str, Any]]] = []
    outcomes: list[list[dict[str, Any]]] = []
    for side, own in zip(models, metrics, strict=True):
        readings.append([_read_text(side, text.windows, parts, progress) for text in texts])
        answers.append([_ask(side, task, settings, parts, progress) for task in tasks])
        outcomes.append([_ask_metric(side, each, parts, progress) for each in own])
        if generation is not None:
            generation.visit(side, progress)
        side.unload()
    compared = against is not None
    return EvaluationDocument(
        evaluations=_text_results(models, texts, readings),
        tasks=_task_results(models, settings, answers),
        metrics=_metric_results(models, metrics, outcomes),
        text_comparisons=_compare_texts(texts, readings, tokenizer) if compared else [],
        text_overlaps=[
            found
            for text in texts
            for seen_in, hashes in read_before.items()
            if (found := find_overlap(text.source, text.windows, tokenizer, seen_in, hashes)) is not None
        ],
        task_comparisons=_compare_tasks(settings.tasks, answers) if compared else [],
        metric_comparisons=_compare_metrics(settings.metrics, outcomes) if compared else [],
        mean_score=_mean_score(answers) if compared and tasks else None,
        generation=generation.result if generation is not None else None,
        dtype=dtype_name(settings.dtype),
        versions=_versions(bool(tasks)),
    )


def _open_models(
    model: Path | Checkpoint, against: Path | Checkpoint | None, settings: EvaluationSettings
) -> list[_Model]:
    """The original, if one is given, then the model; neither is loaded yet.

    Raises:
        SenteiError: One of them cannot read the windows, or has no chat template where that is asked for; or their
            vocabularies differ.
    """
    checkpoints = [opened(each) for each in (against, model) if each is not None]
    sides: list[Side] = ["original", "pruned"] if against else ["pruned" if checkpoints[0].is_pruned else "original"]
    if settings.texts:
        for each in checkpoints:
            check_window(each.directory, each.config, settings.seq_len)
    models = [_Model(checkpoint, side, settings) for checkpoint, side in zip(checkpoints, sides, strict=True)]
    if against is not None:
        check_same_vocabulary(checkpoints[1], checkpoints[0], [each.tokenizer for each in models])
    if settings.chat_template:
        for opened_model in models:
            check_template(opened_model.tokenizer, "--chat-template takes")
    return models


def _check_same_reading(models: Sequence[_Model], *, chats: bool) -> None:
    """Checks that two models read the same tokens, so that what differs is the models'.

    Raises:
        SenteiError: One begins texts with another token, or has another chat template where that is used.
    """
    names = [
        "no token" if model.bos is None else f"token {model.bos} ({model.tokenizer.convert_ids_to_tokens(model.bos)})"
        for model in models
    ]
    first, last = models[0], models[-1]
    if first.bos != last.bos:
        raise SenteiError(
            f"{first.name} is served with {names[0]} before each text, and {last.name} with {names[-1]}, by their "
            "tokenizers: they would not read the same.",
            "Give both the original's tokenizer.json and tokenizer_config.json.",
        )
    if chats and first.tokenizer.chat_template != last.tokenizer.chat_template:
        raise SenteiError(
            f"{first.name} and {last.name} have different chat templates: they would not read the same.",
            "Give both the original's chat_template.jinja and tokenizer_config.json.",
        )


@dataclass(frozen=True, kw_only=True)
class _Text:
    """A text that perplexity is taken on: where it comes from, and its windows."""

    source: Text
    windows: TokenWindows


def _load_texts(model: _Model, settings: EvaluationSettings) -> list[_Text]:
    return [
        _Text(
            source=source,
            windows=load_windows(
                source, model.tokenizer, num_samples=settings.num_windows, seq_len=settings.seq_len, bos=model.bos
            ),
        )
        for source in settings.texts
    ]


def _check(settings: EvaluationSettings, against: Path | Checkpoint | None) -> None:
    if not settings.texts and not settings.tasks and not settings.metrics:
        raise SenteiError("There is nothing to evaluate on.", "Give --text, --task, --questions or --metric.")
    if settings.chat_template and not settings.tasks and not settings.metrics:
        raise SenteiError(
            "--chat-template is for tasks and questions, and there are none.",
            "Leave it out: chats in a text (field messages) go through the chat template by themselves.",
        )
    if settings.batch_size is not None and not settings.tasks:
        raise SenteiError("--batch-size is for tasks and questions, and there are none.", "Leave it out.")
    if settings.offload and settings.tasks:
        raise SenteiError(
            "--offload measures perplexity only: lm-eval's tasks need the whole model in memory.",
            "Leave out --task and --questions, or --offload.",
        )
    if settings.offload and settings.metrics:
        raise SenteiError("--offload measures perplexity only: --metric needs the whole model in memory.")
    if settings.offload and settings.num_generations:
        raise SenteiError("--offload measures perplexity only: generation needs the whole model in memory.")
    if settings.num_generations and (against is None or not settings.texts):
        raise SenteiError(
            "--generations compares what two models write.", "Give --against, and --text for the prompts."
        )
    if settings.limit is not None and settings.limit < 1:
        raise SenteiError(f"--limit {settings.limit} makes no sense.", "Use at least 1.")
    labels = [request.label for request in settings.tasks]
    names = [text_name(text) for text in settings.texts]
    for kind, given in (("task", labels), ("text", names)):
        if repeated := {each for each in given if given.count(each) > 1}:
            raise SenteiError(f"Two of the {kind}s are called {min(repeated)}.", "Rename one of the files.")
    if against is not None or settings.metrics:
        check_statistics("eval")


def _read_text(model: _Model, windows: TokenWindows, parts: Parts, progress: Progress) -> _Reading:
    def compute() -> _Reading:
        started = time.monotonic()
        with progress(f"{windows.source}, {model.side}", len(windows.ids)) as advance:
            losses = token_losses(model.walk, windows.ids, on_window=advance)
        measured = asdict(summarise_losses(losses, model.walk))
        return {**measured, "duration_s": round(time.monotonic() - started, 1)}, losses.numpy()

    num_windows, seq_len = windows.ids.shape
    identity = {**model.identity, "text_sha256": windows.sha256, "shape": [num_windows, seq_len]}
    return parts.get_with_losses(f"{model.side}-{windows.source}", identity, compute, (num_windows, seq_len - 1))


def _ask(
    model: _Model, task: LoadedTask, settings: EvaluationSettings, parts: Parts, progress: Progress
) -> dict[str, Any]:
    def compute() -> dict[str, Any]:
        started = time.monotonic()
        with progress(f"{task.label}, {model.side}", task.num_requests(settings.limit)) as advance:
            result = run_task(
                model.walk.model, model.tokenizer, task, limit=settings.limit, bos=model.bos,
                chat_template=settings.chat_template, batch_size=settings.batch_size, on_request=advance,
            )  # fmt: skip
        return {**result, "duration_s": round(time.monotonic() - started, 1)}

    identity = {**model.identity, "task": task.label, "questions": task.sha256, "limit": settings.limit}
    if settings.chat_template:
        identity["chat_template"] = hashlib.sha256(str(model.tokenizer.chat_template).encode()).hexdigest()
    if settings.batch_size is not None:
        identity["batch_size"] = settings.batch_size
    return parts.get(f"{model.side}-{task.label}", {**identity, "lm_eval": lm_eval_version()}, compute)


def _load_metric(model: _Model, asked: QuestionMetric, settings: EvaluationSettings) -> OwnMetric:
    longest = context_length(model.checkpoint.config).extended
    return load_metric(asked, model.tokenizer, longest=longest, bos=model.bos, chat_template=settings.chat_template)


def _ask_metric(model: _Model, metric: OwnMetric, parts: Parts, progress: Progress) -> dict[str, Any]:
    def compute() -> dict[str, Any]:
        with progress(f"{metric.asked.label}, {model.side}", metric.measure.num_questions) as advance:
            return ask(metric, model.walk, advance)

    identity = {**model.identity, "metric": metric.asked.label, "questions": metric.measure.source_sha256}
    identity["bos"] = model.bos
    if metric.chat_template:
        identity["chat_template"] = hashlib.sha256(str(model.tokenizer.chat_template).encode()).hexdigest()
    return parts.get(f"{model.side}-{metric.asked.kind}-{metric.asked.file.name}", identity, compute)


class _Generation:
    """Compares what both models write; the original's part is held in memory until the pruned model was asked."""

    def __init__(self, text: _Text, models: Sequence[_Model], settings: EvaluationSettings, parts: Parts) -> None:
        self._windows, self._parts = text.windows, parts
        self._prompts = _prompts(text, models, settings.num_generations)
        self._identity = {
            "models": [model.identity for model in models],
            "prompts": [prompt.tolist() for prompt in self._prompts],
            "max_new_tokens": damage.NEW_TOKENS,
        }
        self._reference: damage.Reference | None = None
        self._started = 0.0
        self.result: GenerationComparison | None = None

    def visit(self, model: _Model, progress: Progress) -> None:
        """Called with the original, then with the pruned model."""
        name = f"generation-{self._windows.source}"
        if model.side == "original":
            if not self._parts.known(name, self._identity):
                self._started = time.monotonic()
                with progress("generation, original", 1) as advance:
                    self._reference = damage.describe_original(model.walk.model, self._prompts)
                    advance()
            return
        found = self._parts.get(name, self._identity, lambda: self._compare(model, progress))
        self.result = GenerationComparison.model_validate(found)

    def _compare(self, model: _Model, progress: Progress) -> dict[str, Any]:
        reference = self._reference
        assert reference is not None
        with progress("generation, pruned", 1) as advance:
            written = damage.continue_greedily(model.walk.model, self._prompts)
            along = damage.next_token_log_probabilities(model.walk.model, self._prompts, reference.continuations)
            advance()
        pairs = list(zip(reference.log_probabilities, along, strict=True))
        both = (reference.continuations, written)
        repeated = [[damage.repetition(each) for each in side] for side in both]
        known = [(a, b) for a, b in zip(*repeated, strict=True) if a is not None and b is not None]
        change_ = compare_means([b - a for a, b in known]) if known else None
        return GenerationComparison(
            text=self._windows.source,
            num_prompts=len(self._prompts),
            prompt_tokens=max(len(self._without_bos(prompt)) for prompt in self._prompts),
            max_new_tokens=damage.NEW_TOKENS,
            repetition_original=fmean(a for a, _ in known) if known else None,
            repetition_pruned=fmean(b for _, b in known) if known else None,
            repetition_change=change(change_, "paired t-test of the continuations", higher_is_better=False)
            if change_
            else None,
            distinct_1_original=damage.distinct(both[0], 1),
            distinct_1_pruned=damage.distinct(both[1], 1),
            distinct_2_original=damage.distinct(both[0], 2),
            distinct_2_pruned=damage.distinct(both[1], 2),
            token_agreement=mean_within([damage.agreement(*pair) for pair in pairs], 0.0, 1.0),
            kl_divergence=mean_within([damage.divergence(*pair) for pair in pairs], 0.0, math.inf),
            common_prefix_tokens=fmean(damage.common_prefix(a, b) for a, b in zip(*both, strict=True)),
            samples=[
                Sample(
                    prompt=model.tokenizer.decode(self._without_bos(prompt)),
                    original=model.tokenizer.decode(before, skip_special_tokens=True),
                    pruned=model.tokenizer.decode(after, skip_special_tokens=True),
                )
                for prompt, before, after in list(zip(self._prompts, *both, strict=True))[:_NUM_SAMPLES]
            ],
            duration_s=round(time.monotonic() - self._started, 1),
        ).model_dump()

    def _without_bos(self, prompt: torch.Tensor) -> torch.Tensor:
        bos = self._windows.bos
        return prompt[1:] if bos is not None and prompt[0] == bos else prompt


def _prompts(text: _Text, models: Sequence[_Model], count: int) -> damage.Prompts:
    """What both models continue, int64 ``[prompt_tokens]`` each: chats up to an answer, or stretches of a text.

    Raises:
        SenteiError: There is none: no chat asks anything that leaves room for an answer.
    """
    windows = text.windows
    if not windows.holds_chats:
        return begin_with(windows.bos, damage.choose_prompts(windows.text_ids, count))
    longest = min(context_length(model.checkpoint.config).extended for model in models) - damage.NEW_TOKENS
    found = chat_prompts(text.source, models[-1].tokenizer, count=count, longest=longest)
    if not found:
        raise SenteiError(
            f"{windows.source} holds no chat with a user's turn of at most {longest} tokens.", "Add --generations 0."
        )
    return [torch.tensor(ids) for ids in found]


def _text_results(
    models: Sequence[_Model], texts: Sequence[_Text], readings: Sequence[Sequence[_Reading]]
) -> list[TextResult]:
    """One for each model and text; ``readings`` are :func:`_read_text`'s results by model, then by text."""
    return [
        _text_result(model, text.windows, measured)
        for model, results in zip(models, readings, strict=True)
        for text, (measured, _) in zip(texts, results, strict=True)
    ]


def _task_results(
    models: Sequence[_Model], settings: EvaluationSettings, answers: Sequence[Sequence[dict[str, Any]]]
) -> list[TaskResult]:
    """One for each model and task; ``answers`` are :func:`_ask`'s results by model, then by task."""
    return [
        _task_result(model, request, result, chat_template=settings.chat_template)
        for model, results in zip(models, answers, strict=True)
        for request, result in zip(settings.tasks, results, strict=True)
    ]


def _metric_results(
    models: Sequence[_Model], metrics: Sequence[Sequence[OwnMetric]], outcomes: Sequence[Sequence[dict[str, Any]]]
) -> list[MetricResult]:
    """One for each model and metric; ``outcomes`` are :func:`_ask_metric`'s results by model, then by metric."""
    return [
        result_of(metric, model.side, model.name, model.bos, found)
        for model, *asked in zip(models, metrics, outcomes, strict=True)
        for metric, found in zip(*asked, strict=True)
    ]


def _compare_metrics(
    metrics: Sequence[QuestionMetric], outcomes: Sequence[Sequence[dict[str, Any]]]
) -> list[MetricComparison]:
    return [
        compare(each, before["outcomes"], after["outcomes"])
        for each, before, after in zip(metrics, *outcomes, strict=True)
    ]


def _text_result(model: _Model, windows: TokenWindows, measured: dict[str, Any]) -> TextResult:
    return TextResult(
        model=model.side, directory=model.name, text=windows.source, text_sha256=windows.sha256, bos=windows.bos,
        chat_template=windows.holds_chats, **measured,
    )  # fmt: skip


def _task_result(model: _Model, request: TaskRequest, result: dict[str, Any], *, chat_template: bool) -> TaskResult:
    questions = result["questions"]
    return TaskResult(
        model=model.side,
        directory=model.name,
        task=request.label,
        source=request.file.name if request.file else "Hugging Face hub",
        num_fewshot=result["num_fewshot"],
        fewshot_source=result.get("fewshot_source"),
        num_questions=len(questions),
        # The template writes it, if any.
        bos=None if chat_template else model.bos,
        chat_template=chat_template,
        # A part from before these were kept does not have them.
        num_cut=result.get("num_cut"),
        batch_size=result.get("batch_size"),
        prompts_sha256=result.get("prompts_sha256"),
        metric=result["metric"],
        score=share(_scores(result)),
        scores={name: fmean(question["scores"][name] for question in questions) for name in shared_metrics(questions)},
        duration_s=result["duration_s"],
    )


def _compare_texts(
    texts: Sequence[_Text], readings: Sequence[Sequence[_Reading]], tokenizer: PreTrainedTokenizerBase
) -> list[TextComparison]:
    return [_compare_text(text, pair, tokenizer) for text, pair in zip(texts, zip(*readings, strict=True), strict=True)]


def _compare_text(text: _Text, pair: Sequence[_Reading], tokenizer: PreTrainedTokenizerBase) -> TextComparison:
    original, pruned = (torch.tensor(losses) for _, losses in pair)
    text_ids = text.windows.text_ids
    unit, numbers = number_passages(text.source, tokenizer, text_ids)
    worst = worst_passages(unit, numbers, text_ids, (original, pruned), tokenizer, count=NUM_WORST)
    return TextComparison(
        text=text.windows.source,
        perplexity_ratio=perplexity_ratio(*(each.double().mean(1).tolist() for each in (original, pruned))),
        worst_passages=[WorsePassage(**asdict(each)) for each in worst],
    )


def _compare_tasks(requests: Sequence[TaskRequest], answers: Sequence[list[dict[str, Any]]]) -> list[TaskComparison]:
    compared = []
    for request, before, after in zip(requests, *answers, strict=True):
        # A part from before it was kept does not have it.
        if None not in (asked := [each.get("prompts_sha256") for each in (before, after)]) and asked[0] != asked[1]:
            raise SenteiError(
                f"{request.label}: the two models were not asked the same, so their answers cannot be compared.",
                "Evaluate both again, with --force.",
            )
        compared.append(compare_task(request.label, before["metric"], before["questions"], after["questions"]))
    return compared


def _mean_score(answers: Sequence[list[dict[str, Any]]]) -> Any:
    return mean_score([(_scores(before), _scores(after)) for before, after in zip(*answers, strict=True)])


def _scores(result: dict[str, Any]) -> list[float]:
    return [question["scores"][result["metric"]] for question in result["questions"]]


def _identity(checkpoint: Checkpoint, settings: EvaluationSettings) -> dict[str, Any]:
    """What makes it this model, computed in this way. Weights count by name, size and time: hashing them takes long."""
    files = sorted(checkpoint.directory.glob("*.safetensors"))
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    config = hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True).encode()).hexdigest()
    return {"config": config, "weights": stats, "dtype": str(settings.dtype), "device": settings.device}


def _versions(with_tasks: bool) -> dict[str, str]:
    names = ["sentei", "torch", "transformers", *(["lm_eval"] if with_tasks else [])]
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
