"""A plan becomes a checkpoint: cut → compensate → write → prove."""

import hashlib
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from toolchain.checkpoint.directory import Checkpoint, TensorInfo, open_checkpoint
from toolchain.checkpoint.licences import licence_of_card
from toolchain.errors import CheckFailedError, SenteiError, is_out_of_memory
from toolchain.metrics.token_metrics import Metric, PerplexityMetric, measure
from toolchain.model.context_length import check_context
from toolchain.model.disk_layers import open_walk
from toolchain.model.layer_walk import LayerWalk
from toolchain.model.loading import load_tokenizer, needed_bos
from toolchain.model.slicing import write_pruned
from toolchain.outputs import check_output_directory, new_directory, write_text, writes_directory
from toolchain.plan.document import CompensationRecord, PlanDocument
from toolchain.plan.model_card import model_card
from toolchain.plan.plan import PruningPlan
from toolchain.plan.summary_document import (
    PRUNING_SUMMARY_FILE,
    CalibrationMetricRecord,
    CompensationSummary,
    LimitSummary,
    PruningSummary,
    SizeRecord,
    TwoRemovalsSummary,
)
from toolchain.plan.target_record import TargetRecord
from toolchain.progress import Progress, no_progress
from toolchain.prune.compensation import Compensated, compensate, held_out_windows
from toolchain.prune.stage_files import StageFiles
from toolchain.ranks.ranks import ALONE, Ranks
from toolchain.text import embedded
from toolchain.text.sources import TextSource, local_paths
from toolchain.text.windows import load_mixture


def remove_planned(walk: LayerWalk, plan: PruningPlan) -> None:
    """Leaves of the original model's layers what the plan leaves; compensation is not part of it."""
    walk.layers.restore()
    walk.layers.narrow(plan.kept_neurons)
    for layer in plan.removed_attention:
        walk.layers.remove_attention(layer)


@dataclass(frozen=True, kw_only=True)
class Computing:
    """What running a model takes.

    Attributes:
        windows: Calibration, int64 ``[num_samples, seq_len]``.
        dtype: Computed in.
        device: Computed on.
        offload: Keep one layer in memory instead of all.
        device_map: The GPU of each part of the model where it takes several; what is pruned of it goes there, too.
        ranks: Who shares it.
    """

    windows: torch.Tensor
    dtype: torch.dtype
    device: str
    offload: bool
    device_map: Mapping[str, str] | None = None
    ranks: Ranks = ALONE

    def open(self, checkpoint: Checkpoint) -> LayerWalk:
        """A model ready to run."""
        walk = open_walk(
            checkpoint, dtype=self.dtype, device=self.device, offload=self.offload, device_map=self.device_map
        )
        walk.num_sharing = self.ranks.num_sharing(walk.model.device)
        return walk


@writes_directory
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
    planned, computing = Planned(plan.unhealed()), None
    if plan.document.compensation is not None:
        windows = _windows_of(plan, checkpoint, calibration)
        dtype = getattr(torch, plan.document.dtype)
        computing = Computing(windows=windows, dtype=dtype, device=device, offload=offload)
    with new_directory(out, force=force) as partial:
        refits = partial / "refits"
        if computing is not None:
            plan = planned.plan
            planned = realise(computing.open(checkpoint), checkpoint, plan, computing, refits, progress=progress)
        summary = write_planned(checkpoint, planned, partial, computing, None, started, progress)
        shutil.rmtree(refits, ignore_errors=True)
    return summary


