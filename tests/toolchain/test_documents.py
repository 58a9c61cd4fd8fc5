"""The files in tests/fixtures/written were written by released versions; they are read, and stay as they are.

Those in benchmark-vllm, comparison, estimate, prune-2, prune-evopress-2 and quantized were written by the version that
gave them models, the others before they had any. vLLM answered for one visit of benchmark-vllm; the writer made the
rest of the file from it. In quantized, the arithmetic of tests/quantized.py stood in for llm-compressor.
"""

import json
from pathlib import Path

import pytest

from serving.benchmark.comparison.runs import compare_results
from serving.benchmark.journal import RESULTS_FILE
from serving.benchmark.results_document import ResultsDocument
from serving.decision.document import VERDICT_FILE, VerdictDocument
from serving.forecast.estimate_document import EstimateDocument
from serving.report.render import render_report
from toolchain.checkpoint.export_document import EXPORT_FILE, ExportRecord
from toolchain.checkpoint.verification_document import VERIFICATION_FILE, VerificationDocument
from toolchain.documents import read_document
from toolchain.errors import SenteiError
from toolchain.evaluate.document import EVALUATION_FILE, EvaluationDocument
from toolchain.evaluate.method_comparison import markdown
from toolchain.evaluate.method_comparison_document import COMPARISON_FILE, ComparisonDocument
from toolchain.plan.plan import PLAN_FILE, load_plan, load_sweep
from toolchain.plan.summary_document import PRUNING_SUMMARY_FILE, PruningSummary
from toolchain.plan.sweep_document import SWEEP_FILE, SweepDocument

WRITTEN = Path(__file__).parents[1] / "fixtures" / "written"
# What ``sentei estimate --json`` printed.
ESTIMATE_FILE = "estimate.json"
MODELS = {
    PRUNING_SUMMARY_FILE: PruningSummary,
    SWEEP_FILE: SweepDocument,
    EXPORT_FILE: ExportRecord,
    VERIFICATION_FILE: VerificationDocument,
    RESULTS_FILE: ResultsDocument,
    COMPARISON_FILE: ComparisonDocument,
    ESTIMATE_FILE: EstimateDocument,
    VERDICT_FILE: VerdictDocument,
}
# A report is about none of these.
UNREPORTED = {"sweep", "comparison", "estimate"}
LAYOUTS = {
    RESULTS_FILE: {"indent": 1, "ensure_ascii": False},
    COMPARISON_FILE: {"indent": 1, "ensure_ascii": False},
    ESTIMATE_FILE: {"indent": None},
    VERDICT_FILE: {"indent": 1, "ensure_ascii": False},
}
FILES = [path for path in sorted(WRITTEN.rglob("*.json")) if path.name in MODELS]


def named(path):
    return str(path.relative_to(WRITTEN))


def test_every_kind_of_file_is_there():
    assert {path.name for path in FILES} == set(MODELS)


@pytest.mark.parametrize("path", FILES, ids=named)
def test_a_file_is_read_and_written_with_the_same_bytes(path):
    document = read_document(path, MODELS[path.name])
    document = getattr(document, "root", document)
    layout = LAYOUTS.get(path.name, {})
    assert document.to_json(**layout) == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", FILES, ids=named)
@pytest.mark.parametrize(
    "spoil, field",
    [
        (lambda content: content | {"colour": "red"}, "colour"),
        (lambda content: content | {"schema_version": 2}, "schema_version"),
        (lambda content: {key: value for key, value in content.items() if key != "schema_version"}, "schema_version"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(path, spoil, field, tmp_path):
    spoiled = tmp_path / path.name
    spoiled.write_text(json.dumps(spoil(json.loads(path.read_text(encoding="utf-8")))))
    with pytest.raises(SenteiError, match=rf"{path.name} does not have the fields it should \(.*{field}: [^\n]*\)\."):
        read_document(spoiled, MODELS[path.name])


def test_plans():
    plans = [load_plan(path, needs_scores=False) for path in sorted(WRITTEN.rglob(PLAN_FILE))]
    assert {"2ssp", "shortgpt", "evopress"} == {plan.document.method for plan in plans}
    assert len(load_sweep(WRITTEN / "sweep") or ()) == 2


def test_evaluation():
    document = read_document(WRITTEN / "evaluation" / EVALUATION_FILE, EvaluationDocument)
    assert document.generation is not None


def test_plans_of_both_versions():
    versions = {json.loads(path.read_text())["schema_version"] for path in WRITTEN.rglob(PLAN_FILE)}
    assert versions == {1, 2}


def test_a_comparison_is_printed_as_it_was():
    document = read_document(WRITTEN / "comparison" / COMPARISON_FILE, ComparisonDocument)
    lines = markdown(document).splitlines()
    assert len([line for line in lines if line.startswith("| s")]) == len(document.rows) == 2
    assert all(row.speed and row.speed.gain for row in document.rows)


def test_a_highest_rate_is_compared_and_reported(tmp_path):
    directory = WRITTEN / "benchmark-vllm"
    assert compare_results(directory, directory)["goodput"]["unmet"] == []
    render_report([directory], tmp_path / "report.md")
    assert "TTFT ≤ 2000 ms" in (tmp_path / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "directory", sorted(path for path in WRITTEN.iterdir() if path.name not in UNREPORTED), ids=named
)
def test_reports(directory, tmp_path):
    render_report([directory], tmp_path / "report.md")
