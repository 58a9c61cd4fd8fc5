"""Plans for several sparsities of one model, which share it and the statistics of its neurons."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from toolchain.checkpoint.directory import Checkpoint, opened
from toolchain.outputs import check_output_directory, new_directory, write_text, writes_directory
from toolchain.plan.document import CompensationRecord, PlanDocument
from toolchain.plan.plan import PruningPlan
from toolchain.plan.sweep_document import SWEEP_FILE, SweepDocument, SweptPlan
from toolchain.progress import Progress, no_progress
from toolchain.prune.pipeline import Job, directory_of, prepare, removes_nothing, run_search, within_limit
from toolchain.prune.settings import PruneSettings
from toolchain.prune.unfinished import SearchState, begin_search, find_search


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
        SenteiError: Bad input; nothing was written. Or what failed later; the searches stay, as in
            :func:`toolchain.prune.pipeline.prune`.
    """
    check_output_directory(out, force=force, inputs=[directory_of(model), *settings.input_files])
    work = find_search(out, force=force, resume=resume, is_sweep=True)
    checkpoint = opened(model)
    jobs = [prepare(checkpoint, replace(settings, sparsity=sparsity), model_name) for sparsity in sparsities]
    with work.working():
        sums = work.directory / "sums"
        states = [SearchState(work, work.directory / f"{job.settings.sparsity:g}", sums=sums) for job in jobs]
        searched = _search_all(jobs, states, progress)
        # The model that they shared is gone from memory.
        plans = [_limited(*each, progress) for each in zip(jobs, searched, states, strict=True)]
        result = _sweep_summary(plans)
        with new_directory(out, force=force) as partial:
            for plan, entry in zip(plans, result.plans, strict=True):
                (partial / entry.directory).mkdir()
                plan.save(partial / entry.directory)
            write_text(partial / SWEEP_FILE, result.to_json())
    return result.content()


def _search_all(jobs: Sequence[Job], states: Sequence[SearchState], progress: Progress) -> list[PruningPlan]:
    """Searches one job after another; each begins with what the first one measured."""
    plans: list[PruningPlan] = []
    walk = jobs[0].computing.open(jobs[0].checkpoint)
    for job, state in zip(jobs, states, strict=True):
        begin_search(state.directory, job.blank)
        plan = state.load()
        if plan is None and plans:
            plan = _same_start(job.blank, plans[0])
        walk.layers.restore()
        plans.append(run_search(job, walk, plan, state, progress))
    return plans


def _limited(job: Job, plan: PruningPlan, state: SearchState, progress: Progress) -> PruningPlan:
    """The plan as far as its limit allows, by the models that it would lead to."""
    limited = within_limit(job, state, progress)
    if limited is None or removes_nothing(plan):
        return plan
    return limited.furthest(plan).plan.changed({"compensation": CompensationRecord()})


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
