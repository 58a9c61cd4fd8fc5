"""The site's pages that nobody wrote, and its links to what lies outside of docs/. 'make check' builds the whole."""

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

from tests.docs.commands import ROOT

SCHEMAS = sorted((ROOT / "docs" / "schemas").glob("*.json"))


def module(name: str) -> ModuleType:
    """One of the modules that MkDocs imports by path."""
    spec = importlib.util.spec_from_file_location(f"site_{name}", ROOT / "docs" / "site" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.mark.parametrize("file", SCHEMAS, ids=lambda path: path.name)
def test_a_page_has_each_field_of_its_schema_once(file: Path) -> None:
    schema = json.loads(file.read_text(encoding="utf-8"))
    page = module("schemas").schema_page(schema, schema_file="x.json")
    objects = [schema, *schema.get("$defs", {}).values()]
    fields = [f"`{name}`" for each in objects for name in each.get("properties", {})]
    assert sorted(re.findall(r"^\| (`.*?`) \| .+ \| .+ \|$", page, re.MULTILINE)) == sorted(fields)
    linked = set(re.findall(r"\(#(\w+)\)", page))
    assert linked <= {name.lower() for name in schema.get("$defs", {})}


@pytest.mark.parametrize(
    ("type_", "said"),
    [
        ({"type": "integer", "minimum": 1, "maximum": 1000}, "integer, ≥ 1, ≤ 1000"),
        ({"anyOf": [{"type": "number"}, {"type": "null"}]}, "number or null"),
        ({"type": "array", "items": {"$ref": "#/$defs/PlannedLayer"}}, "list of [PlannedLayer](#plannedlayer)"),
        ({"type": "object", "additionalProperties": {"type": "number"}}, "object of number by name"),
        ({"enum": ["keep", "remove"], "type": "string"}, "`keep`, `remove`"),
        ({"const": False, "type": "boolean"}, "`false`"),
    ],
)
def test_types_are_said_in_words(type_: dict, said: str) -> None:
    assert module("schemas").type_of(type_) == said


@pytest.mark.parametrize(
    ("path", "link", "on_site"),
    [
        ("README.md", "docs/guides/poc.md", "guides/poc.md"),
        ("README.md", "docs/report.png", "report.png"),
        ("README.md", "SECURITY.md", "repository/SECURITY.md"),
        ("README.md", "docs/decisions/", "decisions/index.md"),
        ("docs/gpu.md", "../benchmarks/results/quality.md#table", "repository/benchmarks/results/quality.md#table"),
        ("docs/guides/poc.md", "../metrics.md", "../metrics.md"),
        ("docs/guides/poc.md", "../../README.md", "../index.md"),
        ("SECURITY.md", "docs/decisions/poc.md", "../decisions/poc.md"),
        ("docs/guides/poc.md", "https://example.org/x.md", "https://example.org/x.md"),
        ("docs/guides/poc.md", "#what-is-tried", "#what-is-tried"),
    ],
)
def test_links_lead_to_the_same_file_on_the_site(path: str, link: str, on_site: str) -> None:
    links = module("links")
    assert links.links_on_site(f"See [it]({link}).", path) == f"See [it]({on_site})."


def test_code_is_left_alone() -> None:
    block = "```python\nnames[0](docs/guides/poc.md)\n```"
    assert module("links").links_on_site(block, "README.md") == block
