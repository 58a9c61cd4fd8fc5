"""Healing: what pruning broke is recovered by distillation from the original; the checkpoint keeps its form.

Shapes, config and plan stay what they were, so everything that reads a pruned checkpoint reads a healed one. See
``docs/decisions/healing.md``.
"""

import gc
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from toolchain.checkpoint.directory import (
    Checkpoint,
    copy_companions,
    dtype_name,
    model_name,
    open_checkpoint,
    write_config,
    write_weights,
)
from toolchain.errors import CheckFailedError, SenteiError, is_out_of_memory
from toolchain.metrics.token_metrics import perplexity_of
from toolchain.model.context_length import check_window
from toolchain.model.loading import bos_of, check_same_vocabulary, load_model, load_tokenizer
from toolchain.outputs import (
    HEALING,
    Unfinished,
    check_output_directory,
    new_directory,
    write_text,
    writes_directory,
)
from toolchain.plan.document import HealingRecord
from toolchain.plan.plan import PruningPlan, load_plan
from toolchain.plan.summary_document import PRUNING_SUMMARY_FILE
from toolchain.progress import NOBODY, Listener, Progress
from toolchain.ranks.ranks import ALONE, Ranks
from toolchain.text.fingerprints import merge_hashes
from toolchain.text.sources import TextSource, local_paths
from toolchain.text.windows import TokenWindows, load_mixture

if TYPE_CHECKING:
    from toolchain.heal.distillation import Student

_MOST_HELD_OUT = 8
# Weeks of training; their order is held in memory.
_MOST_WINDOWS = 10_000_000
# Nats per token more than before. What updates at the highest rate lose, those at a falling rate often win back (up
# to 0.4 in a trial with a tiny model), but not so much.
_HOPELESS = 1.0


@dataclass(frozen=True, kw_only=True)
class HealSettings:
    """What ``sentei heal`` was asked for.

    Attributes:
        data: Texts to learn from, and their weights.
        steps: Updates of the weights.
        batch_size: Windows per update, of all ranks together.
        seq_len: Tokens per window.
        learning_rate: The highest, after the warm-up.
        lora_rank: Of the adapters; ``None`` to train all weights.
        seed: Orders the windows, and draws the adapters.
        device: ``cpu`` or ``cuda``; of several ranks each has its own GPU.
        dtype: ``float32`` or ``bfloat16``.
    """

    data: Sequence[TextSource]
    steps: int
    batch_size: int
    seq_len: int
    learning_rate: float
    lora_rank: int | None
    seed: int
    device: str
    dtype: torch.dtype


