"""The way through a proof of concept: which candidate is made next, and how far each is taken.

A candidate is evaluated first. One that damages too much is not exported and not measured: the next one would damage
more, and none of them may be deployed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from serving.benchmark.journal import RESULTS_FILE
from serving.benchmark.results_document import ResultsDocument
from serving.decision.document import CandidateRecord, OriginalRecord
from serving.decision.lights import damage_is_green, lights_of
from serving.decision.sparsities import next_sparsity
from serving.poc.answers import Quality, quality_of
from serving.poc.measured import original_record, read_results, with_quality, with_speed
from serving.poc.plan_of_steps import ORIGINAL, Step, Steps, percent
from serving.poc.run_steps import Outcome, fatal

TOO_DAMAGED = "Its quality is not shown to be within the guard rails, so it was not exported."


@dataclass(kw_only=True)
class Walk:
    """One proof of concept on its way.

    Attributes:
        steps: What its steps are.
        siblings: Directories of smaller models, by name.
        do: Runs a step, unless it is finished already.
        results: The benchmarks so far.
        held: The sparsities that were tried, and whether their damage was within the guard rails.
        seen: What was read of each text in calibration; see :attr:`CandidateRecord.seen`.
    """

    steps: Steps
    siblings: dict[str, Path]
    do: Callable[[Step], Outcome]
    results: list[ResultsDocument] = field(default_factory=list)
    held: dict[float, bool] = field(default_factory=dict)
    seen: dict[str, float] = field(default_factory=dict)
    _original: Quality = field(default_factory=lambda: Quality(perplexity={}, questions=[]))

    def candidates(self) -> list[CandidateRecord]:
        """Makes and measures all candidates, in the order in which people read of them.

        Raises:
            SenteiError: A step failed without which nothing can be said.
        """
        self._must(self.steps.evaluated_original)
        self._original = self._quality(ORIGINAL)
        self._must(self.steps.sweep)
        poc, found, held = self.steps.poc, list[CandidateRecord](), self.held
        asked = poc.candidates.sparsities
        while (sparsity := next_sparsity(asked, held, bisections=poc.candidates.bisect)) is not None:
            found.append(self._pruned(sparsity))
            held[sparsity] = damage_is_green(lights_of(found[-1], poc.guard_rails))
        found.sort(key=lambda each: each.sparsity or 0)
        found += [self._quantised(None, each) for each in poc.alternatives.quantised]
        if furthest := max((each for each, holds in held.items() if holds), default=None):
            found += [self._quantised(furthest, each) for each in poc.alternatives.pruned_and_quantised]
        found += [self._sibling(name, path) for name, path in self.siblings.items()]
        return found

    @property
    def possible(self) -> list[float]:
        """The sparsities that may still be taken all the way."""
        first_broken = min((sparsity for sparsity, holds in self.held.items() if not holds), default=1.0)
        return [sparsity for sparsity in sorted(self.steps.poc.candidates.sparsities) if sparsity < first_broken]

    def original(self) -> OriginalRecord:
        """What was measured of the original, once the candidates are."""
        return original_record(self._original, self.results)

    def _must(self, step: Step) -> None:
        fatal(step, self.do(step))

    def _quality(self, name: str) -> Quality:
        return quality_of(self.steps.directory / "evaluations" / name, self._question_files)

    @property
    def _question_files(self) -> list[str]:
        return [Path(file).name for file in self.steps.poc.evaluation.questions]

    def _pruned(self, sparsity: float) -> CandidateRecord:
        candidate = CandidateRecord(name=percent(sparsity), kind="pruned", sparsity=sparsity)
        made = self.steps.pruned(sparsity)
        if error := self.do(made).error:
            return _without(candidate, error)
        candidate = self._evaluated(candidate, self.steps.evaluated(candidate.name, made.out, made))
        self.seen |= candidate.seen
        if candidate.not_measured:
            return candidate
        if not damage_is_green(lights_of(candidate, self.steps.poc.guard_rails)):
            return _without(candidate, TOO_DAMAGED)
        return self._measured(candidate, self.steps.exported(candidate.name, made.out, made))

    def _quantised(self, sparsity: float | None, precision: str) -> CandidateRecord:
        """The original or a pruned model, rounded."""
        steps = self.steps
        if sparsity is None:
            candidate = CandidateRecord(name=precision, kind="quantised", precision=precision)
            exported = steps.exported(precision, steps.model, None, precision)
        else:
            candidate = CandidateRecord(
                name=f"{percent(sparsity)} + {precision}", kind="pruned and quantised", sparsity=sparsity,
                precision=precision,
            )  # fmt: skip
            made = steps.pruned(sparsity)
            exported = steps.exported(candidate.name, made.out, made, precision)
        # Its own evaluation is of an export, which does not tell.
        if sparsity is not None or "--calibration" in exported[0].arguments:
            candidate = candidate.model_copy(update={"seen": dict(self.seen)})
        candidate = self._exported(candidate, exported)
        if candidate.not_measured:
            return candidate
        candidate = self._evaluated(candidate, steps.asked_in_engine(candidate.name, exported[0]))
        return candidate if candidate.not_measured else self._benchmarked(candidate, exported[0])

    def _sibling(self, name: str, path: Path) -> CandidateRecord:
        candidate = CandidateRecord(name=name, kind="sibling")
        candidate = self._evaluated(candidate, self.steps.evaluated(name, path, None))
        return candidate if candidate.not_measured else self._measured(candidate, self.steps.exported(name, path, None))

    def _evaluated(self, candidate: CandidateRecord, step: Step) -> CandidateRecord:
        if error := self.do(step).error:
            return _without(candidate, error)
        return with_quality(candidate, quality_of(step.out, self._question_files), self._original.questions)

    def _measured(self, candidate: CandidateRecord, exported: Sequence[Step]) -> CandidateRecord:
        candidate = self._exported(candidate, exported)
        return candidate if candidate.not_measured else self._benchmarked(candidate, exported[0])

    def _exported(self, candidate: CandidateRecord, exported: Sequence[Step]) -> CandidateRecord:
        """Exports and verifies; an export that failed its verification is not measured."""
        for step in exported:
            outcome = self.do(step)
            if outcome.error:
                failed = {"verified": False} if outcome.check_failed else {}
                return _without(candidate.model_copy(update=failed), outcome.error)
        return candidate.model_copy(update={"verified": True})

    def _benchmarked(self, candidate: CandidateRecord, export: Step) -> CandidateRecord:
        original = None
        if self.steps.poc.engine == "onnx":
            for step in self.steps.exported(ORIGINAL, self.steps.model, None):
                self._must(step)
                original = original or step
        step = self.steps.measured(candidate.name, original, export, candidate.precision)
        outcome = self.do(step)
        # Where requests failed the results are there, and say so.
        if outcome.error and not (outcome.check_failed and (step.out / RESULTS_FILE).is_file()):
            return _without(candidate, outcome.error)
        results = read_results(step.out)
        self.results.append(results)
        return with_speed(candidate, results)


def expected_steps(steps: Steps, siblings: dict[str, Path], sparsities: Sequence[float]) -> list[Step]:
    """All steps, if these sparsities hold; bisections are not among them."""
    poc = steps.poc
    found = [steps.evaluated_original, steps.sweep]
    originals = list(steps.exported(ORIGINAL, steps.model, None)) if poc.engine == "onnx" else []
    found += originals
    original = originals[0] if originals else None
    for sparsity in sparsities:
        name, made = percent(sparsity), steps.pruned(sparsity)
        exported = steps.exported(name, made.out, made)
        found += [made, steps.evaluated(name, made.out, made), *exported, steps.measured(name, original, exported[0])]
    rounded: list[tuple[str, Path, Step | None, str]] = [
        (precision, steps.model, None, precision) for precision in poc.alternatives.quantised
    ]
    if poc.alternatives.pruned_and_quantised and sparsities:
        made = steps.pruned(sparsities[-1])
        rounded += [
            (f"{percent(sparsities[-1])} + {each}", made.out, made, each)
            for each in poc.alternatives.pruned_and_quantised
        ]
    for name, model, made_by, precision in rounded:
        exported = steps.exported(name, model, made_by, precision)
        found += [*exported, steps.asked_in_engine(name, exported[0])]
        found.append(steps.measured(name, original, exported[0], precision))
    for name, path in siblings.items():
        exported = steps.exported(name, path, None)
        found += [steps.evaluated(name, path, None), *exported, steps.measured(name, original, exported[0])]
    return found


def _without(candidate: CandidateRecord, why: str) -> CandidateRecord:
    return candidate.model_copy(update={"not_measured": why})
