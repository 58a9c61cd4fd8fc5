"""Finds and reads the files a report is made of; what is missing stays missing."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from serving.benchmark.journal import RESULTS_FILE
from serving.benchmark.results_document import ResultsDocument
from serving.decision.document import VERDICT_FILE, VerdictDocument
from serving.saved_json import Source, checked
from toolchain.checkpoint.verification_document import VERIFICATION_FILE, VerificationDocument
from toolchain.documents import check_document
from toolchain.errors import SenteiError
from toolchain.evaluate.document import EVALUATION_FILE, EvaluationDocument
from toolchain.json_files import read_json_object
from toolchain.plan.plan import PLAN_FILE, PruningPlan, load_plan
from toolchain.plan.summary_document import PRUNING_SUMMARY_FILE, PruningSummary


@dataclass(frozen=True, kw_only=True)
class ReportInputs:
    """What was found. ``None`` or empty where there was nothing.

    Attributes:
        plan: ``plan.json``.
        summary: ``pruning_summary.json``.
        evaluations: ``evaluation.json``.
        verifications: ``verification.json`` of each export.
        benchmarks: ``results.json`` of each benchmark.
        verdict: ``verdict.json`` of a proof of concept.
    """

    plan: PruningPlan | None
    summary: Source | None
    evaluations: tuple[Source, ...]
    verifications: tuple[Source, ...]
    benchmarks: tuple[Source, ...]
    verdict: VerdictDocument | None = None

    @property
    def missing(self) -> list[str]:
        """Names of the files that were not found."""
        found = {
            PLAN_FILE: self.plan,
            PRUNING_SUMMARY_FILE: self.summary,
            EVALUATION_FILE: self.evaluations,
            VERIFICATION_FILE: self.verifications,
            RESULTS_FILE: self.benchmarks,
        }
        return [name for name, value in found.items() if not value]


def read_inputs(directories: Sequence[Path]) -> ReportInputs:
    """Looks into each directory and one level below it.

    Raises:
        SenteiError: A directory does not exist, nothing is found, a file cannot be read, or two different plans or
            summaries are found.
    """
    for directory in directories:
        if not directory.is_dir():
            raise SenteiError(f"Directory {directory} does not exist.")
    plan_files = [source.path for source in _distinct(_find(directories, PLAN_FILE))]
    summaries = _distinct(_find(directories, PRUNING_SUMMARY_FILE))
    for name, paths in ((PLAN_FILE, plan_files), (PRUNING_SUMMARY_FILE, [source.path for source in summaries])):
        if len(paths) > 1:
            raise SenteiError(
                f"{paths[0]} and {paths[1]} differ: a report is about one pruned model.",
                f"Give directories with one {name}.",
            )
    inputs = ReportInputs(
        plan=load_plan(plan_files[0], needs_scores=False) if plan_files else None,
        summary=_as(PruningSummary, summaries[0]) if summaries else None,
        evaluations=tuple(_as(EvaluationDocument, source) for source in _distinct(_find(directories, EVALUATION_FILE))),
        verifications=tuple(_as(VerificationDocument, source) for source in _find(directories, VERIFICATION_FILE)),
        benchmarks=tuple(_as(ResultsDocument, source) for source in _distinct(_find(directories, RESULTS_FILE))),
        verdict=_verdict(_distinct(_find(directories, VERDICT_FILE))),
    )
    if len(inputs.missing) == 5 and inputs.verdict is None:
        looked = ", ".join(str(directory) for directory in directories) or "no directory"
        raise SenteiError(
            f"Nothing to report in {looked}.", f"Looked, also one level below, for {', '.join(inputs.missing)}."
        )
    return inputs


def _find(directories: Sequence[Path], name: str) -> list[Source]:
    paths: dict[Path, Path] = {}
    for directory in directories:
        for path in [directory / name, *sorted(directory.glob(f"*/{name}"))]:
            if path.is_file() and not path.parent.name.endswith(".partial"):
                paths.setdefault(path.resolve(), path)
    return [Source(path=path, content=read_json_object(path)) for path in paths.values()]


def _verdict(sources: Sequence[Source]) -> VerdictDocument | None:
    if len(sources) > 1:
        raise SenteiError(
            f"{sources[0].path} and {sources[1].path} differ: a report has one verdict.", "Give one of them."
        )
    return check_document(checked(sources[0]).content, str(sources[0].path), VerdictDocument) if sources else None


def _as(model: type[BaseModel], source: Source) -> Source:
    """The source, if it holds what the model says.

    Raises:
        SenteiError: It does not.
    """
    check_document(checked(source).content, str(source.path), model)
    return source


def _distinct(sources: Sequence[Source]) -> list[Source]:
    """Without copies: an export may carry its checkpoint's files along."""
    distinct: list[Source] = []
    for source in sources:
        if all(source.content != other.content for other in distinct):
            distinct.append(source)
    return distinct
