"""The main job: measure → plan → cut → write → prove."""

import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers

from toolchain import embedded_text
from toolchain.allocation import (
    Allocation,
    Protected,
    allocate,
    alpha_of,
    block_parameters,
    reachable_removals,
)
from toolchain.block_removal import BLOCK_METHODS, EVOPRESS, num_blocks_to_remove, remove_blocks
from toolchain.calibration import TokenWindows, load_mixture
from toolchain.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from toolchain.compensation import compensate
from toolchain.errors import CheckFailedError, SenteiError
from toolchain.function_metric import FunctionMetric
from toolchain.layer_walk import LayerWalk
from toolchain.limits import LimitSettings, limit_asked
from toolchain.memory import give_back_freed_memory, is_out_of_memory, keep_freed_memory
from toolchain.metric_choice import choose_metric, question_file
from toolchain.metrics import Metric, PerplexityMetric, measure
from toolchain.model_card import model_card
from toolchain.modeling import bos_of, load_model, load_tokenizer
from toolchain.offload import open_offloaded
from toolchain.output import check_output_directory, new_directory, write_text
from toolchain.plan import PruningPlan
from toolchain.plan_document import (
    SCHEMA_VERSION,
    BaseModelRecord,
    CalibrationRecord,
    CompensationRecord,
    PlanDocument,
    ProtectedRecord,
)
from toolchain.progress import Progress, no_progress
from toolchain.search import Search
from toolchain.search_state import SearchState, search_directory
from toolchain.surgery import write_pruned
from toolchain.tensor_parallel import width_unit
from toolchain.text_sources import TextSource, local_paths

SUMMARY_FILE = "pruning_summary.json"
METHOD = "2ssp"


@dataclass(frozen=True, kw_only=True)
class PruneSettings:
    """What ``sentei prune`` was asked for.

    Attributes:
        sparsity: Fraction of decoder-block parameters to remove.
        method: ``2ssp``, or one of :data:`toolchain.block_removal.BLOCK_METHODS`, which know no other setting than
            ``evopress_budget``, calibration and computing.
        calibration: Texts and their weights; none for the embedded text.
        num_samples: Calibration windows; stage 2 uses the first of each text.
        seq_len: Tokens a window.
        align: FFN widths on each rank are multiples of this; 1, on a single rank, gives the published widths.
        attention_removals: Overrides the published formula.
        allocation: How many attentions go: ``formula``, as published but for ranked widths' own ``alpha``, or ``auto``,
            by measured damage.
        widths: Of the FFNs: ``uniform``, as published, or ``ranked``: gradients of the loss choose widths and neurons.
        protected: Layers left alone.
        search: ``exact``, or ``racing``: drop candidates that fall behind early.
        metric: Decides what is removed; see :func:`toolchain.metric_choice.choose_metric`.
        limit: How much damage is accepted.
        limit_metric: What the limit looks at, if that is another metric.
        tensor_parallel: Ranks that a server will split each layer over.
        compensate: Re-fit the output projections of what is left; see :mod:`toolchain.compensation`.
        evopress_budget: One of :data:`toolchain.evopress.BUDGETS`.
        offload: Keep one layer in memory instead of all.
        device: Computed on.
        dtype: Computed in; the checkpoint keeps the model's own.
        seed: Recorded and set; only EvoPress draws at random.
    """

    sparsity: float
    calibration: Sequence[TextSource]
    num_samples: int
    seq_len: int
    align: int
    attention_removals: int | None
    device: str
    dtype: torch.dtype
    seed: int
    method: str = METHOD
    allocation: str = "formula"
    widths: str = "uniform"
    protected: Protected = field(default_factory=Protected)
    search: str = "exact"
    metric: str = "perplexity"
    limit: LimitSettings = field(default_factory=LimitSettings)
    limit_metric: str | None = None
    tensor_parallel: int = 1
    compensate: bool = False
    evopress_budget: str = "paper"
    offload: bool = False

    @property
    def input_files(self) -> list[Path]:
        """Files and directories that texts and questions are read from."""
        asked = [question_file(name) for name in (self.metric, self.limit_metric) if name]
        return [*local_paths(source.text for source in self.calibration), *(file for file in asked if file)]


@dataclass(frozen=True, kw_only=True)
class Job:
    """A checked command with its text loaded, and no weights yet."""

    checkpoint: Checkpoint
    settings: PruneSettings
    windows: TokenWindows
    metric: Metric
    limit_metric: Metric | None
    blank: PlanDocument


