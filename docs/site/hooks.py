"""What MkDocs adds to the Markdown in docs/: README as its first page, the reference pages, and the navigation.

MkDocs calls these functions by their names; https://www.mkdocs.org/dev-guide/plugins/#events says when.
"""

import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

from links import ROOT, linked_files, links_on_site, place_on_site
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from schemas import schema_page

DOCS = ROOT / "docs"
_ALWAYS = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
_COMMANDS = "reference/commands.md"
_FILES = "reference/files"
_SECTIONS = {
    "guides": "# Guides\n\nHow to do one thing each.",
    "decisions": "# Decisions\n\nWhat was chosen, against what, and the numbers behind it.",
}
_ROLE = re.compile(r":(?:func|class|mod|meth|data|attr):(?=<code>)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Lists every page that is there, so that a new guide needs no line in mkdocs.yml."""
    documents = sorted(f"docs/{path.name}" for path in DOCS.glob("*.md"))
    config.nav = [
        {"Home": "index.md"},
        {"Guides": ["guides/index.md", *map(place_on_site, _in_order_of_readme("guides"))]},
        {"Reference": [_COMMANDS, {"Files": [f"{_FILES}/{name}.md" for name in _schemas()]}, "reference/python.md"]},
        {"Topics": list(map(place_on_site, documents))},
        {"Decisions": ["decisions/index.md", *map(place_on_site, _in_order_of_readme("decisions"))]},
        {"日本語": sorted(map(place_on_site, _in_order_of_readme("ja")), key=lambda place: "quickstart" not in place)},
        {"Project": [place_on_site(path) for path in sorted(_outside() - {"README.md"}) if path.endswith(".md")]},
    ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Takes in what lies outside of docs/ and is linked to, and writes the reference pages."""
    for path in sorted(_outside()):
        source = ROOT / path
        place = place_on_site(path)
        if source.suffix == ".md":
            files.append(File.generated(config, place, content=source.read_text(encoding="utf-8")))
        else:
            files.append(File.generated(config, place, content=source.read_bytes()))
    for folder, head in _SECTIONS.items():
        listed = [f"- [{_title(path)}]({Path(path).name})" for path in _in_order_of_readme(folder)]
        files.append(File.generated(config, f"{folder}/index.md", content="\n".join([head, "", *listed])))
    files.append(File.generated(config, _COMMANDS, content=_commands()))
    for name, schema in _schemas().items():
        content = schema_page(schema, schema_file=f"../../schemas/{name}.schema.json")
        files.append(File.generated(config, f"{_FILES}/{name}.md", content=content))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """Rewrites the links of what is a file of the repository."""
    path = _written_pages().get(page.file.src_uri)
    return markdown if path is None else links_on_site(markdown, path)


def on_page_content(html: str, **_: Any) -> str:
    """Roles of Sphinx in docstrings become plain code."""
    return _ROLE.sub("", html)


@cache
def _outside() -> frozenset[str]:
    """The repository's files outside of docs/ that its Markdown links to, and what these link to in turn."""
    found = {"README.md", *_ALWAYS}
    left = [*found, *_in_docs()]
    while left:
        for target in linked_files(left.pop()) - found:
            if target.startswith("docs/") or not (ROOT / target).is_file():
                continue
            found.add(target)
            if target.endswith(".md"):
                left.append(target)
    return frozenset(found)


@cache
def _written_pages() -> dict[str, str]:
    """The pages that people have written: from their place on the site to their path in the repository."""
    return {place_on_site(path): path for path in (*_outside(), *_in_docs()) if path.endswith(".md")}


def _in_docs() -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in DOCS.rglob("*.md")]


def _in_order_of_readme(folder: str) -> list[str]:
    """The pages of a folder of docs/: in README's order, and then those that it does not name."""
    pages = sorted(path.relative_to(ROOT).as_posix() for path in (DOCS / folder).glob("*.md"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named = [path for path in pages if f"({path}" in readme]
    return [*sorted(named, key=lambda path: readme.index(f"({path}")), *(path for path in pages if path not in named)]


def _title(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")


def _schemas() -> dict[str, Any]:
    return {
        path.name.removesuffix(".schema.json"): json.loads(path.read_text(encoding="utf-8"))
        for path in sorted((DOCS / "schemas").glob("*.schema.json"))
    }


def _commands() -> str:
    """Typer's own reference. Its lists of commands cut descriptions short, so they become links to the whole."""
    command = [sys.executable, "-m", "typer", "toolchain.cli.app", "utils", "docs", "--name", "sentei"]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    parents, lines = "sentei", []
    for line in text.replace("# `sentei`", "# Commands", 1).splitlines():
        if heading := re.match(r"#+ `(.*)`$", line):
            parents = heading[1]
        if listed := re.match(r"\* `([a-z][a-z-]*)`: ", line):
            whole = f"{parents} {listed[1]}"
            line = f"* [`{whole}`](#{whole.replace(' ', '-')})"
        lines.append(line)
    return "\n".join(lines)
