"""An interrupted search on disk. Its state is a plan: readable, and as good to cut or apply as a finished one."""

import shutil
from pathlib import Path
from typing import Any

from toolchain.errors import SenteiError
from toolchain.output_checks import check_unfinished
from toolchain.outputs import beside
from toolchain.plan.document import PlanDocument
from toolchain.plan.plan import PLAN_FILE, PruningPlan, load_plan
from toolchain.resuming import interrupted, made_otherwise

# What the search itself fills in; everything else is its input, and must be the same to resume.
_MEASURED: dict[str, Any] = {
    "target_intermediate_size": True,
    "target_attention_removals": True,
    "metric_original": True,
    "limit": {"original", "value"},
    "stopped_because": True,
    "layers": True,
    "stage_1": True,
    "trace": True,
    "block_steps": True,
    "compensation": True,
}


def search_directory(out: Path) -> Path:
    """``<out>.search``, which exists while the search that will write ``out`` is unfinished."""
    return beside(out, "search")


class SearchState:
    """An unfinished search in a directory of its own."""

    def __init__(self, directory: Path) -> None:
        """``directory`` is created when the first step is saved."""
        self.directory = directory

    def check_ours(self) -> None:
        """Refuses a directory in which no search lies, nor a sweep's searches.

        Raises:
            SenteiError: It is somebody else's.
        """
        check_unfinished(self.directory, "plan.*", "*/plan.*")

    def check_free(self) -> None:
        """Refuses to overwrite an interrupted search, or a sweep's, which are in directories below.

        Raises:
            SenteiError: There is one.
        """
        if self.directory.is_dir() and any(self.directory.iterdir()):
            raise interrupted(self.directory, "search")

    def save(self, plan: PruningPlan) -> None:
        """Writes the plan as it is now."""
        self.directory.mkdir(parents=True, exist_ok=True)
        plan.save(self.directory)

    def load(self, expected: PlanDocument) -> PruningPlan | None:
        """The interrupted search, or ``None`` if nothing was saved yet.

        Args:
            expected: The plan a new search would begin with.

        Raises:
            SenteiError: The inputs are not those of the interrupted search; names the first that differs. Or it is a
                sweep that was interrupted.
        """
        if not (self.directory / PLAN_FILE).exists():
            if any(self.directory.glob(f"*/{PLAN_FILE}")):
                raise SenteiError(
                    f"{self.directory} holds an interrupted sweep.", "Resume the sweep, or use --force to start over."
                )
            return None
        plan = load_plan(self.directory)
        before, now = _asked(plan.document), _asked(expected)
        for key, value in now.items():
            if before[key] != value:
                raise made_otherwise(self.directory, "searched", _describe(key, before[key], value))
        return plan

    @property
    def worth_keeping(self) -> bool:
        """Whether an attention or a block was removed already: only such steps take long."""
        if not (self.directory / PLAN_FILE).exists():
            return False
        document = load_plan(self.directory).document
        return bool(document.trace or document.block_steps)

    def remove(self) -> None:
        """Forgets the search."""
        shutil.rmtree(self.directory, ignore_errors=True)


def _asked(document: PlanDocument) -> dict[str, Any]:
    """What must be the same to resume. The search only reads whether the plan compensates."""
    return {**document.model_dump(exclude=_MEASURED), "compensation": document.compensation is not None}


def _describe(key: str, before: object, now: object) -> str:
    """Names what differs, down to the field of a nested record."""
    if isinstance(before, dict) and isinstance(now, dict):
        inner = next(name for name in {**before, **now} if before.get(name) != now.get(name))
        return _describe(f"{key}.{inner}", before.get(inner), now.get(inner))
    return f"{key}: {_short(before)} then, {_short(now)} now"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