def prune(
    model_directory: Path,
    out: Path,
    settings: PruneSettings,
    *,
    model_name: str,
    force: bool = False,
    resume: bool = False,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Runs both stages of 2SSP, or another method, and writes the checkpoint with its plan, summary and model card.

    Until it is done, the search lives in ``<out>.search``, a plan directory that is saved after every step. If the
    search fails after it has removed an attention or a block, it stays there: what made it fail may be mended, and it
    resumed.

    Args:
        model_directory: The unpruned model.
        out: The directory to create.
        settings: See :class:`PruneSettings`.
        model_name: What plan and model card call the original.
        force: Replace ``out`` if it is not empty, and an interrupted search.
        resume: Go on with an interrupted search.
        progress: Told of every window, candidate and tensor.

    Returns:
        The summary, as in ``pruning_summary.json``.

    Raises:
        SenteiError: Bad input; nothing was written.
        CheckFailedError: The limit does not allow even the first step: ``out`` holds the plan alone, which removes
            nothing. Or the written checkpoint does not compute what was planned; it was deleted.
    """
    started = time.monotonic()
    check_output_directory(out, force=force, inputs=[model_directory, *settings.input_files])
    state = SearchState(search_directory(out))
    if not (resume or force):
        state.check_free()
    job = prepare(model_directory, settings, model_name)
    plan = state.load(job.blank) if resume else None
    try:
        plan = search(job, plan, state, progress)
        if len(plan.steps) == 1 and plan.document.stopped_because:
            with new_directory(out, force=force) as partial:
                plan.save(partial)
            raise CheckFailedError(
                f"Nothing was removed: {plan.document.stopped_because}.",
                f"{out} holds what was measured; allow more, or search by another metric.",
            )
        computing = Computing(
            windows=job.windows.ids, dtype=settings.dtype, device=settings.device, offload=settings.offload
        )
        summary = _write(job.checkpoint, plan, out, computing, job.metric, started, force=force, progress=progress)
    except SenteiError:
        if not state.worth_keeping:
            state.remove()
        raise
    state.remove()
    return summary


def open_walk(checkpoint: Checkpoint, *, dtype: torch.dtype, device: str, offload: bool) -> LayerWalk:
    """A model ready to run layer by layer: in memory, or on disk but for the layer that runs."""
    # Weights, which come and go, are given back; activations, which come again with every layer, are kept.
    give_back_freed_memory()
    if offload:
        return open_offloaded(checkpoint, dtype=dtype, device=device)
    walk = LayerWalk(load_model(checkpoint, dtype=dtype, device=device), checkpoint.family)
    keep_freed_memory()
    return walk


def remove_planned(walk: LayerWalk, plan: PruningPlan) -> None:
    """Leaves of the original model's layers what the plan leaves; compensation is not part of it."""
    walk.layers.narrow(plan.kept_neurons)
    for layer in plan.removed_attention:
        walk.layers.remove_attention(layer)


def prepare(model_directory: Path, settings: PruneSettings, model_name: str) -> Job:
    """Checks what was asked for, and loads the text; see :func:`prune`.

    Raises:
        SenteiError: Bad input.
    """
    checkpoint = open_checkpoint(model_directory)
    allocation = allocation_of(checkpoint, settings)
    if allocation is None:
        search_kind = settings.evopress_budget if settings.method == EVOPRESS else "exact"
        settings = replace(settings, align=1, allocation=settings.method, widths="whole", search=search_kind)
    else:
        # From here on, and in the plan, only the multiple itself counts.
        unit = width_unit(checkpoint, align=settings.align, tensor_parallel=settings.tensor_parallel)
        settings = replace(settings, align=unit, tensor_parallel=1)
    tokenizer = load_tokenizer(model_directory)
    bos = bos_of(checkpoint.family, tokenizer)
    windows = load_mixture(
        settings.calibration, tokenizer, num_samples=settings.num_samples, seq_len=settings.seq_len, bos=bos
    )
    metric = choose_metric(settings.metric, windows.first_of_each, tokenizer, bos=bos)
    limit_metric = None
    if settings.limit_metric not in (None, settings.metric):
        if not settings.limit.given:
            raise SenteiError("--limit-metric needs a limit.", "Add --max-degradation, --max-metric or --min-metric.")
        limit_metric = choose_metric(str(settings.limit_metric), windows.first_of_each, tokenizer, bos=bos)
    _check_combination(settings, metric, limit_metric)
    blank = _blank_plan(checkpoint, settings, allocation, windows, metric, model_name)
    blank = blank.model_copy(update={"limit": limit_asked(settings.limit, limit_metric or metric)})
    return Job(
        checkpoint=checkpoint, settings=settings, windows=windows, metric=metric, limit_metric=limit_metric, blank=blank
    )


def allocation_of(checkpoint: Checkpoint, settings: PruneSettings) -> Allocation | None:
    """How 2SSP would split the target; ``None`` for a method that removes whole blocks.

    Raises:
        SenteiError: The method cannot reach the target.
    """
    sizes = block_parameters(checkpoint)
    if settings.method in BLOCK_METHODS:
        num_blocks_to_remove(sizes.num_hidden_layers, settings.sparsity)
        return None
    align = width_unit(checkpoint, align=settings.align, tensor_parallel=settings.tensor_parallel)
    removals = settings.attention_removals
    if settings.allocation == "auto":
        # Damage will choose one of these; with none of them, the formula's number says what is in the way.
        possible = reachable_removals(sizes, settings.sparsity, align=align, protected=settings.protected)
        removals = possible[0] if possible else None
    return allocate(
        sizes,
        settings.sparsity,
        align=align,
        alpha=alpha_of(settings.widths),
        attention_removals=removals,
        protected=settings.protected,
    )


def _check_combination(settings: PruneSettings, *metrics: Metric | None) -> None:
    if settings.offload and any(isinstance(metric, FunctionMetric) for metric in metrics):
        raise SenteiError("--offload keeps one layer in memory, and a metric function needs the whole model.")
    if settings.search == "racing" and settings.metric not in ("perplexity", "kl"):
        raise SenteiError(f"--search racing cannot race by {settings.metric}.", "Race by perplexity or kl.")
    if settings.compensate and settings.num_samples < 2:
        raise SenteiError("Compensation needs at least 2 calibration windows.", "Raise --samples or --no-compensate.")
    if settings.allocation == "auto" and settings.attention_removals is not None:
        raise SenteiError("--allocation auto chooses what --attention-removals says.", "Give one of them.")


def _blank_plan(
    checkpoint: Checkpoint,
    settings: PruneSettings,
    allocation: Allocation | None,
    windows: TokenWindows,
    metric: Metric,
    model_name: str,
) -> PlanDocument:
    """The plan a search begins with: where it comes from and where it wants to go."""
    published = allocation if settings.allocation == "formula" and settings.widths == "uniform" else None
    return PlanDocument(
        schema_version=SCHEMA_VERSION,
        sentei_version=version("sentei"),
        method=f"{settings.method}, compensated" if settings.compensate else settings.method,
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
        align=settings.align,
        allocation=settings.allocation if settings.attention_removals is None else "given",
        attention_removals=settings.attention_removals,
        widths=settings.widths,
        protected=ProtectedRecord(attention=sorted(settings.protected.attention), ffn=sorted(settings.protected.ffn)),
        search=settings.search,
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
        ),
        compensation=CompensationRecord() if settings.compensate else None,
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
        layers=[],
        stage_1=[],
        trace=[],
    )