def _windows_of(plan: PruningPlan, checkpoint: Checkpoint, calibration: Sequence[TextSource]) -> torch.Tensor:
    """The windows that a plan was made with, from the same text again."""
    record = plan.document.calibration
    if not calibration and record.source != embedded.SOURCE:
        raise SenteiError(
            f"This plan compensates: it re-fits weights on calibration text, which was {record.source}.",
            f"Give that text with --calibration ({record.num_samples} windows of {record.seq_len} tokens are taken).",
        )
    check_context(
        checkpoint.directory, checkpoint.config, record.seq_len, asked=f"The plan's windows of {record.seq_len} tokens",
        hint="Prune again with shorter ones.",
    )  # fmt: skip
    tokenizer = load_tokenizer(checkpoint.directory)
    # Of plans that do not say, those of a family that needs BOS have it.
    bos = record.bos if record.bos is not None else needed_bos(checkpoint.family, tokenizer)
    windows = load_mixture(calibration, tokenizer, num_samples=record.num_samples, seq_len=record.seq_len, bos=bos)
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


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What the written checkpoint must show.

    Always perplexity: an accuracy jumps by a whole question where sums are rounded in another order, and a person's
    function may draw at random.

    Attributes:
        metric: What is measured.
        expected: Its value before the checkpoint was written.
    """

    metric: Metric
    expected: float | None


@dataclass(frozen=True)
class Planned:
    """A plan whose weights are known.

    Attributes:
        plan: What is removed, with the record of its compensation.
        refitted: Where weights are that are not the original's any more, by name.
        proof: What the checkpoint must show, if that is known.
        two_removals: What removing attentions would cost and gain, if the plan removes none.
    """

    plan: PruningPlan
    refitted: Mapping[str, TensorInfo] = field(default_factory=dict)
    proof: Proof | None = None
    two_removals: TwoRemovalsSummary | None = None


def realise(
    walk: LayerWalk,
    checkpoint: Checkpoint,
    plan: PruningPlan,
    computing: Computing,
    directory: Path,
    *,
    metric: Metric | None = None,
    progress: Progress = no_progress,
) -> Planned:
    """Compensates if the plan says so, and notes what the checkpoint must show.

    Args:
        walk: Over the unpruned model, with or without what a search took out. Not to be used afterwards.
        checkpoint: The same model.
        plan: What to remove.
        computing: What compensation takes.
        directory: Where compensation keeps what it has done, and goes on with what it had; made if need be. Of several
            ranks the first one's.
        metric: What will be measured; without one, only what was compensated is.
        progress: Told of every layer.

    Raises:
        SenteiError: Memory ran out.
    """
    if plan.document.compensation is not None and (plan.removed_attention or plan.narrows):
        done = _compensate(walk, checkpoint, plan, computing, directory, progress)
        record = _compensation_record(done)
        plan = plan.changed({"compensation": record})
        if record.taken:
            proof = Proof(metric=PerplexityMetric(computing.windows[:1]), expected=done.perplexity)
            return Planned(plan, done.tensors, proof)
        proof = Proof(
            metric=PerplexityMetric(held_out_windows(computing.windows)), expected=done.held_out_perplexity_before
        )
        return Planned(plan, {}, proof)
    if metric is None:
        return Planned(plan)
    if isinstance(metric, PerplexityMetric):
        return Planned(plan, {}, Proof(metric=metric, expected=plan.document.metric_at_end))
    remove_planned(walk, plan)
    first = PerplexityMetric(computing.windows[:1])
    return Planned(plan, {}, Proof(metric=first, expected=measure(walk, first)))


def write_planned(
    checkpoint: Checkpoint,
    planned: Planned,
    directory: Path,
    computing: Computing | None,
    metric: Metric | None,
    started: float,
    progress: Progress,
) -> dict[str, Any]:
    """Writes everything, and measures what was written against what was planned.

    Args:
        checkpoint: The unpruned model.
        planned: What to write.
        directory: Where to; it exists.
        computing: What measurement takes; ``None`` for none.
        metric: What to measure; without one, only what was compensated is.
        started: When all of it began, by ``time.monotonic()``.
        progress: Told of every tensor.

    Returns:
        The summary, as in ``pruning_summary.json``.

    Raises:
        CheckFailedError: The written checkpoint does not compute what was planned, and is of no use.
    """
    plan, proof = planned.plan, planned.proof
    write_pruned(checkpoint, plan.layout, plan.kept_neurons, directory, refitted=planned.refitted, progress=progress)
    plan.save(directory)
    pruned = open_checkpoint(directory)
    measured = None
    if computing is not None and proof is not None:
        walk = computing.open(pruned)
        perplexity = measure(walk, proof.metric)
        _check_as_planned(plan, perplexity, proof.expected)
        if metric is not None:
            measured = perplexity if metric is proof.metric else measure(walk, metric)
    summary = summarise(checkpoint, pruned, planned, measured, time.monotonic() - started)
    write_text(directory / PRUNING_SUMMARY_FILE, summary.to_json())
    licence = licence_of_card(checkpoint.directory)
    write_text(directory / "README.md", model_card(plan, summary.content(), licence=licence))
    return summary.content()


def _compensate(
    walk: LayerWalk,
    checkpoint: Checkpoint,
    plan: PruningPlan,
    computing: Computing,
    directory: Path,
    progress: Progress,
) -> Compensated:
    files = StageFiles(directory, _digest_of_fit(plan)) if computing.ranks.is_first else None
    try:
        with progress("Compensation", len(plan.layout)) as advance:
            walk.layers.restore()
            return compensate(
                walk,
                plan.kept_neurons,
                plan.removed_attention,
                computing.windows,
                files,
                dtypes={name: info.dtype for name, info in checkpoint.tensors.items()},
                ranks=computing.ranks,
                on_layer=advance,
            )
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise SenteiError(
            "Memory ran out while weights were fitted again.",
            "Add --offload, prune with fewer --samples or --no-compensate, or use a larger machine.",
        ) from error


def _digest_of_fit(plan: PruningPlan) -> str:
    """Of all that re-fitted weights depend on."""
    document = plan.document
    digest = hashlib.sha256(
        f"{document.base_model.weights_sha256} {document.calibration.sha256} {document.dtype} "
        f"{sorted(plan.removed_attention)}".encode()
    )
    for kept in plan.kept_neurons:
        digest.update(f" {len(kept)} ".encode() + kept.tobytes())
    return digest.hexdigest()


def _compensation_record(done: Compensated) -> CompensationRecord:
    """For the plan; weights that predict held-out text worse than those from before are not taken."""
    held_out: dict[str, Any] = {
        "held_out_perplexity_original": done.held_out_perplexity_original,
        "held_out_perplexity_before": done.held_out_perplexity_before,
        "held_out_perplexity_after": done.held_out_perplexity_after,
    }
    if done.made_worse:
        return CompensationRecord(taken=False, **held_out)
    return CompensationRecord(
        refits=done.records, final_norm_factor=done.final_norm_factor, perplexity=done.perplexity, **held_out
    )


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
    original: Checkpoint, pruned: Checkpoint, planned: Planned, measured: float | None, duration_s: float
) -> PruningSummary:
    """What was removed and what it cost on the calibration window."""
    plan, document, name = planned.plan, planned.plan.document, planned.plan.document.base_model.name
    return PruningSummary(
        schema_version=1,
        kind="pruning_summary",
        original=_size(name, original),
        pruned=_size(f"{name}, pruned", pruned),
        sparsity=1 - pruned.num_block_parameters / original.num_block_parameters,
        removed_attention=list(plan.removed_attention),
        intermediate_size=[layer.intermediate_size for layer in plan.layout],
        calibration_metric=CalibrationMetricRecord(
            name=document.metric,
            source=document.metric_source,
            original=document.metric_original,
            after_stage_1=None if document.block_steps else document.metric_after_stage_1,
            after_stage_2=document.metric_at_end,
            pruned=measured,
        ),
        num_refitted=len(document.compensation.refits) if document.compensation else 0,
        compensation=_compensation_summary(document.compensation),
        stopped_because=document.stopped_because,
        limit=None if measured is None else _limit_summary(document),
        num_ties=sum(step.ties is not None for step in document.trace),
        two_removals=planned.two_removals,
        target=_target_of(plan),
        duration_s=round(duration_s, 1),
    )


def _size(name: str, checkpoint: Checkpoint) -> SizeRecord:
    return SizeRecord(
        name=name,
        num_parameters=checkpoint.num_parameters,
        num_block_parameters=checkpoint.num_block_parameters,
        weight_bytes=checkpoint.weight_bytes,
    )


def _target_of(plan: PruningPlan) -> TargetRecord | None:
    """What the shape was chosen for; ``None`` of a plan that was cut or edited since."""
    target = plan.document.target
    if target is None or (taken := target.followed) is None:
        return None
    widths = [layer.intermediate_size for layer in plan.layout]
    same = (taken.intermediate_size, len(taken.removed_attention)) == (widths, len(plan.removed_attention))
    return target if same else None


def _limit_summary(document: PlanDocument) -> LimitSummary | None:
    """What the limit looked at; ``None`` where there was none."""
    limit, compensation = document.limit, document.compensation
    if limit is None or limit.measured is None:
        return None
    return LimitSummary(
        metric=limit.metric,
        source=limit.source,
        higher_is_better=limit.higher_is_better,
        value=limit.value,
        original=limit.original,
        measured=limit.measured,
        compensated=compensation is not None and bool(compensation.refits),
        num_windows=sum(each.num_windows for each in limit.windows) or None,
        text=" + ".join(each.source for each in limit.windows) or None,
    )


def _compensation_summary(record: CompensationRecord | None) -> CompensationSummary | None:
    """Whether re-fitted weights were taken, and why; ``None`` where none were made."""
    if record is None or record.held_out_perplexity_after is None:
        return None
    return CompensationSummary(
        held_out_perplexity_original=record.held_out_perplexity_original,
        held_out_perplexity_before=record.held_out_perplexity_before,
        held_out_perplexity_after=record.held_out_perplexity_after,
        taken=record.taken,
    )
