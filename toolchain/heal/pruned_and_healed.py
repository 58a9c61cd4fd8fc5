"""Pruning and healing as one job: the pruned model waits beside the output until it is healed."""

from pathlib import Path
from typing import Any

from toolchain.checkpoint.directory import Checkpoint, dtype_name
from toolchain.documents import read_document
from toolchain.errors import CheckFailedError
from toolchain.heal.heal import HealSettings, check_healing, heal
from toolchain.outputs import (
    START_OVER,
    UNHEALED,
    Unfinished,
    check_output_directory,
    replace_directory,
    writes_directory,
)
from toolchain.plan.plan import load_plan
from toolchain.plan.summary_document import PRUNING_SUMMARY_FILE, PruningSummary
from toolchain.progress import NOBODY, Listener
from toolchain.prune.pipeline import prepare, prune
from toolchain.prune.settings import PruneSettings
from toolchain.prune.unfinished import identity_of


@writes_directory
def prune_and_heal(
    checkpoint: Checkpoint,
    out: Path,
    pruning: PruneSettings,
    healing: HealSettings,
    *,
    model_name: str,
    force: bool = False,
    resume: bool = False,
    listener: Listener = NOBODY,
) -> dict[str, Any]:
    """Prunes a model, heals it, and writes what :func:`toolchain.heal.heal.heal` writes.

    Until both are done, the work lies in ``<out>.unhealed``: the pruned model is ``pruned`` there.

    Args:
        checkpoint: The unpruned model, from which the pruned one learns.
        out: The directory to create.
        pruning: See :func:`toolchain.prune.pipeline.prune`.
        healing: See :func:`toolchain.heal.heal.heal`.
        model_name: What plan and model card call the original.
        force: Replace ``out`` if it is not empty, and what was interrupted.
        resume: Go on with what was interrupted.
        listener: Hears of every window, candidate, step and tensor, and of what :func:`toolchain.heal.heal.heal` says.

    Returns:
        The summary of the pruning, and under ``healing`` the record that the plan ends with.

    Raises:
        SenteiError: Bad input; nothing was written. Or what failed later; what was done so far stays.
        CheckFailedError: Healing did not help, and ``out`` holds the pruned model. Or the pruned model does not compute
            what was planned, and there is none.
        MissingDependencyError: PEFT or accelerate is not installed.
    """
    check_healing(checkpoint, healing)
    check_output_directory(out, force=force, inputs=[checkpoint.directory, *pruning.input_files])
    work = Unfinished(out, UNHEALED, force=force, resume=resume)
    pruned, healed = work.directory / "pruned", work.directory / "healed"
    identity = identity_of(prepare(checkpoint, pruning, model_name).blank)
    with work.working({**identity, **_identity_of(healing)}):
        work.worth_keeping = True
        if not pruned.exists():
            prune(checkpoint, pruned, pruning, model_name=model_name, resume=resume, progress=listener.progress)
        summary = read_document(pruned / PRUNING_SUMMARY_FILE, PruningSummary, hint=START_OVER)
        try:
            if not healed.exists():
                heal(pruned, checkpoint.directory, healed, healing, resume=resume, listener=listener)
        except CheckFailedError as error:
            _finish(pruned, out, force=force)
            raise CheckFailedError(error.message, f"{out} holds the model as it was pruned.") from error
        record = load_plan(healed).document.healing[-1]
        _finish(healed, out, force=force)
    return {**summary.content(), "healing": record.model_dump()}


def _identity_of(healing: HealSettings) -> dict[str, Any]:
    """What the healed weights depend on beside the pruned ones and the text, as JSON."""
    return {
        "heal_steps": healing.steps,
        "heal_batch_size": healing.batch_size,
        "heal_seq_len": healing.seq_len,
        "heal_learning_rate": healing.learning_rate,
        "heal_lora_rank": healing.lora_rank,
        "heal_seed": healing.seed,
        "heal_dtype": dtype_name(healing.dtype),
    }


def _finish(directory: Path, out: Path, *, force: bool) -> None:
    """Puts what is finished in its place."""
    check_output_directory(out, force=force)
    replace_directory(directory, out)