def search(job: Job, plan: PruningPlan | None, state: SearchState, progress: Progress) -> PruningPlan:
    """Loads the model and searches, from the beginning or from ``plan``, saving each step in ``state``.

    Raises:
        SenteiError: A metric is NaN or Inf, or cannot tell candidates apart.
    """
    transformers.set_seed(job.settings.seed)
    settings = job.settings
    running = Search(
        walk=open_walk(job.checkpoint, dtype=settings.dtype, device=settings.device, offload=settings.offload),
        sizes=block_parameters(job.checkpoint),
        windows=job.windows.ids,
        metric=job.metric,
        limit_metric=job.limit_metric,
        save=state.save,
        progress=progress,
    )
    plan = replace(plan or running.begin(job.blank), text_hashes={"calibration": job.windows.passage_hashes})
    return remove_blocks(running, plan) if settings.method in BLOCK_METHODS else running.finish(plan)


@dataclass(frozen=True, kw_only=True)
class Computing:
    """What running a model takes.

    Attributes:
        windows: Calibration, int64 ``[num_samples, seq_len]``.
        dtype: Computed in.
        device: Computed on.
        offload: Keep one layer in memory instead of all.
    """

    windows: torch.Tensor
    dtype: torch.dtype
    device: str
    offload: bool

    def open(self, checkpoint: Checkpoint) -> LayerWalk:
        """A model ready to run."""
        return open_walk(checkpoint, dtype=self.dtype, device=self.device, offload=self.offload)


