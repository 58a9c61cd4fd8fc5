"""What an export says of itself, read and checked before anybody signs it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from serving.onnx_export.files import check_files, is_onnx_export, read_settings
from toolchain.architecture.layout import LayerLayout
from toolchain.checkpoint.directory import read_headers
from toolchain.checkpoint.export_document import EXPORT_FILE, ExportRecord
from toolchain.checkpoint.quantized import open_servable
from toolchain.checkpoint.verification_document import (
    VERIFICATION_FILE,
    AnswersVerification,
    ExportVerification,
    VerificationDocument,
)
from toolchain.documents import read_document
from toolchain.errors import CheckFailedError, SenteiError
from toolchain.model.decilm import is_nemotron_nas
from toolchain.plan.document import PlanDocument
from toolchain.plan.plan import PLAN_FILE, load_plan

Format = Literal["vllm", "onnx", "nemotron-nas"]
_VERIFY = "Run sentei verify DIR --against MODEL first."


@dataclass(frozen=True, kw_only=True)
class Exported:
    """An export that can be read and has passed its verification.

    Attributes:
        directory: Where it is.
        format: What serves it.
        on_cuda: Whether it is an ONNX export for CUDA.
        verification: Its verdict.
        plan: What was removed; ``None`` of a model that was not pruned.
    """

    directory: Path
    format: Format
    on_cuda: bool
    verification: ExportVerification | AnswersVerification
    plan: PlanDocument | None


def open_exported(directory: Path) -> Exported:
    """Reads an export and checks that it is whole, that it passed, and that its plan is about it.

    Raises:
        CheckFailedError: It failed its verification.
        SenteiError: It is no export, is damaged, was never verified, or its plan or verdict is another export's.
        MissingDependencyError: It is an ONNX export, and onnx is not installed.
    """
    verification = _verification(directory)
    plan = load_plan(directory, needs_scores=False).document if (directory / PLAN_FILE).is_file() else None
    if is_onnx_export(directory):
        check_files(directory)
        record = read_document(directory / EXPORT_FILE, ExportRecord, hint="Export the model again.")
        if record.source_fingerprint != verification.source_fingerprint:
            raise SenteiError(f"{directory / VERIFICATION_FILE} is about an export of another checkpoint.", _VERIFY)
        removed = set(record.removed_attention)
        layout = tuple(
            LayerLayout(attention=number not in removed, intermediate_size=width)
            for number, width in enumerate(record.intermediate_size)
        )
        on_cuda = read_settings(directory).device == "cuda"
        return _checked(directory, "onnx", verification, plan, layout=layout, on_cuda=on_cuda)
    if is_nemotron_nas(directory):
        read_headers(directory)
        return _checked(directory, "nemotron-nas", verification, plan)
    return _checked(directory, "vllm", verification, plan, layout=open_servable(directory).layout)


def _checked(
    directory: Path,
    format: Format,
    verification: ExportVerification | AnswersVerification,
    plan: PlanDocument | None,
    *,
    layout: tuple[LayerLayout, ...] | None = None,
    on_cuda: bool = False,
) -> Exported:
    if plan is not None and layout is not None:
        planned = tuple(
            LayerLayout(attention=layer.attention == "keep", intermediate_size=layer.intermediate_size)
            for layer in plan.layers
        )
        if planned != layout:
            raise SenteiError(
                f"{directory / PLAN_FILE} is another model's plan: its layers have other shapes than the weights.",
                "Export the pruned model again.",
            )
    return Exported(directory=directory, format=format, on_cuda=on_cuda, verification=verification, plan=plan)


def _verification(directory: Path) -> ExportVerification | AnswersVerification:
    path = directory / VERIFICATION_FILE
    if not path.is_file():
        raise SenteiError(
            f"{directory} has no {VERIFICATION_FILE}: nothing says that it answers as its checkpoint does.", _VERIFY
        )
    document = read_document(path, VerificationDocument)
    failed = document.failed_checks
    if failed or not document.root.passed:
        raise CheckFailedError(
            f"{directory} failed its verification{f' ({failed[0]})' if failed else ''}, so it is not signed.",
            f"Export it again; see {VERIFICATION_FILE}.",
        )
    return document.root
