"""What ``--task``, ``--questions``, ``--fewshot`` and their like ask for. Nothing is read here but names."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from toolchain.errors import SenteiError
from toolchain.evaluate.local_tasks import TASK_FILES

USER_QUESTIONS = "questions"
# Requests that a model reads at a time; auto: as many as the GPU's memory holds.
BatchSize = int | Literal["auto"]


@dataclass(frozen=True, kw_only=True)
class TaskRequest:
    """A task somebody asked for.

    Attributes:
        name: Of the task; :data:`USER_QUESTIONS` for a person's own.
        file: The questions, or ``None`` to download them from the hub.
        num_fewshot: Examples before each question; ``None`` for as many as the task is defined with.
        fewshot_file: Where the examples of a task from a file come from.
    """

    name: str
    file: Path | None
    num_fewshot: int | None = None
    fewshot_file: Path | None = None

    @property
    def label(self) -> str:
        """What it is called in results."""
        return self.file.name if self.name == USER_QUESTIONS and self.file else self.name

    @property
    def files(self) -> list[Path]:
        """What is read for it."""
        return [file for file in (self.file, self.fewshot_file) if file]


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


def parse_requests(
    tasks: Sequence[str], questions: Sequence[Path], *, num_fewshot: int | None = None, fewshot: Sequence[str] = ()
) -> list[TaskRequest]:
    """What ``--task``, ``--questions``, ``--num-fewshot`` and ``--fewshot`` ask for; see :func:`parse_task`.

    Raises:
        SenteiError: As :func:`parse_task`; or examples that nothing asks for, or that are asked for and not given.
    """
    requests = [*map(parse_task, tasks), *(TaskRequest(name=USER_QUESTIONS, file=each) for each in questions)]
    if num_fewshot is not None:
        if num_fewshot < 0:
            raise SenteiError(f"--num-fewshot {num_fewshot} makes no sense.", "Use 0 or more.")
        if not requests:
            raise SenteiError(
                "--num-fewshot is for tasks and questions, and there are none.", "Give --task or --questions."
            )
    files = _fewshot_files(fewshot, requests, num_fewshot)
    if num_fewshot and (without := [each for each in requests if each.file and each.label not in files]):
        label = without[0].label
        raise SenteiError(
            f"--num-fewshot {num_fewshot}: the examples for {label} must be other questions than those of its file.",
            f"Add --fewshot {label}=FILE.jsonl, a file of the same form, such as the task's training questions.",
        )
    return [
        TaskRequest(
            name=each.name, file=each.file, num_fewshot=num_fewshot, fewshot_file=files.get(each.label)
        )
        for each in requests
    ]  # fmt: skip


def parse_batch_size(asked: str) -> BatchSize:
    """Reads a number, or ``auto``.

    Raises:
        SenteiError: It is neither.
    """
    if asked == "auto":
        return "auto"
    try:
        size = int(asked)
    except ValueError as error:
        raise SenteiError(f"--batch-size {asked!r} is not understood.", "Use a number, or auto.") from error
    if size < 1:
        raise SenteiError(f"--batch-size {asked} makes no sense.", "Use at least 1, or auto.")
    return size


def _fewshot_files(fewshot: Sequence[str], requests: Sequence[TaskRequest], num_fewshot: int | None) -> dict[str, Path]:
    """The files of ``--fewshot`` by what the tasks are called."""
    files: dict[str, Path] = {}
    # A name of questions is that of a file, which may hold "=" itself.
    labels = sorted((each.label for each in requests if each.file), key=len, reverse=True)
    for asked in fewshot:
        label = next((each for each in labels if asked.startswith(f"{each}=")), None)
        if label is None:
            raise SenteiError(
                f"--fewshot {asked}: there is no task or file of questions of that name that is read from a file.",
                f"Write NAME=FILE with NAME out of {', '.join(sorted(labels))}." if labels else
                "A task of the hub has its own examples: leave --fewshot out.",
            )  # fmt: skip
        file = asked[len(label) + 1 :]
        if not file.strip():
            raise SenteiError(f"--fewshot {asked}: the file is empty.", f"Write --fewshot {label}=FILE.jsonl.")
        if label in files:
            raise SenteiError(f"--fewshot names two files for {label}.", "Give one.")
        files[label] = Path(file)
    if files and not num_fewshot:
        raise SenteiError("--fewshot gives examples, and none are asked for.", "Add --num-fewshot N.")
    return files