def apply_plan(
    plan: PruningPlan,
    model_directory: Path,
    out: Path,
    *,
    calibration: Sequence[TextSource] = (),
    device: str = "cpu",
    offload: bool = False,
    force: bool = False,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Applies a plan, edited or not, without searching; what was healed is not healed again.

    Args:
        plan: What to remove.
        model_directory: The unpruned model.
        out: The directory to create.
        calibration: What the plan was made with, if it compensates; see :class:`PruneSettings`.
        device: Where compensation computes, in the plan's dtype.
        offload: Keep one layer in memory while it does.
        force: Replace ``out`` if it is not empty.
        progress: Told of every layer and tensor.

    Returns:
        The summary, as in ``pruning_summary.json``; the metric after pruning is not measured.

    Raises:
        SenteiError: The plan does not fit the model, or the text is not the one it compensates with.
    """
    started = time.monotonic()
    texts = local_paths(source.text for source in calibration)
    check_output_directory(out, force=force, inputs=[model_directory, *texts])
    checkpoint = open_checkpoint(model_directory)
    check_plan_fits(plan, checkpoint)
    computing = None
    if plan.document.compensation is not None:
        windows = _windows_of(plan, checkpoint, calibration)
        dtype = getattr(torch, plan.document.dtype)
        computing = Computing(windows=windows, dtype=dtype, device=device, offload=offload)
    return _write(checkpoint, plan.unhealed(), out, computing, None, started, force=force, progress=progress)


def _windows_of(plan: PruningPlan, checkpoint: Checkpoint, calibration: Sequence[TextSource]) -> torch.Tensor:
    """The windows that a plan was made with, from the same text again."""
    record = plan.document.calibration
    if not calibration and record.source != embedded_text.SOURCE:
        raise SenteiError(
            f"This plan compensates: it re-fits weights on calibration text, which was {record.source}.",
            f"Give that text with --calibration ({record.num_samples} windows of {record.seq_len} tokens are taken).",
        )
    tokenizer = load_tokenizer(checkpoint.directory)
    windows = load_mixture(
        calibration,
        tokenizer,
        num_samples=record.num_samples,
        seq_len=record.seq_len,
        bos=bos_of(checkpoint.family, tokenizer),
    )
    if windows.sha256 != record.sha256:
        raise SenteiError(
            f"{windows.source} is not the text this plan was made with ({record.source}): its tokens differ.",
            "Give the same text, of a mixture in the same order with the same weights, or prune again.",
        )
    return windows.ids


def check_plan_fits(plan: PruningPlan, checkpoint: Checkpoint) -> None:
    """Checks that a plan was made for this very model.

    Raises:
        SenteiError: Names what differs.
    """
    base = plan.document.base_model
    if checkpoint.is_pruned:
        raise SenteiError(f"{checkpoint.directory} is pruned already.", "Apply the plan to the original model.")
    actual = {
        "model_type": checkpoint.family.model_type,
        "num_hidden_layers": len(checkpoint.layout),
        "intermediate_size": checkpoint.layout[0].intermediate_size,
    }
    for key, value in actual.items():
        if getattr(base, key) != value:
            raise SenteiError(
                f"The plan is for a model with {key} {getattr(base, key)!r}; {checkpoint.directory} has {value!r}."
            )
    if base.weights_sha256 != checkpoint.fingerprint:
        raise SenteiError(
            f"The plan was made for other weights than those in {checkpoint.directory} (fingerprints differ).",
            f"Use the model it names: {base.name}.",
        )


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` → ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def _write(
    checkpoint: Checkpoint,
    plan: PruningPlan,
    out: Path,
    computing: Computing | None,
    metric: Metric | None,
    started: float,
    *,
    force: bool,
    progress: Progress,
) -> dict[str, Any]:
    """Compensates if the plan says so, writes everything, and measures what was written against what was planned.

    Without a metric, only what was compensated is measured.
    """
    with new_directory(out, force=force) as partial, ExitStack() as stack:
        refitted: dict[str, TensorInfo] = {}
        if plan.document.compensation is not None and (plan.removed_attention or plan.narrows):
            assert computing is not None
            directory = Path(stack.enter_context(TemporaryDirectory(dir=out.parent, prefix=".refit-")))
            plan, refitted = _compensate(checkpoint, plan, computing, directory, progress)
        write_pruned(checkpoint, plan.layout, plan.kept_neurons, partial, refitted=refitted, progress=progress)
        plan.save(partial)
        pruned = open_checkpoint(partial)
        measured = None
        if computing is not None and (metric is not None or refitted):
            judge, planned = _planned_perplexity(checkpoint, plan, computing, metric, refitted=bool(refitted))
            walk = computing.open(pruned)
            perplexity = measure(walk, judge)
            _check_as_planned(plan, perplexity, planned)
            if metric is not None:
                measured = perplexity if metric is judge else measure(walk, metric)
        summary = summarise(checkpoint, pruned, plan, measured, time.monotonic() - started)
        write_text(partial / SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")
        write_text(partial / "README.md", model_card(plan, summary))
    return summary


def _compensate(
    checkpoint: Checkpoint, plan: PruningPlan, computing: Computing, directory: Path, progress: Progress
) -> tuple[PruningPlan, dict[str, TensorInfo]]:
    """Re-fits what the plan leaves; returns the plan with its record, and where the weights are."""
    original, pruned = computing.open(checkpoint), computing.open(checkpoint)
    remove_planned(pruned, plan)
    try:
        with progress("Compensation", len(plan.layout)) as advance:
            done = compensate(
                original,
                pruned,
                computing.windows,
                directory,
                dtypes={name: info.dtype for name, info in checkpoint.tensors.items()},
                on_layer=advance,
            )
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise SenteiError(
            "Memory ran out while weights were fitted again.",
            "Add --offload, prune with fewer --samples or --no-compensate, or use a larger machine.",
        ) from error
    record = CompensationRecord(
        refits=done.records, final_norm_factor=done.final_norm_factor, perplexity=done.perplexity
    )
    return plan.changed({"compensation": record}), done.tensors


def _planned_perplexity(
    checkpoint: Checkpoint, plan: PruningPlan, computing: Computing, metric: Metric | None, *, refitted: bool
) -> tuple[Metric, float | None]:
    """By what the written checkpoint is judged, and what it should be.

    Always perplexity: an accuracy jumps by a whole question where sums are rounded in another order, and a person's
    function may draw at random.
    """
    if isinstance(metric, PerplexityMetric) and not refitted:
        return metric, plan.document.metric_at_end
    judge = PerplexityMetric(computing.windows[:1])
    if refitted:
        assert plan.document.compensation is not None
        return judge, plan.document.compensation.perplexity
    walk = computing.open(checkpoint)
    remove_planned(walk, plan)
    return judge, measure(walk, judge)


def _check_as_planned(plan: PruningPlan, measured: float, planned: float | None) -> None:
    # The same arithmetic on the same weights; what is left is the order of sums in batched matrix products.
    tolerance = 1e-4 if plan.document.dtype == "float32" else 2e-2
    if planned is None or abs(measured - planned) > tolerance * abs(planned):
        raise CheckFailedError(
            f"The written checkpoint has perplexity {measured:.6g} on the calibration text, and {planned:.6g} was "
            "expected: it is not what was planned, and was deleted.",
            "Please report this.",
        )


def summarise(
    original: Checkpoint, pruned: Checkpoint, plan: PruningPlan, measured: float | None, duration_s: float
) -> dict[str, Any]:
    """What was removed and what it cost on the calibration window; the content of ``pruning_summary.json``."""
    document = plan.document

    def sizes(checkpoint: Checkpoint) -> dict[str, int]:
        return {
            "num_parameters": checkpoint.num_parameters,
            "num_block_parameters": checkpoint.num_block_parameters,
            "weight_bytes": checkpoint.weight_bytes,
        }

    return {
        "schema_version": 1,
        "kind": "pruning_summary",
        "original": {"name": document.base_model.name, **sizes(original)},
        "pruned": {"name": f"{document.base_model.name}, pruned", **sizes(pruned)},
        "sparsity": 1 - pruned.num_block_parameters / original.num_block_parameters,
        "removed_attention": list(plan.removed_attention),
        "intermediate_size": [layer.intermediate_size for layer in plan.layout],
        "calibration_metric": {
            "name": document.metric,
            "source": document.metric_source,
            "original": document.metric_original,
            "after_stage_1": None if document.block_steps else document.metric_after_stage_1,
            "after_stage_2": document.metric_at_end,
            "pruned": measured,
        },
        "num_refitted": len(document.compensation.refits) if document.compensation else 0,
        "stopped_because": document.stopped_because,
        "duration_s": round(duration_s, 1),
    }
