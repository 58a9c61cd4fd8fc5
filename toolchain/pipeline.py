"""The main job: measure → plan → cut → write → prove."""

import json
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from toolchain.allocation import Allocation, allocate, block_parameters
from toolchain.attention_search import num_candidates, remove_attentions
from toolchain.calibration import TokenWindows, load_windows
from toolchain.checkpoint import Checkpoint, open_checkpoint
from toolchain.errors import CheckFailedError, SenteiError
from toolchain.evaluation import perplexity
from toolchain.importance import neuron_importance
from toolchain.model_card import model_card
from toolchain.modeling import load_model, load_tokenizer
from toolchain.output import check_output_directory, new_directory, write_text
from toolchain.plan import (
    SCHEMA_VERSION,
    BaseModelRecord,
    CalibrationRecord,
    PlanDocument,
    PlannedLayer,
    PruningPlan,
    top_neurons,
)
from toolchain.progress import Progress, no_progress
from toolchain.surgery import narrow_ffn, write_pruned

SUMMARY_FILE = "pruning_summary.json"
METHOD = "2ssp"


@dataclass(frozen=True, kw_only=True)
class PruneSettings:
    """What ``sentei prune`` was asked for.

    Attributes:
        sparsity: Fraction of decoder-block parameters to remove.
        calibration: Text file; ``None`` for the embedded text.
        num_samples: Calibration windows; stage 2 uses the first.
        seq_len: Tokens a window.
        align: FFN widths are multiples of this; 1 gives the published widths.
        attention_removals: Overrides the published formula.
        device: Computed on.
        dtype: Computed in; the checkpoint keeps the model's own.
        seed: Recorded and set, although 2SSP draws nothing at random.
    """

    sparsity: float
    calibration: Path | None
    num_samples: int
    seq_len: int
    align: int
    attention_removals: int | None
    device: str
    dtype: torch.dtype
    seed: int


