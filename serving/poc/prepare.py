"""Looks at ``poc.yaml`` and at everything that it names, before anything is run."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from serving.forecast.device_probe import probe_device
from serving.poc.document import PocDocument
from serving.poc.plan_of_steps import ORIGINAL, Step, Steps, file_name, percent
from serving.poc.read import read_poc
from serving.poc.time_needed import Amounts, text_tokens
from toolchain.checkpoint.directory import Checkpoint, model_name, open_checkpoint, resolve_model
from toolchain.costs.document import config_sha256
from toolchain.errors import SenteiError
from toolchain.evaluate.task_requests import parse_task
from toolchain.metrics.question_metrics import QuestionMetric, parse_question_metric
from toolchain.metrics.questions import load_questions
from toolchain.model.context_length import context_length
from toolchain.text.sources import Text, parse_sources, parse_text
from toolchain.yaml_lines import Place, read_yaml

_SEQ_LEN = 2048
_MOST_TOKENS = 10_000_000


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A checked ``poc.yaml``: every file that it names is there, and nothing was run.

    Attributes:
        poc: What it says.
        path: Of the file.
        checkpoint: The original.
        siblings: Directories of smaller models, by name.
        model_identity: What all steps depend on, as JSON.
        sibling_identities: What the steps of each sibling depend on, likewise.
        calibration_files: What making a candidate depends on, too.
        evaluation_files: What evaluating one depends on, the questions of guard rails among them.
        question_chars: Of one's own questions, each prompt once for each of its choices.
        written_tokens: That a model writes in answers at most, for metrics of them.
        text_bytes: Of each evaluation text; ``None`` where that is not known.
    """

    poc: PocDocument
    path: Path
    checkpoint: Checkpoint
    siblings: dict[str, Path]
    model_identity: Any
    sibling_identities: Mapping[str, Any]
    calibration_files: Sequence[Any]
    evaluation_files: Sequence[Any]
    question_chars: int
    written_tokens: int
    text_bytes: Sequence[int | None]

    def steps(self, out: Path) -> Steps:
        """The steps, writing into a directory."""
        return Steps(
            poc=self.poc, model=self.checkpoint.directory.resolve(), directory=out.resolve(),
            swept=self.poc.candidates.sparsities,
        )  # fmt: skip

    def inputs_of(self, step: Step) -> Mapping[str, Any]:
        """What a step depends on beside its command. No question changes what a model is, or how fast."""
        files = self.evaluation_files if step.work == "evaluate" else self.calibration_files
        read = {
            name: identity
            for name, identity in self.sibling_identities.items()
            if str(self.siblings[name]) in step.arguments
        }
        return {"model": self.model_identity, "siblings": read, "files": files}


def prepare(path: Path) -> Prepared:
    """Reads ``poc.yaml`` and looks at everything that it names.

    Raises:
        SenteiError: A mistake in it, with its line; or something that it names is missing or no good.
    """
    poc = read_poc(path)
    base = path.resolve().parent
    place = _Places(path, base)
    checkpoint = open_checkpoint(place.model(poc.model, ("model",)))
    siblings = _siblings(poc, place)
    files = place.texts(poc.calibration.text, ("calibration", "text"), weights=True)
    evaluated = place.texts(poc.evaluation.text, ("evaluation", "text"))
    questions = [place.file(each, ("evaluation", "questions", n)) for n, each in enumerate(poc.evaluation.questions)]
    asked = [question for file in questions for question in load_questions(file)]
    _check_groups(poc, {each.subject for each in asked}, place)
    _check_apart(poc, place)
    metrics = _metrics(poc, place)
    written = [each for each in metrics if each.tokens]
    tasks = [
        place.file(str(task.file), ("evaluation", "tasks", number))
        for number, each in enumerate(poc.evaluation.tasks)
        if (task := parse_task(each)).file is not None
    ]
    read = [*evaluated, *questions, *tasks, *dict.fromkeys(each.file for each in metrics)]
    return Prepared(
        poc=poc, path=path, checkpoint=checkpoint, siblings=siblings,
        model_identity=_identity_of(checkpoint),
        sibling_identities={name: _identity_of(open_checkpoint(each)) for name, each in siblings.items()},
        calibration_files=_stamps_of(files),
        evaluation_files=_stamps_of(read),
        question_chars=sum(len(each.prompt) + len(choice) for each in asked for choice in each.choices)
        + sum(each.num_chars for each in metrics),
        written_tokens=sum(each.tokens * each.num_questions for each in written),
        text_bytes=[each.stat().st_size if each and each.is_file() else None for each in evaluated],
    )  # fmt: skip


