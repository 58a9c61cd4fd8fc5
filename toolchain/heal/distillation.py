"""Distillation: a pruned model learns from the original what to expect next; the one place with gradients.

The loss is the divergence of the student's next-token distribution from the teacher's, at every token (Hinton et al.,
arXiv 1503.02531, at temperature 1). Transformers' Trainer runs the steps and keeps them on disk; PEFT adds LoRA (arXiv
2106.09685) to every linear module of the decoder blocks.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import kl_div, log_softmax
from torch.utils.data import SequentialSampler
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from toolchain.checkpoint.directory import Checkpoint
from toolchain.errors import MissingDependencyError, SenteiError
from toolchain.json_files import read_json_object
from toolchain.model.loading import load_model
from toolchain.ranks.joining import library_waits
from toolchain.ranks.ranks import ALONE, Ranks

try:
    import accelerate  # noqa: F401 (Trainer needs it)
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import Linear as LoraLinear
except ImportError as missing:
    raise MissingDependencyError("peft or accelerate, which healing needs,", "heal") from missing

_WARMUP = 0.05
_SAVES = 20
_LOOKS = 4
# What a layer keeps of each token for the gradients: so many bytes per channel of states and FFN. Measured: 10 to 14 in
# bfloat16 with adapters, 15 to 22 otherwise.
_KEPT_BYTES = 20
_SHARE_FOR_KEPT = 0.25
# Written last: a checkpoint without it, or with half of it, was interrupted.
_STATE_FILE = "trainer_state.json"


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a student is trained.

    Attributes:
        steps: Updates of the weights.
        batch_size: Sequences per update, of all ranks together; each has one at a time in memory.
        learning_rate: AdamW's, after a warm-up of 5 % of the steps; from there it falls to 0 as a cosine.
        lora_rank: Of the adapters; ``None`` to train all weights.
        seed: Orders the sequences, and draws the adapters.
        device: ``cpu``, or the rank's own GPU.
        dtype: Matrix products are computed in: ``float32``, or ``bfloat16`` with what is trained in ``float32``.
    """

    steps: int
    batch_size: int
    learning_rate: float
    lora_rank: int | None
    seed: int
    device: str
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True)
class Looks:
    """What is looked at after each quarter of the updates but the last.

    Attributes:
        windows: Not learnt from, int64 ``[num_windows, seq_len]``.
        on_look: Called, in all ranks, with the number of updates that are done and the student's mean divergence from
            the teacher on the windows, in nats per token. What it raises ends the training.
    """

    windows: torch.Tensor
    on_look: Callable[[int, float], None]


class Student:
    """A trained student, as the tensors of the checkpoint it came from.

    Attributes:
        model: With its adapters, or with all weights in float32.
    """

    def __init__(self, model: Any, source: Checkpoint) -> None:
        """``source``: what was loaded before the training."""
        self.model = model
        self._source = source
        self._adapters = {
            f"{name.removeprefix('base_model.model.')}.weight": module
            for name, module in model.named_modules()
            if isinstance(module, LoraLinear)
        }
        self._weights: dict[str, torch.Tensor] = {} if self._adapters else model.state_dict()

    @torch.no_grad()
    def read(self, name: str) -> torch.Tensor:
        """One tensor, in the dtype it is stored in; adapters are added to the stored weight and rounded once."""
        stored = self._source.read(name)
        if name in self._adapters:
            delta = self._adapters[name].get_delta_weight("default")
            return (stored.float() + delta.float().cpu()).to(stored.dtype)
        return self._weights.get(name, stored).cpu().to(stored.dtype)