def prune(
    model_directory: Path,
    out: Path,
    settings: PruneSettings,
    *,
    model_name: str,
    force: bool = False,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Runs both stages of 2SSP and writes the pruned checkpoint with its plan, summary and model card.

    Args:
        model_directory: The unpruned model.
        out: The directory to create.
        settings: See :class:`PruneSettings`.
        model_name: What plan and model card call the original.
        force: Replace ``out`` if it is not empty.
        progress: Told of every window, candidate and tensor.

    Returns:
        The summary, as in ``pruning_summary.json``.

    Raises:
        SenteiError: Bad input; nothing was written.
        CheckFailedError: The written checkpoint does not compute what was planned; it was deleted.
    """
    started = time.monotonic()
    check_output_directory(out, force=force, inputs=[model_directory])
    checkpoint = open_checkpoint(model_directory)
    allocation = allocate(
        block_parameters(checkpoint),
        settings.sparsity,
        align=settings.align,
        attention_removals=settings.attention_removals,
    )
    windows = load_windows(
        settings.calibration,
        load_tokenizer(model_directory),
        num_samples=settings.num_samples,
        seq_len=settings.seq_len,
    )
    transformers.set_seed(settings.seed)
    model = load_model(checkpoint, dtype=settings.dtype, device=settings.device)
    plan = make_plan(model, checkpoint, windows, allocation, settings, model_name, progress)
    del model
    return _write(checkpoint, plan, out, windows, settings, started, force=force, progress=progress)


def make_plan(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    windows: TokenWindows,
    allocation: Allocation,
    settings: PruneSettings,
    model_name: str,
    progress: Progress = no_progress,
) -> PruningPlan:
    """Decides what to remove; ``model`` is pruned in place on the way.

    Raises:
        SenteiError: NaN or Inf in activations or perplexity.
    """
    family, first_window = checkpoint.family, windows.ids[:1]
    with progress("Importance of neurons", len(windows.ids) + 1) as advance:
        importance = neuron_importance(model, family, windows.ids, on_window=advance)
        original = perplexity(model, first_window, on_window=advance).perplexity
    narrow_ffn(model, family, [top_neurons(s, w) for s, w in zip(importance, allocation.widths, strict=True)])
    after_stage_1 = perplexity(model, first_window).perplexity
    removals = allocation.num_attention_removals
    with progress("Search for attentions", num_candidates(len(allocation.widths), removals)) as advance:
        trace = remove_attentions(model, family, first_window, removals, on_candidate=advance)
    removed = {step.removed for step in trace}
    document = PlanDocument(
        schema_version=SCHEMA_VERSION,
        sentei_version=version("sentei"),
        method=METHOD,
        base_model=BaseModelRecord(
            name=model_name,
            model_type=checkpoint.family.model_type,
            num_hidden_layers=len(checkpoint.layout),
            intermediate_size=checkpoint.layout[0].intermediate_size,
            weights_sha256=checkpoint.fingerprint,
        ),
        target_sparsity=settings.sparsity,
        align=settings.align,
        metric="perplexity",
        metric_original=original,
        metric_after_stage_1=after_stage_1,
        dtype=dtype_name(settings.dtype),
        seed=settings.seed,
        calibration=CalibrationRecord(
            source=windows.source,
            sha256=windows.sha256,
            num_samples=len(windows.ids),
            seq_len=windows.ids.shape[1],
        ),
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
        layers=[
            PlannedLayer(layer=layer, attention="remove" if layer in removed else "keep", intermediate_size=width)
            for layer, width in enumerate(allocation.widths)
        ],
        trace=trace,
    )
    return PruningPlan(document, importance)


def apply_plan(
    plan: PruningPlan,
    model_directory: Path,
    out: Path,
    *,
    force: bool = False,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Applies a plan, edited or not, without searching.

    Returns:
        The summary, as in ``pruning_summary.json``; calibration perplexities only where the plan knows them.

    Raises:
        SenteiError: The plan does not fit the model.
    """
    started = time.monotonic()
    check_output_directory(out, force=force, inputs=[model_directory])
    checkpoint = open_checkpoint(model_directory)
    check_plan_fits(plan, checkpoint)
    return _write(checkpoint, plan, out, None, None, started, force=force, progress=progress)


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
    windows: TokenWindows | None,
    settings: PruneSettings | None,
    started: float,
    *,
    force: bool,
    progress: Progress,
) -> dict[str, Any]:
    with new_directory(out, force=force) as partial:
        with progress("Writing the checkpoint", len(checkpoint.tensors)) as advance:
            write_pruned(checkpoint, plan.layout, plan.kept_neurons, partial, on_tensor=lambda _name: advance())
        plan.save(partial)
        pruned = open_checkpoint(partial)
        measured = None
        if windows is not None and settings is not None:
            model = load_model(pruned, dtype=settings.dtype, device=settings.device)
            measured = perplexity(model, windows.ids[:1]).perplexity
            _check_as_planned(plan, measured)
        summary = summarise(checkpoint, pruned, plan, measured, time.monotonic() - started)
        write_text(partial / SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")
        write_text(partial / "README.md", model_card(plan, summary))
    return summary


def _check_as_planned(plan: PruningPlan, measured: float) -> None:
    document = plan.document
    planned = document.trace[-1].metric if document.trace else document.metric_after_stage_1
    # The same arithmetic on the same weights; what is left is the order of sums in batched matrix products.
    tolerance = 1e-4 if document.dtype == "float32" else 2e-2
    if abs(measured / planned - 1) > tolerance:
        raise CheckFailedError(
            f"The written checkpoint has perplexity {measured:.6g} on the calibration window, the search had "
            f"{planned:.6g}: it is not what was planned, and was deleted.",
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
        "calibration_perplexity": {
            "original": document.metric_original,
            "after_stage_1": document.metric_after_stage_1,
            "pruned": measured,
        },
        "duration_s": round(duration_s, 1),
    }
