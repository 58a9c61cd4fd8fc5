"""What every export ends with: what its checkpoint has beside the weights, and the record that it was compared."""

import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from toolchain.checkpoint.directory import Checkpoint, copy_companions
from toolchain.checkpoint.verification_document import VERIFICATION_FILE, ExportVerification

ALL_TENSORS_ARE_THE_SAME: dict[str, dict[str, Any]] = {
    "differing_tensors": {"passed": True, "value": 0, "limit": 0},
}
_PLAN_FILE, _CARD_FILE = "plan.json", "README.md"


def carry_over(source: Path, out: Path, *, card: bool = True, added: str = "") -> None:
    """Copies tokenizer, generation settings and licence, the plan, and the model card, as far as ``source`` has them.

    Args:
        source: The checkpoint's directory.
        out: The export's.
        card: Whether the model card goes along; not where the exporter writes another, or the verification does.
        added: Text at the end of the card.
    """
    copy_companions(source, out)
    if (source / _PLAN_FILE).is_file():
        shutil.copyfile(source / _PLAN_FILE, out / _PLAN_FILE)
    if not card or not (source / _CARD_FILE).is_file():
        return
    if added:
        (out / _CARD_FILE).write_text((source / _CARD_FILE).read_text(encoding="utf-8") + added, encoding="utf-8")
    else:
        shutil.copyfile(source / _CARD_FILE, out / _CARD_FILE)


def write_verification(
    out: Path, checkpoint: Checkpoint, *, stored: dict[str, Any], found: dict[str, Any]
) -> dict[str, Any]:
    """Writes ``verification.json`` of an export whose tensors were compared with its checkpoint's, and all agreed.

    Args:
        out: The export's directory.
        checkpoint: What it was made from.
        stored: In which form the weights are.
        found: What was compared.

    Returns:
        The file's content.
    """
    verification = ExportVerification.model_validate(
        {
            "schema_version": 1,
            "sentei_version": version("sentei"),
            "passed": True,
            "engine": "safetensors",
            **stored,
            "source_fingerprint": checkpoint.fingerprint,
            **found,
        }
    )
    (out / VERIFICATION_FILE).write_text(verification.to_json(), encoding="utf-8")
    return verification.content()