def divergence(teacher_logits: torch.Tensor, student_logits: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of KL(teacher ‖ student), in nats; in float32, whatever the logits are in.

    Args:
        teacher_logits: ``[..., vocab_size]``.
        student_logits: Likewise.
    """
    teacher, student = (log_softmax(each.float(), -1) for each in (teacher_logits, student_logits))
    return kl_div(student, teacher, reduction="sum", log_target=True) / student[..., 0].numel()


def last_checkpoint(directory: Path) -> Path | None:
    """The latest whole checkpoint of an interrupted training; deletes those that were being written."""
    whole = []
    for checkpoint in directory.glob("checkpoint-*"):
        try:
            step = read_json_object(checkpoint / _STATE_FILE).get("global_step")
        except SenteiError:
            step = None
        if isinstance(step, int):
            whole.append((step, checkpoint))
        else:
            shutil.rmtree(checkpoint)
    return max(whole)[1] if whole else None


def distill(
    teacher: PreTrainedModel,
    source: Checkpoint,
    windows: torch.Tensor,
    training: Training,
    directory: Path,
    *,
    ranks: Ranks = ALONE,
    on_step: Callable[[], None] = lambda: None,
    looks: Looks | None = None,
) -> Student:
    """Trains a checkpoint towards a teacher, or goes on where an interrupted training left off.

    Args:
        teacher: On the training's device.
        source: The student; its files are not changed.
        windows: int64 ``[num_windows, seq_len]``; read as often as the steps need, each time in another order.
        training: See :class:`Training`.
        directory: Holds Trainer's checkpoints, twenty in the course of a training and one at a time.
        ranks: Who trains. Each reads its share of a batch; accelerate adds their gradients up (DDP). The first alone
            writes to ``directory``; all read there what an interrupted training left.
        on_step: Called after each update, for progress; and for those that were done before.
        looks: What is looked at on the way.

    Raises:
        SenteiError: A rank does not see what is in ``directory``, or is lost.
    """
    _tell_accelerate(ranks)
    torch.manual_seed(training.seed)
    student = _student_of(source, training)
    order = order_of_windows(len(windows), training.steps * training.batch_size, seed=training.seed)
    is_short = _is_short_of_memory(source, windows.shape[1], training, ranks)
    before = _where_to_go_on(directory, ranks)
    with library_waits(ranks):
        trainer = _Distillation(
            teacher,
            model=student,
            args=_trainer_arguments(training, directory, ranks, is_short_of_memory=is_short, looks=looks is not None),
            train_dataset=[{"input_ids": row} for row in windows[order]],
            eval_dataset=[{"input_ids": row} for row in looks.windows] if looks else None,
            callbacks=[_OnStep(on_step), *([_OnLook(looks.on_look)] if looks else [])],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=before)
    return Student(student, source)


def _tell_accelerate(ranks: Ranks) -> None:
    """It reads in the environment which process is where; not every launcher has said all of it."""
    if ranks.several:
        os.environ.update(
            LOCAL_RANK=str(ranks.local_rank), LOCAL_WORLD_SIZE=str(ranks.num_sharing(torch.device("cpu")))
        )
        # Otherwise it would choose the number of threads itself.
        os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))


def _is_short_of_memory(source: Checkpoint, seq_len: int, training: Training, ranks: Ranks) -> bool:
    """Whether what the layers keep of a window for the gradients is too much for the device."""
    num_channels = sum(source.config["hidden_size"] + layer.intermediate_size for layer in source.layout)
    free = ranks.free_bytes(torch.device(training.device))
    return _KEPT_BYTES * num_channels * seq_len > _SHARE_FOR_KEPT * free


def _where_to_go_on(directory: Path, ranks: Ranks) -> str | None:
    """The checkpoint that all ranks go on from; ``None`` for a new training.

    Raises:
        SenteiError: This rank does not see it.
    """
    found = last_checkpoint(directory) if ranks.is_first else None
    name, _ = ranks.from_first(found.name if found else None)
    if name is None:
        return None
    if not (directory / name / _STATE_FILE).is_file():
        raise SenteiError(
            f"{directory / name} is not on {ranks.hosts[ranks.rank]}, the machine of rank {ranks.rank}.",
            "To continue, put the output where all machines see it, or resume on the first machine alone.",
        )
    return str(directory / name)


def _student_of(source: Checkpoint, training: Training) -> Any:
    """The model that is trained: with adapters, or with all weights in float32."""
    frozen = training.dtype if training.lora_rank else torch.float32
    student: Any = load_model(source, dtype=frozen)
    # A model's own temperature and the like are refused in a checkpoint without sampling, and say nothing here.
    student.generation_config = GenerationConfig()
    if training.lora_rank:
        config = LoraConfig(r=training.lora_rank, lora_alpha=2 * training.lora_rank, target_modules="all-linear")
        student = get_peft_model(student, config)
    return student


def _trainer_arguments(
    training: Training, directory: Path, ranks: Ranks, *, is_short_of_memory: bool, looks: bool
) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=training.steps,
        # One sequence at a time: its logits are what takes memory.
        per_device_train_batch_size=1,
        gradient_accumulation_steps=training.batch_size // ranks.size,
        # A layer's insides are then computed again for the gradients: a quarter more work, and the same gradients.
        gradient_checkpointing=is_short_of_memory,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        ddp_find_unused_parameters=False,
        learning_rate=training.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, round(_WARMUP * training.steps)),
        weight_decay=0.0,
        bf16=training.dtype is torch.bfloat16,
        use_cpu=training.device == "cpu",
        seed=training.seed,
        save_steps=max(1, training.steps // _SAVES),
        save_total_limit=1,
        eval_strategy="steps" if looks else "no",
        eval_steps=-(-training.steps // _LOOKS),
        per_device_eval_batch_size=1,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    assert arguments.world_size == ranks.size
    if arguments.device.type == "cuda":
        arguments._n_gpu = 1  # Trainer would wrap the model in DataParallel where there are several
    return arguments


def order_of_windows(num_windows: int, wanted: int, *, seed: int) -> torch.Tensor:
    """Which window comes when: int64 ``[wanted]``, one permutation after the other."""
    generator, rounds = torch.Generator().manual_seed(seed), -(-wanted // num_windows)
    return torch.cat([torch.randperm(num_windows, generator=generator) for _ in range(rounds)])[:wanted]


class _Distillation(Trainer):
    """Trainer with a teacher, reading its data in the order it is given."""

    def __init__(self, teacher: PreTrainedModel, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._teacher = teacher
        # The loss is a mean over one sequence: Trainer is to divide the sum of a batch's.
        self.model_accepts_loss_kwargs = False

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(train_dataset or self.train_dataset)

    def _save_rng_state(self, output_dir: str) -> None:
        # Other ranks have nothing to keep, and their machines perhaps no such directory.
        if self.args.should_save:
            super()._save_rng_state(output_dir)

    def compute_loss(self, model: Any, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        with torch.no_grad():
            wanted = self._teacher(**inputs, use_cache=False).logits
        return divergence(wanted, model(**inputs, use_cache=False).logits)

    def prediction_step(
        self, model: Any, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None, None]:
        # Trainer's own takes windows without labels for windows without a loss.
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, self._prepare_inputs(inputs)), None, None


class _OnStep(TrainerCallback):
    def __init__(self, on_step: Callable[[], None]) -> None:
        self._on_step = on_step

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for _ in range(state.global_step):
            self._on_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._on_step()


class _OnLook(TrainerCallback):
    def __init__(self, on_look: Callable[[int, float], None]) -> None:
        self._on_look = on_look

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate = False  # what is written is compared anyway

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._on_look(state.global_step, kwargs["metrics"]["eval_loss"])
