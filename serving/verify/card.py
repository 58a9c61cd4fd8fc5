"""The verdict of a verification, in the words of the export's model card."""

from pathlib import Path
from typing import Any

from toolchain.outputs import write_text

CARD = "README.md"
_HEADING = "## Verification"


def write_into_card(exported: Path, verdict: dict[str, Any]) -> None:
    """Puts the verdict at the end of an export's model card, in place of an earlier one.

    Args:
        exported: The export; its ``README.md`` is made if there is none.
        verdict: The content of ``verification.json``.
    """
    card = exported / CARD
    text = card.read_text(encoding="utf-8") if card.is_file() else f"# {exported.resolve().name}\n"
    before, _, _ = text.partition(f"\n{_HEADING}\n")
    write_text(card, f"{before.rstrip()}\n\n{_section(verdict)}")


def _section(verdict: dict[str, Any]) -> str:
    failed = [name for name, check in verdict["checks"].items() if not check["passed"]]
    said = (
        "Passed" if verdict["passed"] else f"**Failed** ({', '.join(map(_words, failed))}). Do not deploy this export"
    )
    noise = verdict.get("noise", {})
    rows = [(name, check["value"], noise.get(name), check["limit"]) for name, check in verdict["checks"].items()]
    rows += [
        (name, verdict[name], None, None)
        for name in ("kl_divergence", "top1_agreement")
        if name in verdict and name not in verdict["checks"]
    ]
    table = "\n".join(
        f"| {_words(name)} | {value:.3g} | {_number(own, '')} | {_number(limit, 'not judged')} |"
        for name, value, own, limit in rows
    )
    prompts = f"{verdict['num_prompts']} prompts ({verdict['prompts']}, {verdict['num_tokens']} tokens)"
    return f"""{_HEADING}

{said}. Compared with the checkpoint it was made from (fingerprint `{verdict["source_fingerprint"][:16]}`):
teacher-forced log-probabilities of {prompts},
by {verdict["engine"]} in {verdict["dtype"]}, against {_reference(verdict)}, in nats. `verification.json` has more.
{verdict.get("not_run", "")}

| | found | the model's own noise | at most |
|---|---|---|---|
{table}
"""


def _words(name: str) -> str:
    return name.replace("_", " ")


def _number(value: float | None, otherwise: str) -> str:
    return otherwise if value is None else f"{value:.3g}"


def _reference(verdict: dict[str, Any]) -> str:
    if "reference" not in verdict:
        return "nothing"
    reference, noise = verdict["reference"], verdict["noise"]
    return f"Transformers in {reference['dtype']}, whose own answers in {noise['dtype']} are that far away (its noise)"
