"""What is looked at before ``sentei serve`` starts a server: was the directory verified, and can this machine serve it?

A directory that failed its verification is refused. One that was made from another model, and never compared with it,
is served with a warning: exports compare themselves, so it is a model fresh from ``sentei prune``, which people try
before they export it, or an export of somebody else's. A model as it came has nothing to be compared with.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from serving.onnx_export.files import is_onnx_export
from serving.readiness import examine_directory
from toolchain.checkpoint.export_document import EXPORT_FILE
from toolchain.checkpoint.quantized import is_quantized
from toolchain.checkpoint.verification_document import VERIFICATION_FILE, ExportVerification, VerificationDocument
from toolchain.documents import read_document
from toolchain.errors import SenteiError
from toolchain.plan.plan import PLAN_FILE

_NO_PROMPT = "Its tensors were compared, and no prompt was run: run sentei verify on this machine."


def check_before_serving(directory: Path, options: Sequence[str], *, force: bool) -> None:
    """Checks a directory and, for vLLM, the machine; tells on stderr what is good to know.

    An ONNX export's files and memory are checked by its server, which starts in this process.

    Args:
        directory: A checkpoint or an ONNX export.
        options: The server's.
        force: Warn of what would be refused.

    Raises:
        SenteiError: The directory failed its verification, or this machine cannot serve it as asked.
    """
    problems = [problem] if (problem := _failed_verification(directory)) else []
    if not is_onnx_export(directory):
        examined = examine_directory(directory, options)
        problems += examined["problems"]
        for note in examined["notes"]:
            _tell(note)
    if problems and not force:
        raise SenteiError(" ".join(problems), "To serve it all the same, give --force.")
    for problem in problems:
        _tell(f"WARNING: {problem} Served all the same, because of --force.")


def _failed_verification(directory: Path) -> str | None:
    """Why the verification speaks against serving a directory, if so; tells what it leaves open."""
    file = directory / VERIFICATION_FILE
    if not file.is_file():
        if _is_made_from_another(directory):
            _tell(
                f"WARNING: {directory} has no {VERIFICATION_FILE}: it was never compared with the model it was made "
                "from. Do that with: sentei verify"
            )
        return None
    try:
        document = read_document(file, VerificationDocument)
    except SenteiError as error:
        return f"{error.message} So nobody knows whether {directory} was verified."
    found = document.root
    if not found.passed:
        failed = ", ".join(document.failed_checks) or "no check is named"
        return f"{directory} failed its verification ({failed}). Export the model again."
    if left_out := _NO_PROMPT if isinstance(found, ExportVerification) else found.not_run:
        _tell(f"Its verification passed, but: {left_out}")
    return None


def _is_made_from_another(directory: Path) -> bool:
    if is_onnx_export(directory):
        return True
    return any((directory / name).is_file() for name in (PLAN_FILE, EXPORT_FILE)) or is_quantized(directory)


def _tell(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)