@writes_directory
def heal(
    directory: Path,
    teacher_directory: Path,
    out: Path,
    settings: HealSettings,
    *,
    force: bool = False,
    resume: bool = False,
    ranks: Ranks = ALONE,
    listener: Listener = NOBODY,
) -> dict[str, Any]:
    """Trains a pruned checkpoint towards the original and writes it, with its plan.

    Windows from the end of the text, at most eight, are held out: on them the checkpoint is compared with the original
    before it is trained, on the way, and again as it was written.

    Args:
        directory: What ``sentei prune`` or ``sentei apply`` wrote; healed once more if it was healed.
        teacher_directory: The original, or another model with the same tokenizer.
        out: The directory to create.
        settings: See :class:`HealSettings`.
        force: Replace ``out`` if it is not empty, and an interrupted healing.
        resume: Go on with an interrupted healing.
        ranks: Who shares the training. The first alone measures, and writes at ``out``.
        listener: Hears of every step, and on the way how far from the original the model is.

    Returns:
        The record that the plan in ``out`` ends with.

    Raises:
        SenteiError: Bad input, or too little memory; nothing was written.
        CheckFailedError: The checkpoint did not come closer to the original on held-out text, or went so far away on
            the way that the training was ended; nothing of it is kept.
        MissingDependencyError: PEFT or accelerate is not installed.
    """
    # Whatever is missing is to be said before anything takes long.
    import toolchain.heal.distillation  # noqa: F401

    if not ranks.is_first:
        job = _prepare(directory, teacher_directory, settings, ranks)
        with _memory_in_a_sentence():
            _train(job, job.load_teacher(), None, HEALING.directory(out), ranks, listener)
        return cast(dict[str, Any], ranks.from_first()[0])
    texts = local_paths(source.text for source in settings.data)
    check_output_directory(out, force=force, inputs=[directory, teacher_directory, *texts])
    work = Unfinished(out, HEALING, force=force, resume=resume)
    job = _prepare(directory, teacher_directory, settings, ranks)
    with work.working(job.identity), _kept_if_trained(work), _memory_in_a_sentence():
        teacher = job.load_teacher()
        before = _compare(teacher, job.source, job.held_out, settings)
        student = _train(job, teacher, before.divergence, work.directory, ranks, listener)
        with new_directory(out, force=force) as partial:
            _write_weights(job.source, student, partial, listener.progress)
            del student
            gc.collect()  # models and what trained them refer to each other, and another model is coming
            after = _compare(teacher, open_checkpoint(partial), job.held_out, settings)
            _check_closer(before, after)
            found = _measured_record(job.record, before, after, num_held_out=len(job.held_out))
            _carry_over(directory, job.plan, found, job.windows, partial)
    return cast(dict[str, Any], ranks.from_first(found.model_dump())[0])


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What a healing begins with, the same in all ranks.

    Attributes:
        source: The pruned checkpoint.
        teacher: What it learns from.
        plan: The pruned checkpoint's.
        windows: The text.
        record: Everything in :class:`HealingRecord` but what is measured.
        settings: What was asked for.
    """

    source: Checkpoint
    teacher: Checkpoint
    plan: PruningPlan
    windows: TokenWindows
    record: dict[str, Any]
    settings: HealSettings

    @property
    def identity(self) -> dict[str, Any]:
        """What the healed weights depend on, as JSON."""
        return {"student": self.source.fingerprint, **self.record}

    @property
    def learnt(self) -> torch.Tensor:
        """Windows to learn from, int64 ``[num_windows, seq_len]``."""
        return self.windows.ids[: -_num_held_out(self.windows)]

    @property
    def held_out(self) -> torch.Tensor:
        """Windows to judge by, at the end of the text, likewise."""
        return self.windows.ids[-_num_held_out(self.windows) :]

    def load_teacher(self) -> PreTrainedModel:
        """The model it learns from, where this rank computes."""
        return load_model(self.teacher, dtype=self.settings.dtype, device=self.settings.device)


def check_healing(model: Checkpoint, settings: HealSettings) -> None:
    """Checks, before a model is pruned, that it could be healed as asked.

    Args:
        model: What it will learn from, which has the same tokenizer and context.
        settings: See :class:`HealSettings`.

    Raises:
        SenteiError: It could not.
        MissingDependencyError: PEFT or accelerate is not installed.
    """
    import toolchain.heal.distillation  # noqa: F401

    _check_settings(settings, ALONE)
    _check_rank(model, settings)
    check_window(model.directory, model.config, settings.seq_len)
    _num_held_out(_load_windows(model, settings))


def _prepare(directory: Path, teacher_directory: Path, settings: HealSettings, ranks: Ranks) -> _Job:
    """Checks everything before a model is loaded.

    Raises:
        SenteiError: Bad input, or ranks that would not do the same.
    """
    _check_settings(settings, ranks)
    source, teacher = open_checkpoint(directory), open_checkpoint(teacher_directory)
    _check_pair(source, teacher, settings)
    plan = load_plan(directory)
    windows = _load_windows(source, settings)
    _num_held_out(windows)
    job = _Job(
        source=source, teacher=teacher, plan=plan, windows=windows, record=_record(teacher, windows, settings),
        settings=settings,
    )  # fmt: skip
    if ranks.several:  # a process alone need not hash weights before it knows that the output is free
        ranks.check_same({**job.identity, "device": torch.device(settings.device).type})
    return job


def _load_windows(source: Checkpoint, settings: HealSettings) -> TokenWindows:
    """The text to learn from, and some more to hold out."""
    tokenizer = load_tokenizer(source.directory)
    return load_mixture(
        settings.data,
        tokenizer,
        num_samples=settings.steps * settings.batch_size + _MOST_HELD_OUT,
        seq_len=settings.seq_len,
        bos=bos_of(source.family, tokenizer),
        fewer_will_do=True,
    )


def _train(
    job: _Job,
    teacher: PreTrainedModel,
    before: float | None,
    unfinished: Path,
    ranks: Ranks,
    listener: Listener,
) -> "Student":
    """Trains, or goes on; Trainer's checkpoints are in ``unfinished``. The first rank knows the divergence before."""
    from toolchain.heal.distillation import Looks, Training, distill

    settings = job.settings
    was = ranks.from_first(before)[0]

    def look(step: int, found: float) -> None:
        said = f"{found:.4g} nats per token from the original on held-out text, {was:.4g} before healing"
        listener.note(f"Healing: after {step} of {settings.steps} steps {said}.")
        if not found - was < _HOPELESS:  # also where it is NaN
            raise CheckFailedError(
                f"Healing did not help: after {step} of {settings.steps} steps the model is {said}.",
                "Nothing was written. Lower --learning-rate.",
            )

    training = Training(
        steps=settings.steps,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lora_rank=settings.lora_rank,
        seed=settings.seed,
        device=settings.device,
        dtype=settings.dtype,
    )
    with listener.progress("Healing", settings.steps) as advance:
        return distill(
            teacher, job.source, job.learnt, training, unfinished, ranks=ranks, on_step=advance,
            looks=Looks(windows=job.held_out, on_look=look),
        )  # fmt: skip


