"""The messages that docs/guides/troubleshooting.md explains are messages that the code still has."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GUIDE = ROOT / "docs/guides/troubleshooting.md"
# vLLM's own, and where the guide stands in for a value.
_NOT_OURS = "Model architectures"
_VALUES = re.compile(
    r"\b[NMXW]\b|\.\.\.|'x'|\d[\d.]*|\b(?:sparsity|fp32|int4|CUDAExecutionProvider|adapter_config\.json)\b"
)


def _said_by_the_code() -> list[str]:
    """Every string of the code, each value in it as a NUL."""
    said = []
    for folder in ("toolchain", "serving", "export"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    said.append("".join(str(p.value) if isinstance(p, ast.Constant) else "\0" for p in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    said.append(node.value)
    return said


def _explained() -> list[str]:
    """What stands in the first column of the tables of messages."""
    page = GUIDE.read_text(encoding="utf-8").partition("## Messages")[2]
    rows = (line.split(" | ")[0] for line in page.splitlines() if line.startswith("| `"))
    return [message for cell in rows for message in re.findall(r"`([^`]+)`", cell) if " " in message]


def test_each_message_that_is_explained_is_a_message_of_the_code():
    said = _said_by_the_code()
    messages = [each for each in _explained() if not each.startswith((_NOT_OURS, "sentei "))]
    assert len(messages) > 40
    for message in messages:
        fragments = [part.strip(" .:()") for part in _VALUES.split(message) if len(part.strip(" .:()")) > 3]
        assert any(all(part in text for part in fragments) for text in said), message
