"""Plans for several sparsities of one model, which share the statistics of its neurons."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from toolchain.checkpoint.directory import Checkpoint, opened
from toolchain.errors import SenteiError
from toolchain.outputs import check_output_directory, new_directory, write_text, writes_directory
from toolchain.plan.document import PlanDocument
from toolchain.plan.plan import PLAN_FILE, PruningPlan
from toolchain.plan.sweep_document import SWEEP_FILE, SweepDocument, SweptPlan
from toolchain.progress import Progress, no_progress
from toolchain.prune.pipeline import Job, PruneSettings, directory_of, prepare, run_search
from toolchain.prune.unfinished import SearchState, search_directory
from toolchain.resuming import interrupted


@writes_directory
def sweep(
    model: Path | Checkpoint,
    out: Path,
    settings: PruneSettings,
    sparsities: Sequence[float],
    *,
    model_name: str,
    force: bool = False,
    resume: bool = False,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Searches for several sparsities and writes their plans, not the models; the statistics are shared.

    Args:
        model: The unpruned model: its directory, or opened already.
        out: The directory to create: one directory a plan, named by its sparsity, and ``sweep.json``.
        settings: For all of them; its own sparsity is not used.
        sparsities: Targets.
        model_name: What the plans call the original.
        force: Replace ``out`` if it is not empty, and an interrupted sweep.
        resume: Go on with an interrupted sweep.
        progress: Told of every window and candidate.

    Returns:
        The content of ``sweep.json``.

    Raises:
        SenteiError: Bad input; nothing was written, unless an attention was removed already, as in
            :func:`toolchain.prune.pipeline.prune`.
    """
    check_output_directory(out, force=force, inputs=[directory_of(model), *settings.input_files])
    unfinished = search_directory(out)
    _check_unfinished(unfinished, force=force, resume=resume)
    checkpoint = opened(model)
    jobs = [prepare(checkpoint, replace(settings, sparsity=sparsity), model_name) for sparsity in sparsities]
    plans = _search_all(jobs, unfinished, resume=resume, progress=progress)
    result = _sweep_summary(plans)
    with new_directory(out, force=force) as partial:
        for plan, entry in zip(plans, result.plans, strict=True):
            (partial / entry.directory).mkdir()
            plan.save(partial / entry.directory)
        write_text(partial / SWEEP_FILE, result.to_json())
    shutil.rmtree(unfinished, ignore_errors=True)
    return result.content()


def _check_unfinished(unfinished: Path, *, force: bool, resume: bool) -> None:
    """Refuses what is not an interrupted sweep that may be gone on with or replaced; removes what is replaced."""
    SearchState(unfinished).check_ours()
    if unfinished.exists() and not resume:
        if not force:
            raise interrupted(unfinished, "search")
        shutil.rmtree(unfinished)
    if (unfinished / PLAN_FILE).exists():
        raise SenteiError(
            f"{unfinished} holds an interrupted search for one sparsity.",
            "Resume that search, or use --force to start over.",
        )


def _search_all(jobs: Sequence[Job], unfinished: Path, *, resume: bool, progress: Progress) -> list[PruningPlan]:
    """Searches one job after another; each begins with what the first one measured."""
    states = [SearchState(unfinished / f"{job.settings.sparsity:g}") for job in jobs]
    plans: list[PruningPlan] = []
    walk = jobs[0].computing.open(jobs[0].checkpoint)
    try:
        for job, state in zip(jobs, states, strict=True):
            walk.layers.restore()
            plan = state.load(job.blank) if resume else None
            if plan is None and plans:
                plan = _same_start(job.blank, plans[0])
            plans.append(run_search(job, walk, plan, state, progress))
    except SenteiError:
        if not any(state.worth_keeping for state in states):
            shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return plans


def _same_start(blank: PlanDocument, other: PruningPlan) -> PruningPlan:
    """A plan that begins where another with the same model, text and metrics began."""
    measured = {name: getattr(other.document, name) for name in ("metric_original", "limit")}
    return replace(other, document=blank.model_copy(update=measured)).at([], [])


def _sweep_summary(plans: Sequence[PruningPlan]) -> SweepDocument:
    document = plans[0].document
    return SweepDocument(
        schema_version=1,
        kind="sweep",
        base_model=document.base_model,
        metric=document.metric,
        metric_original=document.metric_original,
        plans=[
            SweptPlan(
                directory=f"{plan.document.target_sparsity:g}",
                target_sparsity=plan.document.target_sparsity,
                sparsity=1 - plan.steps[-1].num_block_parameters / plan.steps[0].num_block_parameters,
                num_block_parameters=plan.steps[-1].num_block_parameters,
                metric=plan.steps[-1].metric,
                num_attention_removals=len(plan.document.trace),
                stopped_because=plan.document.stopped_because,
            )
            for plan in plans
        ],
    )