@contextmanager
def _kept_if_trained(work: Unfinished) -> Iterator[None]:
    """Keeps what was trained if there is a checkpoint to go on from, but not where it did not help."""
    from toolchain.heal.distillation import last_checkpoint

    try:
        yield
    except BaseException as error:
        did_not_help = isinstance(error, CheckFailedError)
        work.worth_keeping = not did_not_help and last_checkpoint(work.directory) is not None
        raise


@contextmanager
def _memory_in_a_sentence() -> Iterator[None]:
    """Says what to do where memory runs out.

    Raises:
        SenteiError: It did.
    """
    try:
        yield
    except BaseException as error:
        if is_out_of_memory(error):
            raise SenteiError(
                "Memory ran out.", "Lower --seq-len, train with LoRA instead of --full, or use a larger machine."
            ) from error
        raise


def _check_settings(settings: HealSettings, ranks: Ranks) -> None:
    for name, value in (
        ("--steps", settings.steps),
        ("--batch-size", settings.batch_size),
        ("--learning-rate", settings.learning_rate),
        ("--lora-rank", settings.lora_rank),
    ):
        if value is not None and not 0 < value < math.inf:
            raise SenteiError(f"{name} {value} makes no sense.", "Give a number above 0.")
    if (num_windows := settings.steps * settings.batch_size) > _MOST_WINDOWS:
        raise SenteiError(
            f"--steps {settings.steps} of --batch-size {settings.batch_size} read {num_windows} windows, more than "
            f"{_MOST_WINDOWS}.",
            "Give fewer steps or a smaller batch.",
        )
    if settings.batch_size % ranks.size:
        raise SenteiError(
            f"--batch-size {settings.batch_size} cannot be divided equally among {ranks.size} processes.",
            f"Give a multiple of {ranks.size}.",
        )
    if settings.dtype not in (torch.float32, torch.bfloat16):
        raise SenteiError(
            f"Healing does not compute in {dtype_name(settings.dtype)}, in which small gradients vanish.",
            "Use --dtype bfloat16 or float32.",
        )
    if settings.device not in ("cpu", "cuda") and not ranks.several:
        raise SenteiError(
            f"Healing takes the first GPU there is, not --device {settings.device}.",
            "Choose another by the environment variable CUDA_VISIBLE_DEVICES.",
        )


def _check_pair(source: Checkpoint, teacher: Checkpoint, settings: HealSettings) -> None:
    """Checks that one can learn from the other, as asked: same tokens, same places in the logits, enough context."""
    if not source.is_pruned:
        raise SenteiError(f"{source.directory} is not pruned: there is nothing to heal.")
    if source.directory.resolve() == teacher.directory.resolve():
        raise SenteiError(f"{source.directory} cannot learn from itself.", "Give the original model with --against.")
    check_same_vocabulary(source, teacher, [load_tokenizer(each.directory) for each in (source, teacher)])
    _check_rank(source, settings)
    for each in (source, teacher):
        check_window(each.directory, each.config, settings.seq_len)


def _check_rank(model: Checkpoint, settings: HealSettings) -> None:
    if settings.lora_rank is not None and settings.lora_rank > model.config["hidden_size"]:
        raise SenteiError(
            f"--lora-rank {settings.lora_rank} exceeds the model's hidden_size, {model.config['hidden_size']}.",
            "Give a lower one, or --full, which trains all weights.",
        )


