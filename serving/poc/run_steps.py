"""Runs steps, each once: what is finished stays, and is taken as it is while nothing that it depends on has changed."""

import json
import re
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from serving.child_process import child_process
from serving.poc.plan_of_steps import Step, file_name
from serving.poc.time_needed import correction
from toolchain.documents import Document, read_document
from toolchain.errors import INTERRUPTED, SenteiError
from toolchain.lifetime import own_environment
from toolchain.outputs import PARTS, replace_directory, write_text
from toolchain.parts_cache import digest_of

_ERROR = re.compile(r"^Error: (.*?)\s*(?:^\S*Traceback|\Z)", re.DOTALL | re.MULTILINE)
_LOG_TAIL = 20_000
_CHECK_FAILED = 1


class StepRecord(Document):
    """What became of a step. ``key`` names everything that it depends on; ``error`` is null where it succeeded.

    ``exit_code`` is null from the beginning of a step to its end, so that one that was interrupted is known.
    """

    schema_version: Literal[1] = 1
    kind: Literal["poc_step"] = "poc_step"
    name: str
    command: list[str]
    key: str
    exit_code: int | None
    error: str | None
    seconds: float | None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a step ended: well, or with the reason why not."""

    error: str | None = None
    check_failed: bool = False


@dataclass(kw_only=True)
class StepRunner:
    """Runs steps in one directory.

    Attributes:
        directory: Where everything goes.
        runs_in: Where the commands run: paths in ``poc.yaml`` are relative to it.
        inputs: What a step depends on beside its command: weights, texts, questions.
        estimate: Seconds of a step.
        upcoming: Steps that are still expected, for the remaining time.
        tell: Told one line at a time.
    """

    directory: Path
    runs_in: Path
    inputs: Callable[[Step], Any]
    estimate: Callable[[Step], float]
    upcoming: Callable[[], list[Step]]
    tell: Callable[[str], None]
    _taken: dict[str, tuple[float, float]] = field(default_factory=dict)

    def __call__(self, step: Step) -> Outcome:
        """Runs a step, unless it is finished already. What it needs must have been run.

        Raises:
            SenteiError: Its record is damaged.
            KeyboardInterrupt: It was interrupted.
        """
        record, key = self.record_of(step), self.key_of(step)
        same = record is not None and record.key == key
        if record is not None and same and self._is_final(record, step):
            return _outcome(record)
        self.tell(self._announcement(step))
        arguments = [*step.arguments, *self._how_to_begin(step, begun=same)]
        self._write(step, key, arguments, exit_code=None, error=None, seconds=None)
        started = time.monotonic()
        exit_code = self._run(step, arguments)
        seconds = time.monotonic() - started
        error = None if exit_code == 0 else self._error(step, exit_code)
        if exit_code == INTERRUPTED:
            raise KeyboardInterrupt
        self._write(step, key, arguments, exit_code=exit_code, error=error, seconds=round(seconds, 1))
        self._taken[step.name] = (self.estimate(step), seconds)
        if error:
            self.tell(f"  {step.name} failed: {error}")
        return Outcome(error=error, check_failed=exit_code == _CHECK_FAILED)

    def is_done(self, step: Step) -> bool:
        """Whether nothing is left to do."""
        record = self.record_of(step)
        return record is not None and record.key == self.key_of(step) and self._is_final(record, step)

    def record_of(self, step: Step) -> StepRecord | None:
        """What became of a step, whatever it depended on then; ``None`` if it was never begun.

        Raises:
            SenteiError: The record is damaged.
        """
        file = self._record_file(step)
        return read_document(file, StepRecord, hint="Delete it: the step is run again.") if file.is_file() else None

    def key_of(self, step: Step) -> str:
        """Names everything that a step depends on."""
        words = [word.replace(str(self.directory), "{out}") for word in (*step.program, *step.arguments)]
        needs = [self.key_of(each) for each in step.needs]
        return digest_of({"words": words, "needs": needs, "inputs": self.inputs(step), "sentei": version("sentei")})

    def remaining_s(self) -> float:
        """About how long the steps that are still expected take."""
        pairs = list(self._taken.values())
        factor = correction([estimated for estimated, _ in pairs], [taken for _, taken in pairs])
        return factor * sum(self.estimate(step) for step in self.upcoming() if not self.is_done(step))

    def _announcement(self, step: Step) -> str:
        left = timedelta(seconds=round(self.remaining_s()))
        return f"{step.name} ... (about {left} left; log: {self._log(step)})"

    def _is_final(self, record: StepRecord, step: Step) -> bool:
        """Whether it need not be run again: a failed check of an export fails again, anything else may go well now."""
        final = (0, _CHECK_FAILED) if step.work in ("export", "verify") else (0,)
        return record.exit_code in final and step.out.exists()

    def _how_to_begin(self, step: Step, *, begun: bool) -> list[str]:
        if step.arguments[0] == "verify" or step.program[0] != "-c":
            return []
        # Work that was begun with other inputs is forgotten.
        if not (step.resumes and begun):
            self._seed(step)
        return ["--force", *(["--resume"] if step.resumes and (begun or step.seeded_from) else [])]

    def _seed(self, step: Step) -> None:
        """Puts the original's finished parts where the step finds them."""
        source = step.seeded_from
        if source is None or not source.is_dir():
            return
        work = PARTS.directory(step.out)
        partial = work.with_name(f"{work.name}.partial")
        partial.mkdir(parents=True, exist_ok=True)
        for part in source.iterdir():
            shutil.copyfile(part, partial / part.name)
        replace_directory(partial, work)

    def _run(self, step: Step, arguments: list[str]) -> int:
        command = [sys.executable, "-P", *step.program, *arguments]
        log = self._log(step)
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = {**own_environment(), "COLUMNS": "160"}
        with child_process(command, environment, log, directory=self.runs_in) as process:
            return process.wait()

    def _error(self, step: Step, exit_code: int) -> str:
        log = self._log(step).read_text(encoding="utf-8", errors="replace")[-_LOG_TAIL:]
        if found := _ERROR.findall(log):
            # It stands in the report, which others read: where the directory lies is not theirs to know.
            return " ".join(found[-1].split()).replace(f"{self.directory}/", "")
        ended = f"signal {-exit_code}" if exit_code < 0 else f"exit code {exit_code}"
        return f"It ended with {ended}{' (memory may have run out)' if exit_code == -9 else ''}; see {self._log(step)}."

    def _log(self, step: Step) -> Path:
        return self.directory / "logs" / f"{file_name(step.name)}.log"

    def _record_file(self, step: Step) -> Path:
        return self.directory / "steps" / f"{file_name(step.name)}.json"

    def _write(self, step: Step, key: str, arguments: list[str], **ended: Any) -> None:
        file = self._record_file(step)
        file.parent.mkdir(parents=True, exist_ok=True)
        command = ["sentei", *arguments] if step.program[0] == "-c" else ["python", *step.program, *arguments]
        record = StepRecord(name=step.name, command=command, key=key, **ended)
        write_text(file, json.dumps(record.model_dump(), indent=1, ensure_ascii=False) + "\n")


def _outcome(record: StepRecord) -> Outcome:
    return Outcome(error=record.error, check_failed=record.exit_code == _CHECK_FAILED)


def fatal(step: Step, outcome: Outcome) -> None:
    """Ends the proof of concept where a step failed without which nothing can be said.

    Raises:
        SenteiError: It failed.
    """
    if outcome.error:
        raise SenteiError(f"{step.name} failed: {outcome.error}\n", "Correct that; --resume continues from there.")
