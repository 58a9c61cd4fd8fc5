"""Writes a JSON Schema for each file that sentei writes, and for poc.yaml and gate.yaml; ``--check`` says which are
stale instead.

python docs/write_schemas.py [--check]
"""

import argparse
import json
import sys
from pathlib import Path

from pydantic import BaseModel

from serving.benchmark.journal import RESULTS_FILE
from serving.benchmark.results_document import ResultsDocument
from serving.decision.document import VERDICT_FILE, VerdictDocument
from serving.forecast.estimate_document import EstimateDocument
from serving.gate.document import GATE_FILE, GateDocument
from serving.poc.document import POC_FILE, PocDocument
from serving.signing.provenance_document import PROVENANCE_FILE, ProvenanceDocument
from toolchain.checkpoint.export_document import EXPORT_FILE, ExportRecord
from toolchain.checkpoint.verification_document import VERIFICATION_FILE, VerificationDocument
from toolchain.costs.document import CostsDocument
from toolchain.evaluate.document import EVALUATION_FILE, EvaluationDocument
from toolchain.evaluate.method_comparison_document import COMPARISON_FILE, ComparisonDocument
from toolchain.plan.document import PlanDocument
from toolchain.plan.plan import PLAN_FILE
from toolchain.plan.summary_document import PRUNING_SUMMARY_FILE, PruningSummary
from toolchain.plan.sweep_document import SWEEP_FILE, SweepDocument

_DIRECTORY = Path(__file__).with_name("schemas")
_DOCUMENTS: dict[str, type[BaseModel]] = {
    PLAN_FILE: PlanDocument,
    PRUNING_SUMMARY_FILE: PruningSummary,
    SWEEP_FILE: SweepDocument,
    EXPORT_FILE: ExportRecord,
    VERIFICATION_FILE: VerificationDocument,
    RESULTS_FILE: ResultsDocument,
    EVALUATION_FILE: EvaluationDocument,
    COMPARISON_FILE: ComparisonDocument,
    "estimate.json": EstimateDocument,
    "costs.json": CostsDocument,
    PROVENANCE_FILE: ProvenanceDocument,
    VERDICT_FILE: VerdictDocument,
    POC_FILE: PocDocument,
    GATE_FILE: GateDocument,
}


def main() -> int:
    """Writes or checks; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a schema is stale")
    check = parser.parse_args().check
    expected = {f"{Path(name).stem}.schema.json": _schema(name, model) for name, model in _DOCUMENTS.items()}
    found = {path.name: path.read_text(encoding="utf-8") for path in _DIRECTORY.glob("*.json")}
    stale = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if check:
        for name in stale:
            print(f"docs/schemas/{name} is stale: run python docs/write_schemas.py", file=sys.stderr)
        return 1 if stale else 0
    _DIRECTORY.mkdir(exist_ok=True)
    for name in stale:
        if name in expected:
            (_DIRECTORY / name).write_text(expected[name], encoding="utf-8")
        else:
            (_DIRECTORY / name).unlink()
    return 0


def _schema(name: str, model: type[BaseModel]) -> str:
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **model.model_json_schema(), "title": name}
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    sys.exit(main())
