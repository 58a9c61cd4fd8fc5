"""The main job: measure → plan → checkpoint."""

import gc
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
import transformers

from toolchain.checkpoint.directory import Checkpoint, dtype_name, opened
from toolchain.checkpoint.tensor_parallel import width_unit
from toolchain.documents import read_document
from toolchain.errors import CheckFailedError, SenteiError
from toolchain.metrics.choose import TOKEN_METRICS, choose_metric
from toolchain.metrics.model_metric import ModelMetric
from toolchain.metrics.question_metrics import CountingMetric
from toolchain.metrics.token_metrics import Metric, PerplexityMetric
from toolchain.metrics.written import WrittenMetric
from toolchain.model.context_length import check_window, context_length
from toolchain.model.layer_walk import LayerWalk
from toolchain.model.loading import bos_of, load_tokenizer, needed_bos
from toolchain.outputs import START_OVER, check_output_directory, new_directory, write_text, writes_directory
from toolchain.plan.document import (
    SCHEMA_VERSION,
    BaseModelRecord,
    CalibrationRecord,
    CompensationRecord,
    PlanDocument,
    ProtectedRecord,
    TextSourceRecord,
)
from toolchain.plan.plan import PruningPlan
from toolchain.plan.summary_document import TwoRemovalsSummary
from toolchain.progress import Progress, no_progress
from toolchain.prune.aim import blank_record, check_aim, find_shape, most_removals, widths_to_choose
from toolchain.prune.apply import Computing, Planned, realise, write_planned
from toolchain.prune.block_methods.run import num_blocks_to_remove, remove_blocks
from toolchain.prune.budget.allocation import (
    Allocation,
    allocate,
    alpha_of,
    block_parameters,
)
from toolchain.prune.budget.limits import limit_asked
from toolchain.prune.memory_needed import check_memory, device_map_within
from toolchain.prune.search.damages import predict_damages
from toolchain.prune.search.two_removals import asks_for_two_removals, two_removals
from toolchain.prune.search.two_stage import Search
from toolchain.prune.settings import Aim, PruneSettings
from toolchain.prune.unfinished import SearchState, find_search, identity_of, read_identity
from toolchain.prune.within_limit import WithinLimit
from toolchain.ranks.ranks import ALONE, Ranks
from toolchain.text.windows import TokenWindows, load_mixture, windows_apart


@dataclass(frozen=True, kw_only=True)
class Job:
    """A checked command with its text loaded, and no weights yet.

    Attributes:
        checkpoint: The unpruned model.
        settings: As the plan records them.
        allocation: See :func:`allocation_of`.
        windows: Calibration.
        metric: Decides what is removed.
        limit_metric: What the limit looks at, if that is another metric or other windows.
        blank: The plan that the search begins with.
        device_map: See :func:`toolchain.prune.memory_needed.device_map_within`.
    """

    checkpoint: Checkpoint
    settings: PruneSettings
    allocation: Allocation | None
    windows: TokenWindows
    metric: Metric
    limit_metric: Metric | None
    blank: PlanDocument
    device_map: Mapping[str, str] | None

    @property
    def computing(self) -> Computing:
        """What running the model takes."""
        settings = self.settings
        return Computing(
            windows=self.windows.ids, dtype=settings.dtype, device=settings.device, offload=settings.offload,
            device_map=self.device_map,
        )  # fmt: skip

    def search(self, walk: LayerWalk, state: SearchState, progress: Progress) -> Search:
        """The search, over an unpruned model."""
        return Search(
            walk=walk,
            sizes=block_parameters(self.checkpoint),
            windows=self.windows.ids,
            metric=self.metric,
            allocation=self.allocation,
            limit_metric=self.limit_metric,
            tie_breaker=PerplexityMetric(self.windows.first_of_each),
            save=state.save,
            progress=progress,
        )


