"""An interrupted search on disk. Its state is a plan: readable, and as good to cut or apply as a finished one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from toolchain.errors import SenteiError
from toolchain.outputs import SEARCH, Unfinished, begin_with, identity_on_disk
from toolchain.parts_cache import digest_of
from toolchain.plan.document import PlanDocument, document_to_json
from toolchain.plan.plan import PLAN_FILE, SCORES_FILE, PruningPlan, load_plan
from toolchain.prune.stage_files import StageFiles
from toolchain.prune.window_sums import Shared
from toolchain.ranks.ranks import ALONE, Ranks

# What the search itself fills in; everything else is its input, and must be the same to resume.
_MEASURED: dict[str, Any] = {
    "target_intermediate_size": True,
    "target_attention_removals": True,
    "target": {"rounds", "taken", "met", "left_open"},
    "metric_original": True,
    "limit": {"original", "value", "measured"},
    "stopped_because": True,
    "layers": True,
    "stage_1": True,
    "trace": True,
    "block_steps": True,
    "compensation": True,
}


class SearchState:
    """The plan so far of one search, in a directory that is deleted with the rest of the unfinished work."""

    def __init__(
        self, work: Unfinished | None, directory: Path, ranks: Ranks = ALONE, *, sums: Path | None = None
    ) -> None:
        """Changes nothing yet.

        Args:
            work: Of which the search is a part. Of several ranks the first has it, and the others, with ``None``, learn
                from it what is there.
            directory: That of ``work``, or one below it for each search of a sweep.
            ranks: Who searches.
            sums: Directory for what does not depend on the sparsity, which a sweep's searches share; by default it is
                below ``directory``.
        """
        self._work = work
        self._ranks = ranks
        self._sums = sums or directory / "sums"
        self.directory = directory

    def save(self, plan: PruningPlan) -> None:
        """Writes the plan as it is now. From the first on, what was measured stays however the command ends."""
        if self._work is not None:
            self.directory.mkdir(parents=True, exist_ok=True)
            plan.save(self.directory)
            self._work.worth_keeping = True

    def load(self) -> PruningPlan | None:
        """The plan of an interrupted search; ``None`` if none was saved yet.

        Raises:
            SenteiError: It is damaged.
        """
        found = self._work is not None and (self.directory / PLAN_FILE).exists()
        return plan_of_first(load_plan(self.directory) if found else None, self._ranks)

    def share(self, blank: PlanDocument, stage: str) -> Shared:
        """How the sums of a stage are divided, and what is there of them.

        Args:
            blank: The plan that the search begins with. Searches of a sweep, whose plans differ in the sparsity alone,
                have the same sums; those of another text, model or precision count as not there.
            stage: Its name.

        Raises:
            SenteiError: What is there is damaged.
        """
        identity = {key: value for key, value in identity_of(blank).items() if key != "target_sparsity"}
        files, work = StageFiles(self._sums, f"{stage} {digest_of(identity)}"), self._work
        found = files.load(stage) if work is not None else None
        said, tensors = self._ranks.from_first(*(reversed(found) if found else ()))

        def save(sums: Mapping[str, torch.Tensor], progress: Mapping[str, Any]) -> None:
            assert work is not None
            files.save(stage, sums, progress)
            work.worth_keeping = True

        return Shared(ranks=self._ranks, save=save, saved=None if said is None else (tensors, said))


def plan_of_first(plan: PruningPlan | None, ranks: Ranks) -> PruningPlan | None:
    """The first rank's plan, in all of them; without the hashes of text, which each has of its own."""
    if not ranks.several:
        return plan
    arrays = {} if plan is None else {f"{layer}": torch.from_numpy(each) for layer, each in enumerate(plan.importance)}
    document, arrays = ranks.from_first(None if plan is None else document_to_json(plan.document), arrays)
    if document is None or ranks.is_first:
        return plan
    importance = tuple(arrays[f"{layer}"].numpy() for layer in range(len(arrays)))
    return PruningPlan(PlanDocument.model_validate_json(document), importance)


def find_search(out: Path, *, force: bool, resume: bool, is_sweep: bool = False) -> Unfinished:
    """Looks for an interrupted search, or a sweep's, which are in directories below; see :class:`Unfinished`.

    Raises:
        SenteiError: See there; or a search would be resumed as a sweep, or a sweep as a search.
    """
    work = Unfinished(out, SEARCH, force=force, resume=resume)
    if work.resumed:
        directory, names = work.directory, (PLAN_FILE, str(SEARCH.identity_file))
        of_one = any((directory / name).exists() for name in names)
        if is_sweep and of_one:
            raise SenteiError(
                f"{directory} holds an interrupted search for one sparsity.",
                "Resume that search, or use --force to start over.",
            )
        if not is_sweep and not of_one and any(any(directory.glob(f"*/{name}")) for name in names):
            raise SenteiError(
                f"{directory} holds an interrupted sweep.", "Resume the sweep, or use --force to start over."
            )
    return work


def identity_of(blank: PlanDocument) -> dict[str, Any]:
    """What a search depends on: the plan that it begins with, but for what the search fills in.

    Of compensation it depends only on whether there will be any.
    """
    asked = blank.model_dump(mode="json", exclude=_MEASURED)
    if blank.target is not None:
        del asked["target_sparsity"]  # what the target has led to
    return {**asked, "compensation": blank.compensation is not None}


def read_identity(directory: Path) -> Mapping[str, Any] | None:
    """What the search in a directory was begun with; for :func:`toolchain.outputs.begin_with`.

    The plan says it, and before there is one a file of its own; earlier versions wrote the plan alone.

    Raises:
        SenteiError: The plan or the file is damaged.
    """
    if (directory / PLAN_FILE).exists():
        return identity_of(load_plan(directory).document)
    if (before := identity_on_disk(directory, SEARCH)) is None:
        # An earlier version was killed between these scores and the first plan: nothing is lost.
        (directory / SCORES_FILE).unlink(missing_ok=True)
    return before


def begin_search(directory: Path, blank: PlanDocument) -> None:
    """Takes one of a sweep's directories for a search; see :func:`toolchain.outputs.begin_with`."""
    begin_with(directory, SEARCH, identity_of(blank), read=read_identity)