def _num_held_out(windows: TokenWindows) -> int:
    """How many windows at the end are not learnt from: one in ten, eight at most.

    Raises:
        SenteiError: There are too few.
    """
    count = len(windows.ids)
    if count < 2:
        raise SenteiError(
            f"{windows.source} is too short to heal with: it has one window of {windows.ids.shape[1]} tokens, and one "
            "more has to be held out.",
            "Give more text, or lower --seq-len.",
        )
    return max(1, min(_MOST_HELD_OUT, count // 10))


def _record(teacher: Checkpoint, windows: TokenWindows, settings: HealSettings) -> dict[str, Any]:
    """What a healing begins with: everything in :class:`HealingRecord` but what is measured."""
    return {
        "teacher": model_name(teacher.directory),
        "teacher_sha256": teacher.fingerprint,
        "text": windows.source,
        "text_sha256": windows.sha256,
        "sources": [each.model_dump() for each in windows.sources],
        "bos": windows.bos,
        # Left out otherwise: a healing that an earlier version began goes on.
        **({"chat_template": True} if windows.holds_chats else {}),
        "num_windows": len(windows.ids),
        "seq_len": settings.seq_len,
        "steps": settings.steps,
        "batch_size": settings.batch_size,
        "learning_rate": settings.learning_rate,
        "lora_rank": settings.lora_rank,
        "seed": settings.seed,
        "dtype": dtype_name(settings.dtype),
    }


@dataclass(frozen=True, kw_only=True)
class _Comparison:
    """Over the held-out windows; divergence in nats per token."""

    perplexity_original: float
    perplexity: float
    divergence: float


@torch.inference_mode()
def _compare(
    teacher: PreTrainedModel, checkpoint: Checkpoint, windows: torch.Tensor, settings: HealSettings
) -> _Comparison:
    """Compares a checkpoint as it is on disk with the teacher."""
    from toolchain.heal.distillation import divergence

    student = load_model(checkpoint, dtype=settings.dtype, device=settings.device)
    losses: list[list[float]] = []
    for window in windows.to(settings.device).split(1):
        both = [model(window, use_cache=False).logits[0, :-1].float() for model in (teacher, student)]
        losses.append([*(float(cross_entropy(each, window[0, 1:])) for each in both), float(divergence(*both))])
    original, own, kl = (fmean(each) for each in zip(*losses, strict=True))
    return _Comparison(perplexity_original=perplexity_of(original), perplexity=perplexity_of(own), divergence=kl)


def _measured_record(
    record: dict[str, Any], before: _Comparison, after: _Comparison, *, num_held_out: int
) -> HealingRecord:
    """The record that a healing ends with: what it began with, and what it changed."""
    return HealingRecord(
        **record,
        num_held_out=num_held_out,
        perplexity_original=after.perplexity_original,
        perplexity_before=before.perplexity,
        perplexity_after=after.perplexity,
        divergence_before=before.divergence,
        divergence_after=after.divergence,
    )


def _check_closer(before: _Comparison, after: _Comparison) -> None:
    # Also where it is NaN.
    if not after.divergence < before.divergence:
        raise CheckFailedError(
            f"Healing did not help: on held-out text the divergence from the original was {before.divergence:.4g} nats "
            f"per token before, and is {after.divergence:.4g} now.",
            "Nothing was written. Lower --learning-rate, or give more text.",
        )


def _write_weights(source: Checkpoint, student: "Student", directory: Path, progress: Progress) -> None:
    write_config(directory, source.config)
    copy_companions(source.directory, directory)
    tensors = {name: (info.shape, info.dtype) for name, info in source.tensors.items()}
    with progress("Writing the checkpoint", len(tensors)) as advance:
        write_weights(directory, tensors, student.read, on_tensor=lambda _name: advance())


def _carry_over(source: Path, plan: PruningPlan, record: HealingRecord, windows: TokenWindows, directory: Path) -> None:
    """Writes plan, summary and model card: the source's, and that it was healed."""
    healed = plan.changed({"healing": [*plan.document.healing, record]})
    read = windows.passage_hashes
    if (before := plan.text_hashes.get("healing")) is not None:
        read = merge_hashes(before, read)
    replace(healed, text_hashes={**healed.text_hashes, "healing": read}).save(directory)
    if (summary := source / PRUNING_SUMMARY_FILE).is_file():
        shutil.copyfile(summary, directory / PRUNING_SUMMARY_FILE)
    if (card := source / "README.md").is_file():
        write_text(directory / "README.md", card.read_text(encoding="utf-8") + _paragraph(record))


def _paragraph(record: HealingRecord) -> str:
    trained = f"LoRA of rank {record.lora_rank}, merged" if record.lora_rank else "all weights"
    return f"""
## Healed

Trained towards {record.teacher} after pruning, by distillation ({trained}): {record.steps} steps of
{record.batch_size} x {record.seq_len} tokens of {record.text}, learning rate {record.learning_rate:g}. On
{record.num_held_out} held-out windows of the same text: perplexity {record.perplexity_before:.2f} →
{record.perplexity_after:.2f} (original {record.perplexity_original:.2f}), divergence from the original
{record.divergence_before:.3f} → {record.divergence_after:.3f} nats per token. The cost above is from before the
healing; `sentei apply` of the plan gives the model as it was then.
"""