@writes_directory
def prune(
    model: Path | Checkpoint,
    out: Path,
    settings: PruneSettings,
    *,
    model_name: str,
    force: bool = False,
    resume: bool = False,
    progress: Progress = no_progress,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Runs both stages of 2SSP, or another method, and writes the checkpoint with its plan, summary and model card.

    Until it is done, the search lives in ``<out>.search``, a plan directory that is saved after every step. It stays
    there whatever ends the run once the unpruned model was measured: what made it fail may be mended, and it resumed.

    Args:
        model: The unpruned model: its directory, or opened already.
        out: The directory to create.
        settings: See :class:`PruneSettings`.
        model_name: What plan and model card call the original.
        force: Replace ``out`` if it is not empty, and an interrupted search.
        resume: Go on with an interrupted search.
        progress: Told of every window, candidate and tensor.
        ranks: Who shares the work. The first alone reads and writes what is at ``out``; the others come to the same
            plan and return the same summary.

    Returns:
        The summary, as in ``pruning_summary.json``.

    Raises:
        SenteiError: Bad input; nothing was written. Or what failed later, memory for instance; the search stays.
        CheckFailedError: The limit does not allow even the first step: ``out`` holds the plan alone, which removes
            nothing. Or the written checkpoint does not compute what was planned; it was deleted.
    """
    started = time.monotonic()
    if not ranks.is_first:
        job = prepare(model, settings, model_name, ranks)
        _search_and_realise(job, SearchState(None, out, ranks), progress, ranks)
        return cast(dict[str, Any], ranks.from_first()[0])
    check_output_directory(out, force=force, inputs=[directory_of(model), *settings.input_files])
    work = find_search(out, force=force, resume=resume)
    job = prepare(model, settings, model_name, ranks)
    with work.working(identity_of(job.blank), read=read_identity):
        planned = _search_and_realise(job, SearchState(work, work.directory, ranks), progress, ranks)
        if not removes_nothing(planned.plan):
            with new_directory(out, force=force) as partial:
                summary = write_planned(job.checkpoint, planned, partial, job.computing, job.metric, started, progress)
            return cast(dict[str, Any], ranks.from_first(summary)[0])
        with new_directory(out, force=force) as partial:
            planned.plan.save(partial)
    raise CheckFailedError(
        f"Nothing was removed: {planned.plan.document.stopped_because}.",
        f"{out} holds what was measured; allow more, or search by another metric.",
    )


def _search_and_realise(job: Job, state: SearchState, progress: Progress, ranks: Ranks) -> Planned:
    """The plan and its weights, as far as the limit allows. No model is in memory when it returns."""
    if job.settings.aim is not None:
        _choose_shape(job, job.settings.aim, state, progress)
    limited = within_limit(job, state, progress)
    plan, target, two_removals = _realised_target(job, state, limited, progress, ranks)
    if removes_nothing(plan) or not ranks.is_first:
        return Planned(plan)
    planned = target if limited is None else limited.furthest(plan, target)
    assert planned is not None
    # Of a plan with fewer steps something else would be true.
    return replace(planned, two_removals=None if planned.plan.document.stopped_because else two_removals)


def _choose_shape(job: Job, aim: Aim, state: SearchState, progress: Progress) -> None:
    """Saves a plan that knows its widths and its number of attentions. No model is in memory while it is measured."""
    plan = state.load()
    if plan is not None and plan.document.target_intermediate_size:
        return
    settings, sizes = job.settings, block_parameters(job.checkpoint)
    walk = job.computing.open(job.checkpoint)
    transformers.set_seed(settings.seed)
    search = replace(job.search(walk, state, progress), share=lambda stage: state.share(job.blank, stage))
    plan = plan or search.begin(job.blank)
    removals = most_removals(sizes.num_hidden_layers, settings.protected)
    damages = predict_damages(search, plan, widths_to_choose(aim, settings.align), removals)
    del walk, search
    gc.collect()  # the hooks of a model that is spread over several GPUs hold it in circles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the engine that measures needs what the model had
    record = find_shape(aim, damages, state.directory / "target", progress)
    taken = record.followed
    assert taken is not None, "a search for a shape ends with one"
    lost = sum(sizes.intermediate_size - width for width in taken.intermediate_size) * sizes.neuron
    lost += len(taken.removed_attention) * (sizes.attention + sizes.attention_norm)
    changes = {
        "target": record,
        "target_sparsity": lost / sizes.total,
        "target_intermediate_size": taken.intermediate_size,
        "target_attention_removals": len(taken.removed_attention),
    }
    state.save(plan.changed(changes))


def _realised_target(
    job: Job, state: SearchState, limited: WithinLimit | None, progress: Progress, ranks: Ranks
) -> tuple[PruningPlan, Planned | None, TwoRemovalsSummary | None]:
    """What the search ends with, and its weights unless it removes nothing or is known to break the limit."""
    walk = replace(job.computing, ranks=ranks).open(job.checkpoint)
    plan = run_search(job, walk, state.load(), state, progress, ranks)
    # What a limit allows is found out by the first rank alone.
    if removes_nothing(plan) or (limited is not None and (not ranks.is_first or limited.breaks(plan))):
        return plan, None, None
    found = _two_removals(job, walk, plan, state, progress) if ranks.is_first else None
    computing = job.computing if limited else replace(job.computing, ranks=ranks)
    directory = limited.compensation_of(plan) if limited else state.directory / "compensation"
    planned = realise(walk, job.checkpoint, plan, computing, directory, metric=job.metric, progress=progress)
    return plan, planned, found


def _two_removals(
    job: Job, walk: LayerWalk, plan: PruningPlan, state: SearchState, progress: Progress
) -> TwoRemovalsSummary | None:
    """What removing attentions would cost and gain, where the search removes none; measured once."""
    if not asks_for_two_removals(plan):
        return None
    file = state.directory / "two_removals.json"
    if file.exists():
        return read_document(file, TwoRemovalsSummary, hint=START_OVER)
    try:
        found = two_removals(job.search(walk, state, progress), job.checkpoint, plan)
    except SenteiError:
        # Nobody asked for those models: that one of them cannot be measured is no reason to fail.
        return None
    write_text(file, found.model_dump_json() + "\n")
    return found


def within_limit(job: Job, state: SearchState, progress: Progress) -> WithinLimit | None:
    """What finds out how far the compensated model may go; ``None`` where the search itself does, or has no limit."""
    if job.blank.limit is None or job.blank.compensation is None:
        return None
    return WithinLimit(
        checkpoint=job.checkpoint,
        computing=job.computing,
        metric=job.metric,
        limit_metric=job.limit_metric or job.metric,
        search=lambda walk: job.search(walk, state, progress),
        directory=state.directory,
        progress=progress,
    )


def removes_nothing(plan: PruningPlan) -> bool:
    """Whether the limit does not allow even the first step."""
    return len(plan.steps) == 1 and plan.document.stopped_because is not None


def directory_of(model: Path | Checkpoint) -> Path:
    """Where a model lies, opened or not."""
    return model.directory if isinstance(model, Checkpoint) else model


def prepare(model: Path | Checkpoint, settings: PruneSettings, model_name: str, ranks: Ranks = ALONE) -> Job:
    """Checks what was asked for, and loads the text; see :func:`prune`.

    Raises:
        SenteiError: Bad input, or ranks that would not do the same.
    """
    checkpoint = opened(model)
    check_window(checkpoint.directory, checkpoint.config, settings.seq_len)
    allocation = allocation_of(checkpoint, settings)
    if not settings.spread:
        check_memory(checkpoint, settings, processes=ranks.num_sharing(torch.device(settings.device)))
    settings = _as_recorded(checkpoint, settings)
    tokenizer = load_tokenizer(checkpoint.directory)
    bos = (bos_of if settings.as_served else needed_bos)(checkpoint.family, tokenizer)
    windows = load_mixture(
        settings.calibration, tokenizer, num_samples=settings.num_samples, seq_len=settings.seq_len, bos=bos
    )

    longest = context_length(checkpoint.config).extended

    def chosen(name: str, ids: torch.Tensor) -> Metric:
        return choose_metric(
            name, ids, tokenizer, longest=longest, bos=bos, chat_template=settings.chat_template
        )  # fmt: skip

    metric = chosen(settings.metric, windows.first_of_each)
    limit_metric, apart = None, tuple[TextSourceRecord, ...]()
    name = settings.limit_metric or settings.metric
    if not settings.limit.given:
        if name != settings.metric:
            raise SenteiError("--limit-metric needs a limit.", "Add --max-degradation, --max-metric or --min-metric.")
    elif name in TOKEN_METRICS:
        ids, apart = windows_apart(settings.calibration, tokenizer, windows)
        limit_metric = chosen(name, ids)
    elif name != settings.metric:
        limit_metric = chosen(name, windows.first_of_each)
    _check_combination(settings, metric, limit_metric)
    blank = _blank_plan(checkpoint, settings, allocation, windows, metric, model_name)
    blank = blank.model_copy(update={"limit": limit_asked(settings.limit, limit_metric or metric, apart)})
    kind = settings.device.partition(":")[0]
    computing = {"device": kind, "offload": settings.offload, "spread": settings.spread}
    ranks.check_same({**blank.model_dump(mode="json"), **computing})
    # Ranks agree on where the layers go, which they can when they are known to do the same.
    device_map = device_map_within(checkpoint, settings, ranks) if settings.spread else None
    return Job(
        checkpoint=checkpoint, settings=settings, allocation=allocation, windows=windows, metric=metric,
        limit_metric=limit_metric, blank=blank, device_map=device_map,
    )  # fmt: skip


def allocation_of(checkpoint: Checkpoint, settings: PruneSettings) -> Allocation | None:
    """How the sparsity is split between attentions and FFNs.

    A method that removes whole blocks splits nothing, and is checked all the same; so is a target, for which a shape is
    chosen later.

    Raises:
        SenteiError: The method cannot reach the target.
    """
    sizes = block_parameters(checkpoint)
    if settings.of_method.removes_blocks:
        num_blocks_to_remove(sizes.num_hidden_layers, settings.sparsity)
        return None
    align = width_unit(checkpoint, align=settings.align, tensor_parallel=settings.tensor_parallel)
    if settings.aim is not None:
        check_aim(settings.aim, checkpoint, align=align, protected=settings.protected)
        return None
    return allocate(
        sizes,
        settings.sparsity,
        align=align,
        alpha=alpha_of(settings.widths),
        attention_removals=settings.attention_removals,
        protected=settings.protected,
    )


def _as_recorded(checkpoint: Checkpoint, settings: PruneSettings) -> PruneSettings:
    """The settings as a plan records them."""
    if settings.of_method.removes_blocks:
        return replace(settings, align=1)
    # From here on, and in the plan, only the multiple itself counts.
    unit = width_unit(checkpoint, align=settings.align, tensor_parallel=settings.tensor_parallel)
    return replace(settings, align=unit, tensor_parallel=1)


def _check_combination(settings: PruneSettings, *metrics: Metric | None) -> None:
    if settings.offload and (whole := next((each for each in metrics if isinstance(each, ModelMetric)), None)):
        what = "a metric of written answers" if isinstance(whole, WrittenMetric) else "a metric function"
        raise SenteiError(f"--offload keeps one layer in memory, and {what} needs the whole model.")
    if settings.chat_template and not any(isinstance(each, CountingMetric) for each in metrics):
        raise SenteiError(
            "--chat-template is for the questions of --metric, such as accuracy:FILE, and there are none.",
            "Leave it out: chats in a text (field messages) go through the chat template by themselves.",
        )
    if settings.search == "racing" and settings.metric not in TOKEN_METRICS:
        raise SenteiError(f"--search racing cannot race by {settings.metric}.", "Race by perplexity or kl.")
    if settings.compensate and settings.num_samples < 2:
        raise SenteiError("Compensation needs at least 2 calibration windows.", "Raise --samples or --no-compensate.")


def _allocation(settings: PruneSettings) -> str | None:
    """How the plan says that the target is split; null for methods that remove whole blocks."""
    if settings.of_method.removes_blocks:
        return None
    if settings.aim is not None:
        return "target"
    return "formula" if settings.attention_removals is None else "given"


def _blank_plan(
    checkpoint: Checkpoint,
    settings: PruneSettings,
    allocation: Allocation | None,
    windows: TokenWindows,
    metric: Metric,
    model_name: str,
) -> PlanDocument:
    """The plan a search begins with: where it comes from and where it wants to go."""
    two_stage = not settings.of_method.removes_blocks
    # Ranked widths are known once gradients are.
    published = allocation if settings.widths == "uniform" else None
    return PlanDocument(
        schema_version=SCHEMA_VERSION,
        sentei_version=version("sentei"),
        method=settings.method,
        base_model=BaseModelRecord(
            name=model_name,
            model_type=checkpoint.family.model_type,
            num_hidden_layers=len(checkpoint.layout),
            intermediate_size=checkpoint.layout[0].intermediate_size,
            num_block_parameters=checkpoint.num_block_parameters,
            weights_sha256=checkpoint.fingerprint,
        ),
        target_sparsity=settings.sparsity,
        target_intermediate_size=list(published.widths) if published else [],
        target_attention_removals=published.num_attention_removals if published else 0,
        target=blank_record(settings.aim) if settings.aim else None,
        align=settings.align,
        attention_removals=settings.attention_removals,
        allocation=_allocation(settings),
        widths=settings.widths if two_stage else None,
        protected=ProtectedRecord(attention=sorted(settings.protected.attention), ffn=sorted(settings.protected.ffn)),
        search=settings.search if two_stage else None,
        evopress_budget=settings.evopress_budget if settings.of_method.has_budget else None,
        metric=metric.name,
        metric_source=metric.source,
        metric_source_sha256=metric.source_sha256,
        metric_higher_is_better=metric.higher_is_better,
        metric_original=0.0,
        limit=None,
        stopped_because=None,
        dtype=dtype_name(settings.dtype),
        seed=settings.seed,
        calibration=CalibrationRecord(
            source=windows.source,
            sha256=windows.sha256,
            num_samples=len(windows.ids),
            seq_len=windows.ids.shape[1],
            sources=list(windows.sources),
            bos=windows.bos,
            chat_template=windows.holds_chats,
        ),
        compensation=CompensationRecord() if settings.compensate else None,
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
        layers=[],
        stage_1=[],
        trace=[],
    )


def run_search(
    job: Job,
    walk: LayerWalk,
    plan: PruningPlan | None,
    state: SearchState,
    progress: Progress,
    ranks: Ranks = ALONE,
) -> PruningPlan:
    """Searches, from the beginning or from ``plan``, saving each step in ``state``.

    Args:
        job: What to do.
        walk: Over the unpruned model; afterwards with what the plan leaves of it.
        plan: To go on from.
        state: Where steps are saved.
        progress: Told of every window and candidate.
        ranks: Who shares the work.

    Raises:
        SenteiError: A metric is NaN or Inf, or cannot tell candidates apart.
    """
    transformers.set_seed(job.settings.seed)
    running = replace(job.search(walk, state, progress), ranks=ranks, share=lambda stage: state.share(job.blank, stage))
    plan = replace(plan or running.begin(job.blank), text_hashes={"calibration": job.windows.passage_hashes})
    return remove_blocks(running, plan) if job.settings.of_method.removes_blocks else running.finish(plan)