def amounts_of(prepared: Prepared) -> Amounts:
    """How much there is to do, on this device, which is measured for a few seconds."""
    poc, checkpoint = prepared.poc, prepared.checkpoint
    longest = min(_SEQ_LEN, context_length(checkpoint.config).stated)
    window = poc.evaluation.seq_len or longest
    asked = poc.evaluation.windows and poc.evaluation.windows * window
    # How long a data set of the hub is, is not known before it is fetched.
    per_text = [
        min(asked or math.inf, text_tokens(size) if size else math.inf, _MOST_TOKENS) for size in prepared.text_bytes
    ]
    dtype = "float32" if poc.device == "cpu" else "bfloat16"
    peaks = probe_device(poc.device, dtype)
    return Amounts(
        num_parameters=checkpoint.num_parameters,
        weight_bytes=checkpoint.num_parameters * (4 if dtype == "float32" and poc.engine == "onnx" else 2),
        calibration_tokens=poc.calibration.samples * (poc.calibration.seq_len or longest),
        evaluation_tokens=round(sum(per_text)) + text_tokens(prepared.question_chars),
        written_tokens=prepared.written_tokens,
        flops_per_s=peaks.flops_per_s,
        bytes_per_s=peaks.bytes_per_s,
    )


def _siblings(poc: PocDocument, place: "_Places") -> dict[str, Path]:
    found: dict[str, Path] = {}
    taken = {file_name(percent(each)) for each in poc.candidates.sparsities} | {ORIGINAL, *poc.alternatives.quantised}
    for number, each in enumerate(poc.alternatives.siblings):
        where = ("alternatives", "siblings", number)
        directory = place.model(each, where)
        name = model_name(directory)
        if file_name(name) in taken:
            raise place.error(where, f"a candidate is called {name} already", "Rename the directory.")
        taken.add(file_name(name))
        found[name] = directory
    return found


def _metrics(poc: PocDocument, place: "_Places") -> list[QuestionMetric]:
    """What guard rails look at, with the files' places; their questions are good."""
    found = []
    for asked in poc.guard_rails.metrics:
        metric = parse_question_metric(asked)
        assert metric is not None, "guard rails are checked when they are read"
        where = ("guard_rails", "metrics", asked)
        metric = replace(metric, file=place.file(str(metric.file), where))
        try:
            # An interval of no questions, or a group that nobody is in, is a mistake here and not in hours.
            _ = metric.num_questions
        except SenteiError as error:
            raise place.error(where, error.message.rstrip("."), error.hint) from error
        found.append(metric)
    return found


def _check_apart(poc: PocDocument, place: "_Places") -> None:
    """Refuses text that pruning is decided with and quality is measured on: there it would look better than it is."""
    read = [place.resolved(each.text) for each in parse_sources(poc.calibration.text)]
    for number, given in enumerate(poc.evaluation.text):
        text = place.resolved(parse_text(given))
        if any(_same_text(text, each) for each in read):
            raise place.error(
                ("evaluation", "text", number),
                f"{given} is calibration text too, on which a pruned model looks better than it is",
                "Divide it into two files.",
            )


def _same_text(one: Text, other: Text) -> bool:
    """Whether one is the other, or lies in it."""
    if isinstance(one, Path) and isinstance(other, Path):
        return one.is_relative_to(other) or other.is_relative_to(one)
    return one == other


def _check_groups(poc: PocDocument, subjects: set[str | None], place: "_Places") -> None:
    for group in poc.guard_rails.groups:
        if group not in subjects:
            known = ", ".join(sorted(each for each in subjects if each)) or "none"
            raise place.error(
                ("guard_rails", "groups", group),
                f"no question has the subject {group}",
                f'Give questions a field "subject"; there are: {known}.',
            )


@dataclass(frozen=True)
class _Places:
    """What ``poc.yaml`` names, found beside it; an error names the line."""

    path: Path
    base: Path

    def error(self, where: Place, what: str, hint: str) -> SenteiError:
        return SenteiError(f"{self.path} line {read_yaml(self.path).line_of(where)}: {what}.", hint)

    def file(self, given: str, where: Place) -> Path:
        found = self.base / given
        if not found.exists():
            raise self.error(where, f"{given} does not exist", f"Paths are relative to {self.base}.")
        return found

    def texts(self, given: Sequence[str], where: Place, *, weights: bool = False) -> list[Path | None]:
        """The files or directories of texts; ``None`` for a data set of the hub."""
        try:
            texts = [each.text for each in parse_sources(given)] if weights else [parse_text(each) for each in given]
        except SenteiError as error:
            raise self.error(where, error.message.rstrip("."), error.hint) from error
        return [
            self.file(str(each), (*where, number)) if isinstance(each, Path) else None
            for number, each in enumerate(texts)
        ]

    def resolved(self, text: Text) -> Text:
        """A text; a file or directory as the one that it is, by whatever way."""
        return (self.base / text).resolve() if isinstance(text, Path) else text

    def model(self, given: str, where: Place) -> Path:
        found = self.base / given
        if found.exists():
            return found
        try:
            return resolve_model(given)
        except SenteiError as error:
            raise self.error(where, error.message.rstrip("."), error.hint) from error


def _identity_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Weights count by name, size and time: hashing them takes long."""
    files = sorted(checkpoint.directory.glob("*.safetensors"))
    return {"config": config_sha256(checkpoint.config), "weights": [stamp for file in files for stamp in _stamps(file)]}


def _stamps_of(files: Sequence[Path | None]) -> list[list[Any]]:
    """What tells that files changed; ``None`` is a data set of the hub, which its name in the command stands for."""
    return [stamp for file in files if file for stamp in _stamps(file)]


def _stamps(path: Path) -> list[list[Any]]:
    files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
