"""A proof of concept from beginning to end: checks, steps, and the decision; writes ``verdict.json``."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from serving.decision.capacity import as_csv, capacity_rows
from serving.decision.document import VERDICT_FILE, CandidateRecord, OriginalRecord, VerdictDocument
from serving.decision.lights import lights_of
from serving.decision.pareto import better_ones, points_of
from serving.decision.verdict import decide
from serving.poc.document import POC_FILE, PocDocument
from serving.poc.measured import GOODPUT, gain_metric
from serving.poc.plan_of_steps import Step, Steps, file_name, swept_by
from serving.poc.prepare import Prepared, amounts_of
from serving.poc.run_steps import StepRunner
from serving.poc.time_needed import seconds_of
from serving.poc.walk import Walk, expected_steps
from toolchain.checkpoint.directory import model_name
from toolchain.errors import SenteiError
from toolchain.outputs import claimed_file, write_text

CAPACITY_FILE = "capacity.csv"
_MARK = "steps"
_RATE_WORDS = {
    True: "highest rate within the limits (goodput), per server",
    False: "rate at the measured concurrency, per server, which may take more: GPUs and cost need limits, below "
    "workload in poc.yaml",
}


def run_poc(prepared: Prepared, out: Path, *, tell: Callable[[str], None] = lambda message: None) -> VerdictDocument:
    """Runs every step that is not finished, and decides.

    Args:
        prepared: See :func:`prepare`.
        out: Holds every step's output, so that each can be looked at, and a step that is finished is never run again.
        tell: Told one line at a time.

    Returns:
        What ``verdict.json`` holds.

    Raises:
        SenteiError: A step failed without which nothing can be said; what was finished stays. Or another process is
            at work there.
    """
    _check_out(out)
    # The directory itself is not claimed: the steps' commands claim their places in it.
    with claimed_file(out / VERDICT_FILE, force=True):
        return _run(prepared, out, tell)


def _run(prepared: Prepared, out: Path, tell: Callable[[str], None]) -> VerdictDocument:
    steps = prepared.steps(out)
    (out / _MARK).mkdir(parents=True, exist_ok=True)
    write_text(out / POC_FILE, prepared.path.read_text(encoding="utf-8-sig"))
    runner = _runner(prepared, out, tell=tell, upcoming=lambda: expected_steps(steps, prepared.siblings, walk.possible))
    steps = _with_plans_that_are_there(steps, runner)
    walk = Walk(steps=steps, siblings=prepared.siblings, do=runner)
    candidates = walk.candidates()
    document = decided(prepared.poc, model_name(steps.model), walk.original(), candidates, gain_metric(walk.results))
    write_text(out / VERDICT_FILE, document.to_json(indent=1, ensure_ascii=False))
    write_text(
        out / CAPACITY_FILE,
        as_csv(document.capacity, document.capacity_inputs, _RATE_WORDS[document.gain_metric == GOODPUT]),
    )
    return document


def _runner(
    prepared: Prepared, out: Path, *, tell: Callable[[str], None], upcoming: Callable[[], list[Step]]
) -> StepRunner:
    amounts = amounts_of(prepared)
    return StepRunner(
        directory=out.resolve(), runs_in=prepared.path.resolve().parent, inputs=prepared.inputs_of,
        estimate=lambda step: seconds_of(step, prepared.poc, amounts), tell=tell, upcoming=upcoming,
    )  # fmt: skip


def _with_plans_that_are_there(steps: Steps, runner: StepRunner) -> Steps:
    """The steps, with the sweep as it was begun: a sparsity that was added later is searched for by itself.

    A sweep of all would be another one, and every candidate is made from it: all of them would be made again.
    """
    record = runner.record_of(steps.sweep)
    if record is None or record.exit_code not in (0, None):
        return steps
    there = replace(steps, swept=swept_by(record.command))
    # One that was interrupted would be gone on with for sparsities that nobody wants any more.
    unwanted = record.exit_code is None and not set(there.swept) <= set(swept_by(steps.sweep.arguments))
    return steps if unwanted or runner.key_of(there.sweep) != record.key else there


def decided(
    poc: PocDocument, model: str, original: OriginalRecord, candidates: Sequence[CandidateRecord], metric: str
) -> VerdictDocument:
    """The decision, from what was measured."""
    lit = [each.model_copy(update={"lights": lights_of(each, poc.guard_rails)}) for each in candidates]
    better = better_ones(points_of(lit, original.memory_bytes))
    lit = [each.model_copy(update={"better": list(better.get(each.name, []))}) for each in lit]
    capacity = capacity_rows(original, lit, poc.capacity, output_len=poc.workload.output_len)
    decision, candidate, reasons = decide(lit, capacity)
    load = poc.workload
    return VerdictDocument.model_validate(
        {
            "schema_version": 1, "kind": "verdict", "model": model, "engine": poc.engine, "gain_metric": metric,
            "workload": {
                "input_len": load.input_len, "output_len": load.output_len, "concurrency": load.concurrency
            },
            "guard_rails": poc.guard_rails, "decision": decision, "candidate": candidate, "reasons": reasons,
            "original": original, "candidates": lit, "capacity_inputs": poc.capacity, "capacity": capacity,
        }
    )  # fmt: skip


def planned(prepared: Prepared, out: Path) -> list[tuple[Step, float, bool]]:
    """Every step, if all sparsities hold, with its estimated seconds and whether it is finished in ``out``.

    Raises:
        SenteiError: ``out`` holds something else, or a damaged record of a step.
    """
    _check_out(out)
    runner = _runner(prepared, out, tell=lambda message: None, upcoming=list)
    steps = _with_plans_that_are_there(prepared.steps(out), runner)
    expected = expected_steps(steps, prepared.siblings, sorted(prepared.poc.candidates.sparsities))
    return [(step, runner.estimate(step), runner.is_done(step)) for step in expected]


def shown_directories(document: VerdictDocument, out: Path) -> list[Path]:
    """Where the candidate lies that the report shows in detail: the chosen one, else the furthest that was measured."""
    measured = [each for each in document.candidates if each.gain is not None]
    pruned = [each for each in measured or document.candidates if each.kind == "pruned"]
    chosen = next((each for each in document.candidates if each.name == document.candidate), None)
    shown = chosen or (pruned[-1] if pruned else None)
    if shown is None:
        return []
    name = file_name(shown.name)
    model = [] if shown.sparsity is None else [out / "models" / f"{shown.sparsity:g}"]
    found = [*model, *(out / kind / name for kind in ("evaluations", "exports", "benchmarks"))]
    return [each for each in found if each.is_dir()]


def _check_out(out: Path) -> None:
    """Refuses a directory in which something else lies."""
    if out.is_dir() and any(out.iterdir()) and not (out / _MARK).is_dir():
        raise SenteiError(f"{out} holds something that is no proof of concept.", "Give another directory.")
